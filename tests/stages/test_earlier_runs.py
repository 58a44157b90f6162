"""A run made by an earlier version is found complete."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.evaluation import measures
from moduseg.stages import evaluate

ARCHIVE = Path(__file__).parents[1] / "data" / "finished_run.tar.gz"
"""`world/` (two training images, one to label) and `outputs/` with every stage of a run on it."""
OVERRIDES = (
    "proposer=superpixels",
    "proposer.max_proposals=12",
    "pseudo_masks=cam",
    "pseudo_masks.refine=region_vote",
    "backbone=miniature_random",
    "runtime.device=cpu",
    "runtime.outputs=outputs",
    "runtime.batch_size=2",
    "dataset.root=world",
    "dataset.train=2",
    "dataset.val=1",
    "retrieval.top_k=1",
    "evaluation.bootstrap=0",
    "evaluation.panels=0",
    "evaluation.report=false",
    "evaluation.boundary_width=0",
)
SCORE_FILES = ("results.json", "results.md", "confusion.safetensors", "manifest.json")
LATER_MEASURES = ("mean_accuracy", "mean_dice")
STAGES = {"propose", "fit", "scores", "pseudo_masks", "build_bank", "queries", "infer", "evaluate"}


def test_an_earlier_run_is_found_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key, manifest and record is read as it was written: no file is added, removed or written again."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    # Results without a measure are scored again, so the table is that of the earlier version.
    earlier = tuple(measure for measure in measures.MEASURES if measure.name not in LATER_MEASURES)
    monkeypatch.setattr(measures, "MEASURES", earlier)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    assert {p.parent.name for p in (tmp_path / "outputs").glob("*/*/*-*")} == STAGES

    folder = evaluate.run(compose(OVERRIDES))

    assert folder.resolve() in {p.parent for p in before}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.is_file()} == before


def test_an_earlier_run_gets_later_measures_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are written again; proposals, scores, label maps, vectors and the bank are not touched."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.name not in SCORE_FILES}

    folder = evaluate.run(compose(OVERRIDES))

    record = json.loads((folder / "results.json").read_text())
    assert record["prediction"]["mean_dice"] is not None
    assert record["pseudo_masks"]["mean_accuracy"] is not None
    assert {p: p.stat().st_mtime_ns for p in kept if p.is_file()} == {p: kept[p] for p in kept if p.is_file()}
    assert {p.parent.name for p in (tmp_path / "outputs").glob("*/*/*-*")} == STAGES
