from __future__ import annotations

import io

import pytest
from PIL import Image

from moduseg.report.quality_time import Point, draw_quality_time, find_front

POINTS = [
    Point("slow", "masks", 2.0, 80.0, 75.0, 85.0, is_told_tags=True),
    Point("fast", "masks", 0.1, 60.0, 50.0, 70.0, is_told_tags=True),
    Point("fast", "student", 0.5, 55.0),
    Point("slow", "student", 2.0, 70.0),
]


def test_the_front_is_what_nothing_beats() -> None:
    assert find_front(POINTS) == [POINTS[1], POINTS[0]]
    assert find_front([]) == []


def test_the_figure_is_the_same_for_the_same_points() -> None:
    files = draw_quality_time(POINTS, "a title", "seconds")
    with Image.open(io.BytesIO(files["png"])) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    text = files["svg"].decode()
    for name in ("slow", "fast", "masks, tags given", "student", "a title", "seconds"):
        assert f">{name}<" in text
    assert files == draw_quality_time(POINTS, "a title", "seconds")
    assert files["png"] != draw_quality_time(POINTS[:3], "a title", "seconds")["png"]


def test_without_points_the_axes_are_empty() -> None:
    assert b"<svg" in draw_quality_time([], "a title", "seconds")["svg"]


def test_a_time_is_above_zero() -> None:
    with pytest.raises(ValueError, match=r"point m, f: got 0.0 seconds, expected above 0"):
        Point("m", "f", 0.0, 50.0)
