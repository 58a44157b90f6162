"""What is read of finished stages: time, provenance, failures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moduseg.errors import ArtefactError, DataError
from moduseg.files import write_json
from moduseg.pipeline.manifests import (
    StageFolder,
    count_failures,
    stage_seconds,
    steps_by_folder,
    stored_name,
    wall_seconds,
)
from moduseg.studies.reproduce import work_seconds

STEPS = {"load": 3.0, "work": 8.0, "model": 6.0, "write": 1.0, "wall": 10.0}


def write_stage(outputs: Path, name: str, inputs: dict[str, Path] | None = None, **fields: Any) -> Path:
    """Write the manifest of a stage, `<stage>/<folder>`, and return its folder."""
    stage = name.split("/")[0]
    named = {key: str(path) for key, path in (inputs or {}).items()}
    path = outputs / "d" / name
    write_json(path / "manifest.json", {"stage": stage, "status": "complete", "inputs": named, **fields})
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an `infer` run: queries and a bank, each made from proposals of its own split."""

    def on(split: str) -> dict[str, Any]:
        return {"parts": {"dataset": {"split": split}}, "seconds": STEPS}

    outputs = tmp_path / "outputs"
    train, val = (write_stage(outputs, f"propose/sam-{s}", **on(s)) for s in ("train", "val"))
    masks = write_stage(outputs, "pseudo_masks/clip-train", {"propose": train}, seconds={"load": 1.0, "work": 2.0})
    bank = write_stage(outputs, "build_bank/vit-train", {"pseudo_masks": masks, "propose": train}, **on("train"))
    queries = write_stage(outputs, "queries/vit-val", {"propose": val}, **on("val"))
    inputs = {"queries": queries, "build_bank": bank}
    return write_stage(outputs, "infer/vit-val", inputs, failures=3, **on("val"))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(STEPS, 10.0, id="the parts of wall are not added to it"),
        pytest.param({"load": 1.0, "work": 2.0}, 3.0, id="an old manifest without wall"),
        pytest.param({"add": 4.0}, 4.0, id="a derived bank"),
        pytest.param({}, 0.0, id="nothing was timed"),
    ],
)
def test_wall_is_the_time_of_a_stage(steps: dict[str, float], expected: float) -> None:
    assert wall_seconds(steps) == expected


def test_tables_and_reports_count_each_folder_once(run: Path) -> None:
    """Five folders with 10 seconds on the clock, whatever their parts add up to, and an old one with 3."""
    assert work_seconds(run) == pytest.approx(53.0)
    assert sum(seconds for _, seconds in stage_seconds(run)) == pytest.approx(53.0)
    assert stage_seconds(run)[0] == ("propose (train)", 10.0)


def test_a_fit_is_listed_before_its_scores(tmp_path: Path) -> None:
    on_train: dict[str, Any] = {"parts": {"dataset": {"split": "train"}}, "seconds": STEPS}
    scores = write_stage(tmp_path, "scores/cam-train", fit_seconds={"wall": 50.0, "cpu": 40.0}, **on_train)
    assert stage_seconds(scores) == [("fit (train)", 50.0), ("scores (train)", 10.0)]


def test_provenance_is_in_the_order_of_the_data(run: Path) -> None:
    names = [f"{folder.stage}/{folder.name}" for folder in StageFolder(run).provenance()]
    assert names == [
        "propose/sam-train",
        "pseudo_masks/clip-train",
        "build_bank/vit-train",
        "propose/sam-val",
        "queries/vit-val",
        "infer/vit-val",
    ]
    assert list(steps_by_folder(run)) == names


def test_the_nearest_proposals_are_those_of_the_labelled_split(run: Path) -> None:
    nearest = {stage: path.name for stage, path in StageFolder(run).nearest_inputs().items()}
    assert nearest == {
        "queries": "vit-val",
        "propose": "sam-val",
        "build_bank": "vit-train",
        "pseudo_masks": "clip-train",
    }


def test_folders_that_moved_together_are_found(run: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "outputs", tmp_path / "moved")
    moved = tmp_path / "moved" / "d" / "infer" / "vit-val"
    assert len(StageFolder(moved).provenance()) == 6
    shutil.rmtree(tmp_path / "moved" / "d" / "queries")
    assert [folder.name for folder in StageFolder(moved).inputs.values()] == ["vit-train"]


def test_failures_are_counted_and_read(run: Path) -> None:
    assert count_failures(run) == 3
    assert StageFolder(run).failures == {}
    (run / "failures.jsonl").write_text('{"id": "a/b", "error": "truncated"}\n')
    assert StageFolder(run).failures == {"a/b": "truncated"}


def test_a_folder_without_manifest_has_no_past(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "bank")
    assert (folder.stage, folder.seconds, folder.inputs, folder.num_failures) == (tmp_path.name, 0.0, {}, 0)
    assert steps_by_folder(folder.path) == {}


def test_a_damaged_manifest_is_one_line(run: Path) -> None:
    (run / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"manifest\.json: not readable as JSON"):
        count_failures(run)


def test_an_id_cannot_leave_the_folder(run: Path) -> None:
    assert StageFolder(run).file("vectors", "a/b") == run / "vectors" / "a" / "b.safetensors"
    with pytest.raises(DataError, match="expected a relative path inside the folder"):
        stored_name("label_map", "../a")
    with pytest.raises(DataError, match=r"maps/a\.safetensors\.z: no such file; run scripts/pseudo_masks\.py again"):
        StageFolder(run).scores("a")
