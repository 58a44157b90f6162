"""From tagged images to labelled pixels, on a tiny world."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg import Segmenter
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.errors import ArtefactError, DataError, MissingError
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.measures import mean_iou
from moduseg.masks.palette import voc_palette
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.stages import evaluate
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from tests.support.processes import start
from tests.support.runs import ORACLES, overrides, result_bytes

STAGES = ("propose", "scores", "pseudo_masks", "build_bank", "queries", "infer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an undisturbed run."""
    outputs = tmp_path_factory.mktemp("finished")
    Infer.run(compose(overrides(outputs, train=12, val=8)))
    return outputs


def stage_folder(outputs: Path, stage: str, contains: str = "") -> Path:
    return next(p for p in sorted((outputs / "miniature" / stage).iterdir()) if contains in p.name)


def test_what_a_run_leaves_behind(finished: Path) -> None:
    folder = stage_folder(finished, "infer")
    results = json.loads((folder / "results.json").read_text())
    confusion = np.array(results["confusion"])
    assert results["images"] == 8
    assert results["split"] == "val"
    assert results["miou"] == pytest.approx(float(mean_iou(label_counts(confusion))))
    assert set(results["iou"]) == set(results["classes"])
    assert results["seconds"].keys() >= {"propose", "queries", "build_bank", "infer"}
    assert results["label_source"] == "json"
    assert "mIoU" in (folder / "results.md").read_text()
    assert len(list((folder / "panels").iterdir())) == 2

    labels = Image.open(next((folder / "labels").iterdir()))
    assert labels.mode == "P"
    palette = labels.getpalette()
    assert palette is not None
    assert palette[: 3 * 13] == voc_palette(13).ravel().tolist()
    assert np.asarray(labels).max() <= 12

    bank = Bank.load(stage_folder(finished, "build_bank"))
    assert bank.pooled.shape[1] == 128
    assert bank.counts["background"] == 12


def test_oracles_find_what_random_features_can(finished: Path) -> None:
    """True masks with the features of a random network: far above chance, whatever the features are worth."""
    results = json.loads((stage_folder(finished, "infer") / "results.json").read_text())
    assert results["pixel_accuracy"] > 70
    masks = json.loads((stage_folder(finished, "pseudo_masks") / "results.json").read_text())
    assert masks["miou"] == pytest.approx(100.0)


def test_a_second_run_does_nothing_and_a_fresh_one_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in (finished / "miniature").rglob("*") if p.is_file()}
    Infer.run(compose(overrides(finished, train=12, val=8)))
    assert {p: p.stat().st_mtime_ns for p in (finished / "miniature").rglob("*") if p.is_file()} == stamps

    Infer.run(compose(overrides(tmp_path, train=12, val=8)))
    expected, got = result_bytes(finished), result_bytes(tmp_path)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []


def test_killed_in_every_stage_it_goes_on_and_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """SIGKILL once in each stage, as soon as its first batches are done; what was done is not done again."""
    arguments = overrides(tmp_path, train=12, val=8)
    killed = []
    kept: dict[Path, int] = {}
    for stage in STAGES:
        run = start("infer", arguments, tmp_path / "log")
        while run.is_alive() and len(list(tmp_path.glob(f"miniature/{stage}/*/batches/00000*.json"))) < 2:
            time.sleep(0.001)
        if run.is_alive():
            run.kill()
            killed.append(stage)
        run.join()
        records = {p: p.stat().st_mtime_ns for p in tmp_path.glob("miniature/*/*/batches/*.json")}
        assert {p: records[p] for p in kept} == kept
        kept = records
    assert killed, "no run was caught alive"
    Infer.run(compose(arguments))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert result_bytes(tmp_path) == result_bytes(finished)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_broken_image_is_recorded_and_the_run_goes_on(tmp_path: Path, finished: Path) -> None:
    arguments = overrides(tmp_path, train=12, val=8)
    Propose.run(compose(arguments), split="val")
    folder = tmp_path / "world-12-8" / "JPEGImages"
    intact = {name: (folder / name).read_bytes() for name in ("train_00003.png", "val_00005.png")}
    for name, content in intact.items():
        (folder / name).write_bytes(content[: len(content) // 2])

    path = Infer.run(compose(arguments))
    assert not (path / "labels" / "val_00005.png").exists()
    assert json.loads((path / "failures.jsonl").read_text())["id"] == "val_00005"
    results = json.loads((path / "results.json").read_text())
    assert (results["images"], results["left_out"]) == (7, ["val_00005"])
    assert count_failures(path) >= 2
    assert len(set(Bank.load(stage_folder(tmp_path, "build_bank")).image_index.tolist())) == 11

    command = "import sys; from moduseg.cli import run_script; run_script('infer')"
    run = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "left out" in run.stderr

    for name, content in intact.items():
        (folder / name).write_bytes(content)
    path = Infer.run(compose(arguments))
    assert count_failures(path) == 0
    expected = {k.split("/")[-1]: v for k, v in result_bytes(finished).items() if "/infer/" in k and "labels" in k}
    assert {p.name: p.read_bytes() for p in (path / "labels").iterdir()} == expected


@pytest.mark.parametrize("stage", ["propose", "scores", "pseudo_masks", "build_bank", "queries", "infer"])
def test_a_file_truncated_between_runs_is_made_again(tmp_path: Path, finished: Path, stage: str) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    target = next(
        p
        for kind in ("masks", "maps", "labels", "vectors")
        for p in sorted(stage_folder(tmp_path / "copy", stage).glob(f"{kind}/*"))
    )
    whole = target.read_bytes()
    target.write_bytes(whole[:7])
    Infer.run(compose(overrides(tmp_path / "copy", train=12, val=8, world=finished)))
    assert target.read_bytes() == whole
    assert result_bytes(tmp_path / "copy") == result_bytes(finished)


@pytest.mark.parametrize("stage", ["propose", "scores", "pseudo_masks", "build_bank", "queries", "infer"])
def test_a_manifest_truncated_between_runs_is_made_again(tmp_path: Path, finished: Path, stage: str) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    cfg = compose(overrides(tmp_path / "copy", "runtime.verify=true", train=12, val=8, world=finished))
    for path in (tmp_path / "copy" / "miniature" / stage).glob("*/manifest.json"):
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(ArtefactError, match="not readable as JSON"):
            _ = StageFolder(path.parent).manifest
    assert Infer.run(cfg).name == stage_folder(finished, "infer").name
    assert StageFolder(stage_folder(tmp_path / "copy", stage)).is_complete
    assert result_bytes(tmp_path / "copy") == result_bytes(finished)


def test_a_damaged_bank_is_merged_again(tmp_path: Path, finished: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    bank = stage_folder(tmp_path / "copy", "build_bank") / "bank.safetensors"
    whole = bank.read_bytes()
    bank.write_bytes(whole[:-3] + b"xyz")
    BuildBank.run(compose(overrides(tmp_path / "copy", train=12, val=8, world=finished)))
    assert bank.read_bytes() == whole


@pytest.mark.parametrize(
    ("more", "stage", "changes"),
    [
        (["retrieval.top_k=3"], "build_bank", False),
        (["retrieval.top_k=3"], "infer", True),
        (["bank.outliers.enabled=false"], "build_bank", False),
        (["bank.outliers.enabled=false"], "infer", True),
        (["bank.purify.enabled=false"], "build_bank", True),
        (["pseudo_masks.background.rule=probability"], "scores", False),
        (["pseudo_masks.background.rule=probability"], "pseudo_masks", True),
        (["pseudo_masks.refine=par"], "scores", False),
        (["pseudo_masks.refine=par"], "build_bank", True),
        (["pseudo_masks.iterations=3"], "pseudo_masks", False),
        (["bank.purify.enabled=false"], "queries", False),
        (["bank.aggregation=hard"], "queries", True),
        (["bank.centre=true"], "queries", False),
        (["runtime.batch_size=4"], "infer", False),
    ],
)
def test_only_what_changes_is_made_anew(
    more: list[str], stage: str, changes: bool, finished: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    Infer.run(compose(overrides(tmp_path / "copy", *more, train=12, val=8, world=finished)))
    assert len(list((tmp_path / "copy" / "miniature" / stage).iterdir())) == (2 if changes else 1)


def test_evaluate_gathers_the_figures(tmp_path: Path) -> None:
    path = evaluate.run(compose(overrides(tmp_path)))
    results = json.loads((path / "results.json").read_text())
    assert results["pseudo_masks"]["miou"] == pytest.approx(100.0)
    assert results["proposals"]["recall"] == pytest.approx(100.0)
    assert results["prediction"]["images"] == 4
    assert "recall of" in (path / "results.md").read_text()


def test_a_bank_of_another_backbone_or_class_list_is_refused(finished: Path) -> None:
    bank = Bank.load(stage_folder(finished, "build_bank"))
    with pytest.raises(ArtefactError, match=r"made with backbone weights .*expected other.*build a bank with this one"):
        bank.check_fits("other", 128, bank.classes)
    with pytest.raises(ArtefactError, match=r"made for 13 classes .*expected 2"):
        bank.check_fits(str(bank.info["backbone_digest"]), 128, ("background", "dog"))


def test_a_bank_smaller_than_k_warns_and_uses_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moduseg"):
        Infer.run(compose(overrides(tmp_path, "retrieval.top_k=500", train=2, val=1)))
    assert "fewer than retrieval.top_k=500" in caplog.text
    assert "no vector for" in caplog.text


def test_missing_folders_and_permissions_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere"):
        Infer.run(compose([*ORACLES, "dataset=voc", f"dataset.root={tmp_path}/nowhere", f"runtime.outputs={tmp_path}"]))


def test_the_api_predicts_what_the_stages_predict(finished: Path) -> None:
    """The oracle proposer needs the truth, so the API is asked with superpixels, and compared with the same run."""
    arguments = overrides(finished, "proposer=superpixels", train=12, val=8)
    path = Infer.run(compose(arguments))
    cfg = compose(arguments)
    segmenter = Segmenter.from_bank(BuildBank.run(cfg), device="cpu", overrides={"proposer": cfg.proposer})
    photograph = finished / "world-12-8" / "JPEGImages" / "val_00002.png"
    prediction = segmenter.predict(photograph)
    stored = np.asarray(Image.open(path / "labels" / "val_00002.png"))
    assert np.array_equal(prediction.label_map, stored)
    assert prediction.neighbours.shape == prediction.similarities.shape
    entry = segmenter.describe(int(prediction.neighbours[0, 0]))
    assert entry["label"] in segmenter.classes
    assert entry["image"].startswith("train_")
    assert np.array_equal(segmenter.predict(np.asarray(Image.open(photograph).convert("RGB"))).label_map, stored)
    with pytest.raises(DataError, match=r"missing\.png"):
        segmenter.predict("missing.png")
    with pytest.raises(ArtefactError, match=r"no bank\.json.*build_bank"):
        Segmenter.from_bank(finished)


def test_ones_own_images_without_truth_get_labels_and_panels(finished: Path, tmp_path: Path) -> None:
    """A folder of tagged images, one of them nested: no ground truth, no scores, but pictures to look at."""
    import shutil

    world, own = finished / "world-12-8", tmp_path / "own"
    (own / "images" / "trip").mkdir(parents=True)
    for index in range(4):
        name = f"train_{index:05d}.png"
        shutil.copy(world / "JPEGImages" / name, own / "images" / ("trip" if index % 2 else "") / name)
    shutil.copy(world / "classes.txt", own / "classes.txt")
    tags = {e["img_id"]: e["labels"] for e in json.loads((world / "image_labels.json").read_text())["images"]}
    names = (own / "classes.txt").read_text().split("\n")
    rows = [
        f"{'trip/' if i % 2 else ''}train_{i:05d}.png," + ";".join(names[t] for t in tags[f"train_{i:05d}"])
        for i in range(4)
    ]
    (own / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    own_data = [
        "dataset=folder",
        f"dataset.root={own}",
        f"runtime.outputs={tmp_path}",
        "runtime.device=cpu",
        "evaluation.panels=2",
    ]
    path = Infer.run(compose(own_data))
    assert sorted(p.name for p in path.glob("labels/**/*.png")) == [f"train_{i:05d}.png" for i in range(4)]
    assert (path / "labels" / "trip" / "train_00001.png").is_file()
    assert len(list(path.glob("panels/**/*.png"))) == 2
    assert not (path / "results.json").exists()
    assert Infer.run(compose([*own_data, "evaluation.panels=3"])) == path
    assert len(list(path.glob("panels/**/*.png"))) == 3
    with pytest.raises(DataError, match=r"got no ground truth"):
        evaluate.run(compose(own_data))
