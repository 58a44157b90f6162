"""Class tokens in the pipeline: one training for all runs that agree, the classifier's figures, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from moduseg.report.page import read_script
from moduseg.stages import evaluate
from moduseg.stages.class_scores import CLASSIFIER, ClassScores
from moduseg.stages.infer import Infer
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.studies.ablate import read_figure
from moduseg.training.books import CHECKPOINT, LOG, read_table
from tests.support.processes import run_two_ranks
from tests.support.runs import overrides, result_bytes
from tests.support.tiny_class_tokens import TINY_CLASS_TOKENS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("class_tokens")


def fits(outputs: Path) -> list[Path]:
    return sorted((outputs / "miniature" / "fit").iterdir())


def test_a_run_has_the_figures_of_its_classifier(outputs: Path) -> None:
    folder = evaluate.run(compose(overrides(outputs, *TINY_CLASS_TOKENS)))
    (fit,) = fits(outputs)
    record = json.loads((folder / "results.json").read_text())
    stored = json.loads((fit / CLASSIFIER).read_text())
    assert {name: record["classifier"][name] for name in ("train", "open_heads")} == stored
    assert record["classifier"]["train"]["num_images"] == 6
    assert record["classifier"]["val"]["num_images"] == 4
    value = read_figure(record, "classifier mAP")
    assert value is not None
    assert 0 < value <= 100
    assert read_figure(record, "open heads") == 100.0
    lines = (folder / "results.md").read_text().splitlines()
    (row,) = [line for line in lines if "classifier, evaluated split" in line]
    assert f" {value:.1f} |" in row


def test_another_evaluated_split_has_its_own_figures(outputs: Path) -> None:
    """Runs that share the fit do not share how the classifier names the classes of other images."""
    before = fits(outputs)
    counts = []
    for num_images in (4, 6):
        folder = evaluate.run(compose(overrides(outputs, *TINY_CLASS_TOKENS, val=num_images)))
        counts.append(json.loads((folder / "results.json").read_text())["classifier"]["val"]["num_images"])
    assert (counts, fits(outputs)) == ([4, 6], before)


def test_the_report_shows_training_and_heads(outputs: Path) -> None:
    folder = Infer.run(compose(overrides(outputs, *TINY_CLASS_TOKENS, "evaluation.report=true")))
    summary = read_script(folder / "report" / "data" / "summary.js")
    titles = [title for title, _ in summary["fit"]]
    (fit,) = fits(outputs)
    drawn = sorted(int(path.stem.removeprefix("heads_")) for path in (fit / "figures").iterdir())
    present = set(Workspace(compose(overrides(outputs))).dataset("train").load("train_00000").labels or ())
    assert present <= set(drawn)
    assert titles == ["training", *(f"heads of {summary['classes'][label]}" for label in drawn)]
    for _, path in summary["fit"]:
        assert (folder / "report" / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("pseudo_masks.background.value=3.0", id="another background"),
        pytest.param("pseudo_masks.generator.training.save_minutes=1", id="checkpoints more often"),
        pytest.param("pseudo_masks.generator.training.workers=2", id="threads"),
    ],
)
def test_runs_share_a_fit(outputs: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ClassScores.run(compose(overrides(outputs, *TINY_CLASS_TOKENS)))
    before = [fit.name for fit in fits(outputs)]

    def refuse(*_: object, **__: object) -> None:
        raise LookupError("trained again")

    monkeypatch.setattr("moduseg.pseudo_masks.class_tokens.fit", refuse)
    PseudoMasks.run(compose(overrides(outputs, *TINY_CLASS_TOKENS, change)))
    assert [fit.name for fit in fits(outputs)] == before


def test_other_settings_are_another_fit(outputs: Path) -> None:
    before = len(fits(outputs))
    ClassScores.run(compose(overrides(outputs, *TINY_CLASS_TOKENS, "pseudo_masks.generator.mask_rate=0")))
    assert len(fits(outputs)) == before + 1


def test_a_resumed_fit_has_the_seconds_of_all_its_lives(tmp_path: Path) -> None:
    """The process died when the training was done and before its result was stored."""
    arguments = overrides(tmp_path, *TINY_CLASS_TOKENS)
    ClassScores.run(compose(arguments))
    (fit,) = fits(tmp_path)
    (checkpoint,) = fit.glob(f"training-*/{CHECKPOINT}")
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "seconds": 1000.0}, checkpoint)
    for name in ("manifest.json", "fit.safetensors"):
        (fit / name).unlink()
    ClassScores.run(compose(arguments))
    assert json.loads((fit / "manifest.json").read_text())["seconds"]["wall"] == 1000.0


def test_processes_of_torchrun_train_together(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, *TINY_CLASS_TOKENS)
    run_two_ranks(ROOT / "scripts" / "pseudo_masks.py", arguments, tmp_path / "output.txt")
    results = result_bytes(tmp_path)
    assert sum("fit.safetensors" in name for name in results) == 1
    assert sum("labels/" in name for name in results) == 6
    # The seconds of the fit are those of the training, though rank 0 found it finished when it stored it.
    (fit,) = fits(tmp_path)
    (training,) = fit.glob(f"training-*/{LOG}")
    assert json.loads((fit / "manifest.json").read_text())["seconds"]["wall"] > read_table(training)[-1]["seconds"]
