"""Label maps tidied for people: specks, holes and ragged outlines."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from moduseg.masks.tidy import close_holes, remove_small_objects, smooth_outlines, tidy_label_map


def draw(*rows: str) -> np.ndarray:
    """A label map from digits: `.` is background, `?` unknown (255)."""
    values = {".": 0, "?": 255}
    return np.array([[values.get(c, int(c) if c.isdigit() else 0) for c in row] for row in rows], dtype=np.uint8)


@pytest.mark.parametrize(
    ("before", "min_area", "after"),
    [
        pytest.param(["1..22", "...22", "...22"], 2, ["...22", "...22", "...22"], id="a speck on the background"),
        pytest.param(["22222", "22122", "22222"], 2, ["22222"] * 3, id="a speck on a class"),
        pytest.param(["11...", "11...", "....."], 4, ["11...", "11...", "....."], id="just large enough"),
        pytest.param(["1....", ".1...", "..1.."], 3, ["1....", ".1...", "..1.."], id="joined at corners"),
        pytest.param(["221..", "221..", "221.."], 4, ["22..."] * 3, id="as long a side: the smaller label"),
        pytest.param(["2213.", "2213.", "22..."], 3, ["222..", "222..", "22..."], id="two beside each other"),
        pytest.param(["2222222", "2222222", "2213122", "2222222"], 2, ["2222222"] * 4, id="three in a row"),
        pytest.param(["?????", "??1??", "?????"], 2, ["?????"] * 3, id="a speck on the unknown"),
        pytest.param(["..?..", "....."], 2, ["..?..", "....."], id="the unknown is no object"),
        pytest.param(["12", "34"], 5, ["..", ".."], id="nothing but specks"),
        pytest.param(["111", "121", "111"], 100, ["...", "...", "..."], id="all too small"),
    ],
)  # fmt: skip
def test_small_objects_join_what_is_around_them(before: list[str], min_area: int, after: list[str]) -> None:
    assert remove_small_objects(draw(*before), min_area).tolist() == draw(*after).tolist()


def test_an_object_within_small_objects_waits_for_them() -> None:
    """The dot touches nothing but the ring of small objects around it, which join the 5 first."""
    before = draw("5555555", "5511255", "5519255", "5511255", "5555555")
    assert (remove_small_objects(before, 6) == 5).all()


@pytest.mark.parametrize(
    ("before", "max_area", "after"),
    [
        pytest.param(["11111", "1..11", "11111"], 2, ["11111", "11111", "11111"], id="a hole"),
        pytest.param(["11111", "1..11", "11111"], 1, ["11111", "1..11", "11111"], id="too large"),
        pytest.param(["11111", "..111", "11111"], 9, ["11111", "..111", "11111"], id="open to the border"),
        pytest.param(["1111", "1.11", "11.1", "1111"], 1, ["1111", "1111", "1111", "1111"], id="corners do not join"),
        pytest.param(["11222", "1..22", "11222"], 9, ["11222", "11122", "11222"], id="between two alike: the smaller"),
        pytest.param(["12222", "1..22", "12222"], 9, ["12222"] * 3, id="between two: the longer side"),
        pytest.param(["11111", "13311", "11111"], 9, ["11111", "13311", "11111"], id="another class is no hole"),
        pytest.param(["11111", "1??11", "11111"], 9, ["11111", "1??11", "11111"], id="the unknown is no hole"),
        pytest.param(["....", "...."], 9, ["....", "...."], id="no object"),
    ],
)  # fmt: skip
def test_holes_get_the_label_around_them(before: list[str], max_area: int, after: list[str]) -> None:
    assert close_holes(draw(*before), max_area).tolist() == draw(*after).tolist()


@pytest.mark.parametrize(
    ("before", "radius", "after"),
    [
        pytest.param([".....", "..1..", "....."], 1, [".....", ".....", "....."], id="a speck goes"),
        pytest.param(["11111", "11.11", "11111"], 1, ["11111", "11111", "11111"], id="a dent is filled"),
        pytest.param(["11222", "11222", "11222"], 1, ["11222", "11222", "11222"], id="a straight outline stays"),
        pytest.param(["11111", "11111", "..1..", ".....", "....."], 1, ["11111", "11111", ".....", ".....", "....."],
                     id="a tooth is cut"),
        pytest.param(["1.", ".1"], 1, [".1", "1."], id="each pixel outvoted at the border"),
        pytest.param(["12", "34"], 1, ["12", "34"], id="all alike: one's own"),
    ],
)  # fmt: skip
def test_outlines_are_smoothed(before: list[str], radius: int, after: list[str]) -> None:
    assert smooth_outlines(draw(*before), radius).tolist() == draw(*after).tolist()


@pytest.mark.parametrize("radius", [1, 2, 6, 15])
def test_smoothed_as_pixel_by_pixel(radius: int, rng: np.random.Generator) -> None:
    label_map = rng.choice(np.array([0, 3, 7, 255], dtype=np.uint8), (21, 26))
    expected = np.zeros_like(label_map)
    rows, columns = np.indices(label_map.shape)
    for y, x in np.ndindex(*label_map.shape):
        near = label_map[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2]
        counts = np.bincount(near, minlength=256).astype(float)
        counts[label_map[y, x]] += 0.5
        expected[y, x] = counts.argmax()
    assert np.array_equal(smooth_outlines(label_map, radius), expected)


def test_nothing_small_is_left(rng: np.random.Generator) -> None:
    """On noise: no object under the limit, no small hole, and a second time changes nothing."""
    for _ in range(5):
        noise = rng.choice(np.array([0, 0, 1, 2], dtype=np.uint8), (40, 50))
        tidy = remove_small_objects(close_holes(noise, 12), 12)
        for label in (1, 2):
            areas = cv2.connectedComponentsWithStats((tidy == label).astype(np.uint8), connectivity=8)[2][1:, 4]
            assert (areas >= 12).all()
        assert np.array_equal(remove_small_objects(tidy, 12), tidy)


def test_steps_follow_each_other() -> None:
    """An object that is large enough with its hole closed stays, and nothing asked for changes nothing."""
    ring = draw(".....", ".111.", ".1.1.", ".111.", ".....")
    assert (tidy_label_map(ring, min_object_area=9, max_hole_area=1)[1:4, 1:4] == 1).all()
    assert not tidy_label_map(ring, min_object_area=9).any()
    assert tidy_label_map(ring) is ring
    assert tidy_label_map(ring, min_object_area=8, max_hole_area=1, smoothing_radius=1).dtype == np.uint8


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 9), (300, 400)])
def test_any_size(shape: tuple[int, int], rng: np.random.Generator) -> None:
    label_map = rng.integers(0, 3, shape).astype(np.uint8)
    assert tidy_label_map(label_map, min_object_area=5, max_hole_area=5, smoothing_radius=3).shape == shape


def test_memory_on_noise_is_that_of_pixels() -> None:
    """A hole for every other pixel: their labels are counted as they occur, not in a table of holes by labels."""
    noise = np.ones((600, 600), dtype=np.uint8)
    noise[1:-1:2, 1:-1:2] = 0
    for label_map, tidy in ((noise, close_holes), (1 - noise, remove_small_objects)):
        tracemalloc.start()
        tidied = tidy(label_map, 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tidied == (label_map[0, 0])).all()
        assert peak < 100 * label_map.size
