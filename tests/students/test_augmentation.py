"""Random squares of training images: image, label map and weights stay together."""

from __future__ import annotations

import numpy as np
import pytest

from moduseg.structures import IGNORE_INDEX
from moduseg.students.augmentation import Augmentation, crop_randomly
from moduseg.students.base import LabelledImage


def make_item(height: int, width: int) -> LabelledImage:
    """An image whose red channel, label map and weights are all the same picture of steps of ten columns."""
    columns = np.broadcast_to((np.arange(width) // 10 % 20 + 1).astype(np.uint8), (height, width))
    image = np.stack([columns] * 3, axis=2).copy()
    return LabelledImage(image, columns.copy(), columns.copy())


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        pytest.param((100, 120), 64, id="larger image"),
        pytest.param((40, 50), 64, id="smaller image"),
        pytest.param((40, 200), 64, id="flat image"),
    ],
)
def test_image_labels_and_weights_stay_together(size: tuple[int, int], crop: int) -> None:
    settings = Augmentation(crop=crop, min_scale=1.0, max_scale=1.0)
    for seed in range(20):
        square = crop_randomly(make_item(*size), settings, np.random.default_rng(seed))
        assert square.weights is not None
        inside = square.label_map != IGNORE_INDEX
        assert (square.image[..., 0][inside] == square.label_map[inside]).all()
        assert (square.weights[inside] == square.label_map[inside]).all()
        assert not square.image[~inside].any()
        assert not square.weights[~inside].any()
        assert inside.sum() == min(size[0], crop) * min(size[1], crop)


def test_equal_generators_give_equal_squares() -> None:
    settings = Augmentation(crop=64, brightness=0.3)
    first, second, other = (crop_randomly(make_item(90, 120), settings, np.random.default_rng(s)) for s in (3, 3, 4))
    assert (first.image == second.image).all()
    assert (first.label_map == second.label_map).all()
    assert (first.image != other.image).any()


def test_scales_stay_in_their_range() -> None:
    settings = Augmentation(crop=64, min_scale=0.5, max_scale=0.5, mirror=False)
    square = crop_randomly(make_item(100, 120), settings, np.random.default_rng(0))
    # 120 columns in steps of 10 become 60 columns in steps of 5.
    inside = square.label_map[(square.label_map != IGNORE_INDEX).any(1)][0]
    assert (inside != IGNORE_INDEX).sum() == 60
    assert (np.diff(np.flatnonzero(np.diff(inside[inside != IGNORE_INDEX].astype(int)))) == 5).all()


@pytest.mark.parametrize("scale", [1 / 3, 5 / 9, 11 / 9])
def test_labels_lie_where_the_image_shows_them(scale: float) -> None:
    """The crop of a mirrored picture is the mirrored crop: no resizing moves label map or weights to one side."""
    columns = np.broadcast_to(np.arange(90, dtype=np.uint8), (64, 90))
    item = LabelledImage(np.stack([columns] * 3, axis=2), columns.copy(), columns.copy())
    mirrored = LabelledImage(*(np.ascontiguousarray(a[:, ::-1]) for a in (item.image, item.label_map, item.weights)))
    side = round(90 * scale)
    settings = Augmentation(crop=192, min_scale=scale, max_scale=scale, mirror=False)
    for seed in range(3):
        first, second = (crop_randomly(i, settings, np.random.default_rng(seed)) for i in (item, mirrored))
        inside = (first.label_map != IGNORE_INDEX).any(0)
        assert inside.sum() == side
        assert (first.label_map[:, inside] == second.label_map[:, inside][:, ::-1]).all()
        assert (first.weights[:, inside] == second.weights[:, inside][:, ::-1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"crop": 100}, "crop: got 100, expected a multiple of 32", id="crop"),
        pytest.param({"min_scale": 2.0, "max_scale": 1.0}, "min_scale, max_scale: got 2.0, 1.0", id="scales"),
        pytest.param({"brightness": 1.0}, "brightness: got 1.0", id="brightness"),
    ],
)
def test_mistakes_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)  # type: ignore[arg-type]
