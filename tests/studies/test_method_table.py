"""The table of methods as a configuration: its rows compose, and overrides reach the rows that have their keys."""

from __future__ import annotations

from typing import Any

import pytest

from moduseg.config import compose
from moduseg.config.construct import construct
from moduseg.errors import ConfigError
from moduseg.studies.method_table import DATASETS, Form, Method, MethodTable, load_method_table, select_fitting

HOUSE = (
    "CAM", "SCLIP", "NACLIP", "CorrCLIP", "DiffSegmenter", "iSeg", "token masking", "MCTformer+", "entropy fusion",
)  # fmt: skip


@pytest.fixture(scope="module")
def table() -> MethodTable:
    return load_method_table("default")


def test_every_data_set_has_every_method(table: MethodTable) -> None:
    assert [table.names(dataset) for dataset in DATASETS] == [list(HOUSE)] * 3
    assert list(table.forms) == ["masks", "region vote", "retrieval", "student"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_row_composes(table: MethodTable, dataset: str) -> None:
    """Masks are not refined, the others are; a student is there where one is trained."""
    for method in table.names(dataset):
        masks, student = (compose(table.list_overrides(method, form, dataset)) for form in ("masks", "student"))
        assert (masks.pseudo_masks.refine, student.pseudo_masks.refine) == ("none", "region_vote")
        assert masks.pseudo_masks.generator == student.pseudo_masks.generator
        assert masks.student is None
        assert student.student is not None
        assert student.student.labels == "pseudo_masks"


def test_banks_and_students_are_made_of_the_masks_after_the_vote(table: MethodTable) -> None:
    overrides = [table.list_overrides("CAM", form, "miniature") for form in ("region vote", "retrieval", "student")]
    assert all("pseudo_masks.refine=region_vote" in each for each in overrides)


@pytest.mark.parametrize(("method", "form", "dataset", "expected"), [
    pytest.param("iSeg", "masks", "miniature", 75.2, id="of VOC beside the miniature's"),
    pytest.param("iSeg", "masks", "coco", 45.5, id="of COCO"),
    pytest.param("iSeg", "retrieval", "voc", None, id="a form without one"),
    pytest.param("SCLIP", "masks", "voc", 59.1, id="words alone"),
    pytest.param("SCLIP", "masks", "coco", 30.5, id="words alone on COCO-Object"),
    pytest.param("CorrCLIP", "retrieval", "voc", 86.3, id="the paper"),
    pytest.param("token masking", "student", "voc", 72.7, id="a student"),
    pytest.param("token masking", "student", "coco", None, id="none on COCO"),
    pytest.param("CAM", "masks", "voc", None, id="none at all"),
])  # fmt: skip
def test_published_figures(table: MethodTable, method: str, form: str, dataset: str, expected: float | None) -> None:
    published = table.methods[method].find_published(form, dataset)
    assert (published.value if published else None) == expected


@pytest.mark.parametrize(("form", "method", "override", "reaches"), [
    pytest.param("student", "CAM", "student.training.steps=7", True, id="a student's key"),
    pytest.param("masks", "CAM", "student.training.steps=7", False, id="a student's key without a student"),
    pytest.param("masks", "CAM", "student=linear", False, id="a student where none is trained"),
    pytest.param("student", "CAM", "student=linear", True, id="another student"),
    pytest.param("masks", "MCTformer+", "pseudo_masks.generator.training.steps=7", True, id="a generator's key"),
    pytest.param("masks", "CAM", "pseudo_masks.generator.training.steps=7", False, id="a key that it does not have"),
    pytest.param("masks", "CAM", "retrieval.top_k=7", True, id="a key that all have"),
])  # fmt: skip
def test_overrides_reach_rows_with_a_place_for_them(
    table: MethodTable, form: str, method: str, override: str, reaches: bool
) -> None:
    cfg = compose(table.list_overrides(method, form, "miniature"))
    fitting = select_fitting([override], cfg)
    assert fitting == [override] * reaches
    compose(table.list_overrides(method, form, "miniature", fitting))


def test_what_a_row_is_about_stays(table: MethodTable) -> None:
    """The user replaces the student and sizes, not the form nor the world."""
    user = ["student=linear", "dataset.train=9", "pseudo_masks.refine=pamr", "dataset.seed=77"]
    overrides = table.list_overrides("CAM", "student", "miniature", user, world=2)
    assert {"student=linear", "dataset.train=9", "pseudo_masks.refine=region_vote", "dataset.seed=2"} <= set(overrides)
    assert len({override.partition("=")[0] for override in overrides}) == len(overrides)


MASKS = {"masks": Form("pseudo_masks")}


@pytest.mark.parametrize(("changes", "message"), [
    pytest.param({"methods": {}}, "got an empty one", id="no method"),
    pytest.param({"worlds": [1, 1]}, "worlds: got", id="a world twice"),
    pytest.param({"base": {"context": []}}, "base: got 'context'", id="unknown data set"),
    pytest.param(
        {"methods": {"a": Method(published={"vote": ["iSeg", "iSeg", "train"]})}}, "methods.a.published.vote", id="form"
    ),
    pytest.param(
        {"methods": {"a": Method(published={"masks": ["iSeg", "nobody", "train"]})}}, "no paper's table", id="figure"
    ),
])  # fmt: skip
def test_mistakes_in_the_file(changes: dict[str, Any], message: str) -> None:
    content = {"title": "t", "forms": MASKS, "methods": {"a": Method()}, **changes}
    with pytest.raises(ConfigError, match=message):
        construct(MethodTable, content, "table t")
