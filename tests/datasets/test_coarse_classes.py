"""Coarse classes of COCO-Stuff and Cityscapes, against their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moduseg.datasets.coarse_classes import (
    CITYSCAPES27_CLASSES,
    COCO_STUFF27_CLASSES,
    to_cityscapes27,
    to_coco_stuff27,
)
from moduseg.errors import LabelIdError

ALL = np.arange(182, dtype=np.uint8)[None]


def test_every_id_of_coco_stuff_has_one_of_27_classes() -> None:
    classes = to_coco_stuff27(ALL)
    assert len(COCO_STUFF27_CLASSES) == 27
    assert np.unique(classes).tolist() == list(range(27))
    # Things are the first twelve classes, stuff the others.
    assert (classes[0, :91] < 12).all()
    assert (classes[0, 91:] >= 12).all()


@pytest.mark.parametrize(("ids", "name"), [
    pytest.param([0], "person", id="person"),
    pytest.param([1, 8], "vehicle", id="bicycle to boat"),
    pytest.param([15, 24], "animal", id="bird to giraffe"),
    pytest.param([71, 76], "electronic", id="tv to cell phone"),
    pytest.param([105, 156], "sky", id="clouds and sky"),
    pytest.param([154, 177], "water", id="sea and water drops"),
    pytest.param([123, 168], "plant", id="grass and tree"),
])  # fmt: skip
def test_ids_of_coco_stuff(ids: list[int], name: str) -> None:
    assert {COCO_STUFF27_CLASSES[label] for label in to_coco_stuff27(ALL)[0, ids]} == {name}


def test_ids_of_cityscapes() -> None:
    classes = to_cityscapes27(np.array([[0, 6, 7, 8, 11, 23, 33, 255]], dtype=np.uint8))
    assert classes.tolist() == [[255, 255, 0, 1, 4, 16, 26, 255]]
    assert [CITYSCAPES27_CLASSES[label] for label in (0, 1, 4, 16, 26)] == [
        "road", "sidewalk", "building", "sky", "bicycle",
    ]  # fmt: skip
    assert len(CITYSCAPES27_CLASSES) == 27


@pytest.mark.parametrize(("translate", "largest"), [
    pytest.param(to_coco_stuff27, 181, id="COCO-Stuff"),
    pytest.param(to_cityscapes27, 33, id="Cityscapes"),
])  # fmt: skip
def test_unknown_ids(translate: Callable[[np.ndarray], np.ndarray], largest: int) -> None:
    assert translate(np.full((2, 3), 255, dtype=np.uint8)).tolist() == [[255] * 3] * 2
    with pytest.raises(LabelIdError, match=f"got id {largest + 1}, expected uint8 ids 0..{largest} or 255"):
        translate(np.full((1, 1), largest + 1, dtype=np.uint8))
    with pytest.raises(LabelIdError, match="got int64"):
        translate(np.zeros((1, 1), dtype=np.int64))
