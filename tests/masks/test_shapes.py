"""Shapes in numbers: by hand, and the same wherever a mask lies."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from moduseg.masks.shapes import SHAPES, describe_shapes


def draw(kind: str, size: int = 96, radius: int = 20, at: tuple[int, int] = (40, 44)) -> np.ndarray:
    """A disc, ring, square or cross, `[size, size]` bool."""
    canvas = np.zeros((size, size), np.uint8)
    x, y = at
    if kind in ("disc", "ring"):
        cv2.circle(canvas, at, radius, 1, -1)
    if kind == "ring":
        cv2.circle(canvas, at, radius // 2, 0, -1)
    if kind == "square":
        canvas[y - radius : y + radius, x - radius : x + radius] = 1
    if kind == "cross":
        canvas[y - radius : y + radius, x - radius // 4 : x + radius // 4] = 1
        canvas[y - radius // 4 : y + radius // 4, x - radius : x + radius] = 1
    return canvas.astype(bool)


def column(masks: list[np.ndarray], name: str) -> list[float]:
    return [float(value) for value in describe_shapes(np.stack(masks))[:, SHAPES.index(name)]]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        pytest.param("area", "square", float(np.log(1600 / 96**2)), id="share of the image"),
        pytest.param("perimeter", "square", 4.0, id="four sides"),
        pytest.param("solidity", "square", 1.0, id="a square is its own hull"),
        pytest.param("hole", "square", 0.0, id="no hole"),
        pytest.param("centre", "square", 1.0, id="the centre is inside"),
        pytest.param("centre", "ring", 0.0, id="the centre of a ring is outside"),
        pytest.param("frame", "square", 0.0, id="away from the border"),
    ],
)
def test_by_hand(name: str, kind: str, expected: float) -> None:
    assert column([draw(kind)], name) == pytest.approx([expected])


def test_a_ring_has_a_hole_and_a_cross_has_arms() -> None:
    masks = [draw(kind) for kind in ("disc", "ring", "cross")]
    disc, ring, cross = column(masks, "hole")
    assert (disc, cross) == (0, 0)
    assert ring == pytest.approx(0.25, abs=0.05)
    fourth = column(masks, "harmonic_4")
    assert fourth[2] > 5 * max(fourth[:2])
    assert column(masks, "solidity")[2] < 0.7


@pytest.mark.parametrize("kind", ["disc", "ring", "square", "cross"])
def test_a_shape_does_not_depend_on_its_place_and_size(kind: str) -> None:
    here, there = describe_shapes(np.stack([draw(kind), draw(kind, at=(60, 30))]))
    np.testing.assert_allclose(here, there, atol=1e-9)
    double = describe_shapes(draw(kind, 192, 40, (80, 88))[None])[0]
    rest = [i for i, name in enumerate(SHAPES) if not name.startswith("moment")]
    np.testing.assert_allclose(here[rest], double[rest], atol=0.2)


def test_masks_at_the_border_touch_the_frame() -> None:
    mask = np.zeros((20, 20), bool)
    mask[:10, 5:15] = True
    assert column([mask], "frame") == [1.0]


def test_odd_masks_have_finite_shapes() -> None:
    masks = np.zeros((5, 12, 9), bool)
    masks[1, 3, 4] = True
    masks[2, :, 2] = True
    masks[3] = True
    masks[4, [0, 11], [0, 8]] = True
    shapes = describe_shapes(masks)
    assert shapes.shape == (5, len(SHAPES))
    assert np.isfinite(shapes).all()
    assert not shapes[0].any()
    assert describe_shapes(masks[:0]).shape == (0, len(SHAPES))


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks: got \(2, 3\) bool, expected \[N, H, W\] bool"):
        describe_shapes(np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"masks: got \(1, 2, 3\) uint8"):
        describe_shapes(np.zeros((1, 2, 3), np.uint8))
