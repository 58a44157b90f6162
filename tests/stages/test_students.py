"""Stages of students: label maps from any source, training that resumes, predictions that are scored like retrieval."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moduseg.bank.corrections import Correction, CorrectionFile, apply_corrections
from moduseg.bank.derived import digest_bank, write_derived
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.datasets.io import read_label_png, write_label_png
from moduseg.errors import ConfigError, IncompleteError, MissingError
from moduseg.files import file_digest, read_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.plan import plan_run
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer_training import InferTraining
from moduseg.stages.predict_student import PredictStudent
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.stages.student_labels import SourceLabels, StudentLabels, measure_label_share, select_learnt
from moduseg.stages.train_student import TrainStudent
from moduseg.structures import ScoreMaps
from tests.support.processes import run_two_ranks
from tests.support.runs import overrides

ROOT = Path(__file__).parents[2]
LINEAR = ("student=linear", "student.training.batch=4", "student.training.steps=60", "student.training.warmup=5")
SLOW = (*LINEAR, "student.labels=ground_truth", "student.training.steps=400")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of this module share proposals and pseudo masks."""
    return tmp_path_factory.mktemp("students")


def configure(outputs: Path, *more: str) -> list[str]:
    return overrides(outputs, *LINEAR, *more)


def test_a_student_of_the_truth_beats_a_guess(outputs: Path) -> None:
    """The results name the supervision, and a second run does nothing."""
    arguments = configure(outputs, "student.labels=ground_truth")
    folder = PredictStudent.run(compose(arguments))
    results = read_json(folder / "results.json")
    guess = read_json(PredictStudent.run(compose([*arguments, "student.training.steps=1"])) / "results.json")
    assert results["miou"] > guess["miou"]
    assert results["label_source"] == "pixel labels (ground truth)"
    assert results["refinement"] == "none (no CRF, no test-time augmentation)"
    stamps = {
        path: path.stat().st_mtime_ns for path in outputs.rglob("*") if path.is_file() and "latest" not in path.parts
    }
    assert PredictStudent.run(compose(arguments)) == folder
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_views_are_named_in_the_result(outputs: Path) -> None:
    """Scales and mirror images are settings of the prediction: the student itself is shared."""
    arguments = configure(outputs, "student.labels=ground_truth")
    first = PredictStudent.run(compose(arguments))
    second = PredictStudent.run(compose([*arguments, "student.scales=[1.0,0.5]", "student.mirror=true"]))
    assert first != second
    refinement = read_json(second / "results.json")["refinement"]
    assert refinement == "none (no CRF); test-time augmentation: scales 1, 0.5 and mirror image"
    trained = {read_json(folder / "manifest.json")["inputs"]["train_student"] for folder in (first, second)}
    assert len(trained) == 1


@pytest.mark.parametrize("source", ["pseudo_masks", "predictions", "ground_truth", "files"])
def test_labels_come_from_any_source(source: str, outputs: Path, tmp_path: Path) -> None:
    """Each source gives every image a label map of its size, whose classes the image-level labels name."""
    more = [f"student.labels={source}", "pseudo_masks.refine=region_vote", "retrieval.smoothing_radius=1"]
    if source == "files":
        masks = PseudoMasks.run(compose(overrides(outputs))) / "labels"
        (tmp_path / "labels").symlink_to(masks)
        more.append(f"student.folder={tmp_path / 'labels'}")
    work = Workspace(compose(configure(outputs, *more)))
    folder = StudentLabels.run(work.cfg, work)
    dataset = work.dataset("train")
    for image_id in dataset.ids:
        labels = read_label_png(folder / "labels" / f"{image_id}.png")
        assert labels.shape == dataset.image_size(image_id)
        assert set(np.unique(labels)) <= {0, 255, *(dataset.labels_of(image_id) or ())}
    results = read_json(folder / "results.json")
    assert results["split"] == "train"
    named = {"ground_truth": "pixel labels (ground truth)", "files": "label maps of a folder"}
    assert results["label_source"] == named.get(source, dataset.label_source)
    changed_by = {"pseudo_masks": "region_vote", "predictions": "smoothing_radius=1"}
    assert results["refinement"].startswith(f"{changed_by.get(source, 'none')} (no CRF")


def test_regions_of_an_image_do_not_vote_on_it(outputs: Path) -> None:
    """With one neighbour and true proposals an image's own regions give its own label map back."""
    arguments = configure(outputs, "student.labels=predictions", "bank.purify.enabled=false", "bank.min_area=1")
    own = InferTraining.run(compose([*arguments, "student.held_out=false"]))
    held_out = InferTraining.run(compose(arguments))
    mious = [read_json(folder / "results.json")["miou"] for folder in (own, held_out)]
    assert mious[0] > 99
    assert mious[1] < 90


def test_centres_of_many_images_cannot_be_held_out(outputs: Path) -> None:
    arguments = configure(outputs, "student.labels=predictions", "bank.prototypes=3")
    with pytest.raises(ConfigError, match=r"bank\.prototypes: got 3, .*or student\.held_out=false"):
        InferTraining.run(compose(arguments))
    assert InferTraining.run(compose([*arguments, "student.held_out=false"])).is_dir()


def test_a_corrected_bank_labels_its_own_images(outputs: Path) -> None:
    """A region that a person named does not vote on its own image, and decides elsewhere."""
    arguments = configure(outputs, "student.labels=predictions")
    source = BuildBank.run(compose(arguments))
    bank = Bank.load(source)
    row = int(bank.labels.nonzero()[0, 0])
    entry = Correction(row, bank.image_ids[int(bank.image_index[row])], bank.classes[int(bank.labels[row])], "red disc")
    corrected = apply_corrections(bank, CorrectionFile(digest_bank(bank), (entry,)))
    folder = write_derived(
        corrected, "correct", sources=[source], details={}, folder=outputs / "corrected", outputs=outputs
    )
    labelled = InferTraining.run(compose([*arguments, f"bank.path={folder}"]))
    assert read_json(labelled / "manifest.json")["failures"] == 0
    stage = InferTraining(Workspace(compose([*arguments, f"bank.path={folder}"])))
    searched = [stage.retriever_of(image_id).bank.is_trusted for image_id in (entry.image, "another")]
    assert [int(is_trusted.sum()) for is_trusted in searched if is_trusted is not None] == [0, 1]


def test_masks_behind_a_part_mark_the_student(outputs: Path) -> None:
    """Pseudo masks that an ARM has sharpened are not weakly supervised, and neither is what learns them."""
    arm = ("pseudo_masks=clip_dense", "pseudo_masks.generator.arm=miniature/arm.safetensors")
    cfg = compose(configure(outputs, *arm, "student.training.steps=1", "student.training.warmup=0"))
    work = Workspace(cfg)
    mark = work.generator.supervision
    assert mark is not None
    for folder in (PredictStudent.run(cfg, work), StudentLabels.run(cfg, work)):
        assert read_json(folder / "manifest.json")["supervision"] == mark
        assert read_json(folder / "results.json")["supervision"] == mark
        assert f"[supervision={mark}]" in (folder / "results.md").read_text()
    assert read_json(TrainStudent.run(cfg) / "manifest.json")["supervision"] == mark


def test_confidence_becomes_weights(outputs: Path) -> None:
    """The share of the votes is stored beside the label maps; unsure pixels can be left out."""
    arguments = configure(outputs, "student.labels=predictions", "student.confidence=true", "retrieval.top_k=3")
    folder = StudentLabels.run(compose(arguments))
    names = {path.name for path in (folder / "labels").iterdir()}
    assert {path.name for path in (folder / "scores").iterdir()} == names
    strict = StudentLabels.run(compose([*arguments, "student.min_confidence=1.0"]))
    shares = [
        np.mean([(read_label_png(path) == 255).mean() for path in (f / "labels").iterdir()]) for f in (folder, strict)
    ]
    assert shares[1] > shares[0]
    assert (TrainStudent.run(compose(arguments)) / "student.safetensors").is_file()


def test_unnamed_classes_and_unsure_pixels_are_not_learnt() -> None:
    item = SourceLabels("a", np.array([[0, 1, 2, 255]], np.uint8), np.array([[255, 100, 255, 255]], np.uint8), (1,))
    assert select_learnt(item, 0.0).tolist() == [[0, 1, 255, 255]]
    assert select_learnt(item, 0.5).tolist() == [[0, 255, 255, 255]]


def test_share_of_the_label_among_the_scores() -> None:
    """Background 0.5, dog 0.3 and 1.0, cat 0.2 and 0.0; the last label was given by a refiner to an absent class."""
    scores = ScoreMaps((1, 2), torch.tensor([[[0.3, 1.0, 1.0]], [[0.2, 0.0, 0.0]]]))
    settings = compose(["pseudo_masks.background.rule=constant", "pseudo_masks.background.value=0.5"]).pseudo_masks
    shares = measure_label_share(scores, np.array([[0, 1, 7]], np.uint8), settings)
    assert shares.tolist() == [[round(255 * 0.5), round(255 * 1 / 1.5), 0]]


def test_changed_labels_train_again(outputs: Path, tmp_path: Path) -> None:
    """A student of files is another one when a file changes, and a broken file leaves its image out."""
    source = PseudoMasks.run(compose(overrides(outputs))) / "labels"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    arguments = configure(outputs, "student.labels=files", f"student.folder={tmp_path}", "student.training.steps=2")
    first = TrainStudent.run(compose(arguments))
    changed = next(tmp_path.iterdir())
    changed.write_bytes(write_label_png(np.zeros_like(read_label_png(changed))))
    second = TrainStudent.run(compose(arguments))
    assert first != second
    changed.write_bytes(b"no picture")
    third = TrainStudent.run(compose(arguments))
    assert read_json(third / "manifest.json")["failures"] == 1


def test_a_damaged_image_is_left_out(tmp_path: Path) -> None:
    """Its label map can be read, and so can its size."""
    arguments = overrides(tmp_path, *LINEAR, "student.labels=ground_truth", "student.training.steps=2")
    work = Workspace(compose(arguments))
    path = work.dataset("train").image_path("train_00001")
    path.write_bytes(path.read_bytes()[:300])
    labels = StudentLabels.run(work.cfg, work)
    (failure,) = (json.loads(line) for line in (labels / "failures.jsonl").read_text().splitlines())
    assert failure["id"] == "train_00001"
    assert (TrainStudent.run(compose(arguments)) / "student.safetensors").is_file()


def test_a_killed_training_ends_with_the_same_weights(outputs: Path, tmp_path: Path) -> None:
    """Killed while it trains, and started again by the same command."""
    arguments = overrides(outputs, *SLOW)
    undisturbed = TrainStudent.run(compose(arguments))
    again = overrides(tmp_path, *SLOW, "student.training.save_minutes=0", world=outputs)
    program = (
        "import sys, torch; torch.set_num_threads(1); from moduseg.config import compose; "
        "from moduseg.stages.train_student import TrainStudent; TrainStudent.run(compose(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, *again])
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("training.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("student.safetensors"))
    resumed = TrainStudent.run(compose(again))
    assert file_digest(resumed / "student.safetensors") == file_digest(undisturbed / "student.safetensors")
    assert not (resumed / "training.pt").exists()


def test_a_process_that_dies_before_the_manifest_loses_no_step(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = overrides(tmp_path, *LINEAR, "student.labels=ground_truth", "student.training.steps=5", world=outputs)
    write_manifest = Artefact.write_manifest

    def die(artefact: Artefact, **fields: Any) -> None:
        if artefact.stage == "train_student" and fields["status"] == "complete":
            raise KeyboardInterrupt
        write_manifest(artefact, **fields)

    monkeypatch.setattr(Artefact, "write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        TrainStudent.run(compose(arguments))
    monkeypatch.undo()
    (log,) = {path.resolve() for path in tmp_path.rglob("training.csv")}
    written = log.stat().st_mtime_ns
    folder = TrainStudent.run(compose(arguments))
    # No step was made again, and nothing but the student is left.
    assert log.stat().st_mtime_ns == written
    assert not [path.name for path in folder.iterdir() if "training.pt" in path.name]
    manifest = read_json(folder / "manifest.json")
    assert "student.safetensors" in manifest["products"]
    assert not [name for name in manifest["products"] if "training.pt" in name]


def test_processes_of_torchrun_train_together(outputs: Path, tmp_path: Path) -> None:
    """Two processes over gloo end with one student, that of one process."""
    short = (*LINEAR, "student.labels=ground_truth", "student.training.steps=10")
    alone = TrainStudent.run(compose(overrides(outputs, *short)))
    script, arguments = ROOT / "scripts" / "train_student.py", overrides(tmp_path, *short, world=outputs)
    run_two_ranks(script, arguments, tmp_path / "output.txt")
    assert "train_student: 6 images (6 now, 0 done before)" in (tmp_path / "output.txt").read_text()
    (together,) = {path.resolve() for path in tmp_path.rglob("student.safetensors")}
    expected, tensors = load_file(alone / "student.safetensors"), load_file(together)
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=0)


def test_later_tasks_of_a_job_array_leave_training_to_the_first(outputs: Path, tmp_path: Path) -> None:
    arguments = overrides(tmp_path, *LINEAR, "student.labels=ground_truth", "student.training.steps=2", world=outputs)
    StudentLabels.run(compose(arguments))
    later = [*arguments, "runtime.shard.index=1", "runtime.shard.count=2"]
    with pytest.raises(IncompleteError, match="shard 0 trains alone"):
        TrainStudent.run(compose(later))
    folder = TrainStudent.run(compose([*arguments, "runtime.shard.count=2"]))
    assert TrainStudent.run(compose(later)) == folder


def test_the_plan_knows_what_is_done(outputs: Path) -> None:
    cfg = compose(configure(outputs, "student.labels=ground_truth"))
    PredictStudent.run(cfg)
    plan = plan_run(PredictStudent(Workspace(cfg)), may_fetch=False)
    assert [stage.num_done for stage in plan.stages] == [stage.num_images for stage in plan.stages]
    assert all(stage.key for stage in plan.stages)


def test_other_results_do_not_know_of_students(outputs: Path) -> None:
    """A configuration without a student looks as it did before there were any."""
    assert "student" not in compose(overrides(outputs)).as_dict()
    assert json.dumps(compose(configure(outputs)).as_dict()["student"])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        pytest.param([], ConfigError, "student: got null, expected a student", id="no student"),
        pytest.param(
            [*LINEAR, "student.labels=files", "student.folder=nowhere"], MissingError, "folder: got 'nowhere'",
            id="no folder",
        ),
        pytest.param([*LINEAR, "student.training.steps=0"], ConfigError, "steps: got 0", id="no steps"),
    ],
)  # fmt: skip
def test_mistakes_are_named(more: list[str], error: type[Exception], message: str, outputs: Path) -> None:
    with pytest.raises(error, match=message):
        TrainStudent.run(compose(overrides(outputs, *more)))
