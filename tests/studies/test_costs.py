"""What labelling an image cost, read from manifests written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moduseg.pipeline.manifests import StageFolder
from moduseg.studies.costs import measure_costs, measure_labelling
from tests.pipeline.test_manifests import write_stage

GB = 2**30


def stage(outputs: Path, name: str, inputs: dict[str, Path] | None = None, **fields: Any) -> Path:
    """Write a stage of 10 images that took 20 s on the clock, 10 s of the CPU and 1 GB."""
    settings: dict[str, Any] = {"images": 10, "seconds": {"wall": 20.0, "cpu": 10.0}, "memory": {"process": GB}}
    return write_stage(outputs, name, inputs, **settings | fields)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The folders of a run whose masks are voted on by proposals, by stage and split."""
    train, val = (stage(tmp_path, f"propose/sam-{split}") for split in ("train", "val"))
    scores = stage(tmp_path, "scores/cam-train", memory={"process": 3 * GB, "gpu": 2 * GB})
    masks = stage(tmp_path, "pseudo_masks/cam-train", {"scores": scores, "propose": train})
    bank = stage(
        tmp_path, "build_bank/vit-train", {"pseudo_masks": masks, "propose": train}, memory={"process": 9 * GB}
    )
    queries = stage(tmp_path, "queries/vit-val", {"propose": val}, images=5)
    infer = stage(tmp_path, "infer/vit-val", {"queries": queries, "build_bank": bank}, images=5)
    inputs = {"infer": infer, "propose": val, "pseudo_masks": masks}
    return {"scores": scores, "evaluate": write_stage(tmp_path, "evaluate/vit-val", inputs)}


def test_a_mask_costs_proposals_scores_and_labels(folders: dict[str, Path]) -> None:
    assert measure_costs(folders["evaluate"])["masks"] == {"wall": 6.0, "cpu": 3.0, "memory": 3.0}


def test_a_prediction_costs_no_bank(folders: dict[str, Path]) -> None:
    """Proposals of 10 images in 20 s, queries and search of 5 in as much."""
    assert measure_costs(folders["evaluate"])["prediction"] == {"wall": 10.0, "cpu": 5.0, "memory": 1.0}


def test_a_fit_is_shared_by_its_images(folders: dict[str, Path], tmp_path: Path) -> None:
    stage(tmp_path, "scores/cam-train", fit_seconds={"wall": 50.0, "cpu": 40.0}, memory={"process": GB})
    assert measure_costs(folders["evaluate"])["masks"] == {"wall": 11.0, "cpu": 7.0, "memory": 1.0}


@pytest.mark.parametrize(("fields", "expected"), [
    pytest.param({"memory": {}}, {"wall": 6.0, "cpu": 3.0, "memory": None}, id="no peak"),
    pytest.param({"seconds": {"wall": 20.0}}, {"wall": 6.0, "cpu": None, "memory": 1.0}, id="no time of the CPU"),
    pytest.param({"fit_seconds": {}}, {"wall": None, "cpu": None, "memory": 1.0}, id="a fit that was not timed"),
])  # fmt: skip
def test_what_an_earlier_version_did_not_record_is_none(
    folders: dict[str, Path], tmp_path: Path, fields: dict[str, Any], expected: dict[str, float | None]
) -> None:
    stage(tmp_path, "scores/cam-train", **fields)
    assert measure_costs(folders["evaluate"])["masks"] == expected


def test_a_bank_made_elsewhere_has_no_masks(tmp_path: Path) -> None:
    infer = stage(tmp_path, "infer/vit-val")
    costs = measure_costs(write_stage(tmp_path, "evaluate/vit-val", {"infer": infer}))
    assert costs["masks"] == {"wall": None, "cpu": None, "memory": None}
    assert costs["prediction"] == {"wall": 2.0, "cpu": 1.0, "memory": 1.0}


def test_a_picture_costs_neither_the_fit_nor_what_was_made_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """Masks: proposals, scores and labels of 10 images in 20 s each; the fit is preparation."""
    stage(tmp_path, "scores/cam-train", fit_seconds={"wall": 50.0, "cpu": 40.0}, memory={"process": 3 * GB})
    cost = measure_labelling(tmp_path / "d" / "pseudo_masks" / "cam-train")
    assert cost.picture == {"wall": 6.0, "cpu": 3.0, "memory": 3.0}
    assert cost.preparation == {"wall": 50.0, "cpu": 40.0, "memory": None}


def test_what_a_fit_looked_at_is_preparation(folders: dict[str, Path], tmp_path: Path) -> None:
    """The proposals of train, which the generator was fitted on, are made once, whatever is labelled with it."""
    train, val = (tmp_path / "d" / "propose" / f"sam-{split}" for split in ("train", "val"))
    fit = {"wall": 50.0, "cpu": 40.0}
    scores = stage(tmp_path, "scores/cam-val", {"propose": val, "fit_propose": train}, fit_seconds=fit)
    cost = measure_labelling(stage(tmp_path, "pseudo_masks/cam-val", {"scores": scores, "propose": val}))
    assert cost.picture == {"wall": 6.0, "cpu": 3.0, "memory": 1.0}
    assert cost.preparation == {"wall": 70.0, "cpu": 50.0, "memory": 1.0}


def test_a_bank_is_preparation(folders: dict[str, Path]) -> None:
    """Proposals and scores of train, masks and bank took 20 s each."""
    infer = StageFolder(folders["evaluate"]).inputs["infer"].path
    cost = measure_labelling(infer)
    assert cost.picture == {"wall": 10.0, "cpu": 5.0, "memory": 1.0}
    assert cost.preparation == {"wall": 80.0, "cpu": 40.0, "memory": 9.0}


def test_a_ranking_that_is_learnt_is_preparation(folders: dict[str, Path], tmp_path: Path) -> None:
    """With the queries of train, which it is fitted to."""
    inputs = {name: folder.path for name, folder in StageFolder(folders["evaluate"]).inputs["infer"].inputs.items()}
    queries = stage(tmp_path, "queries/vit-train", {"propose": tmp_path / "d" / "propose" / "sam-train"})
    ranking = stage(tmp_path, "fit_ranking/vit-train", {"build_bank": inputs["build_bank"], "queries": queries})
    cost = measure_labelling(stage(tmp_path, "infer/vit-val", {**inputs, "fit_ranking": ranking}, images=5))
    assert cost.picture == {"wall": 10.0, "cpu": 5.0, "memory": 1.0}
    assert cost.preparation == {"wall": 120.0, "cpu": 60.0, "memory": 9.0}


def test_the_training_of_a_student_is_preparation(folders: dict[str, Path], tmp_path: Path) -> None:
    masks = StageFolder(folders["evaluate"]).inputs["pseudo_masks"].path
    trained = stage(tmp_path, "train_student/linear-train", {"pseudo_masks": masks}, memory={"process": 2 * GB})
    predicted = stage(tmp_path, "predict_student/linear-val", {"train_student": trained}, images=5)
    cost = measure_labelling(predicted)
    assert cost.picture == {"wall": 4.0, "cpu": 2.0, "memory": 1.0}
    assert cost.preparation == {"wall": 80.0, "cpu": 40.0, "memory": 3.0}
