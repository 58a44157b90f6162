"""A run made by an earlier version is found complete."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from moduseg.config import compose
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
STAGES = {"propose", "fit", "scores", "pseudo_masks", "build_bank", "queries", "infer", "evaluate"}


def test_an_earlier_run_is_found_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key, manifest and record is read as it was written: no file is added, removed or written again."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    assert {p.parent.name for p in (tmp_path / "outputs").glob("*/*/*-*")} == STAGES

    folder = evaluate.run(compose(OVERRIDES))

    assert folder.resolve() in {p.parent for p in before}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.is_file()} == before
