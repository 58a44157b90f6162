from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest

from moduseg.datasets.classes import COCO_STUFF_CLASSES, VOC_CLASSES
from moduseg.datasets.colours import find_class_colours
from moduseg.datasets.labels import read_class_colours, read_classes
from moduseg.errors import ConfigError
from moduseg.masks.palette import (
    choose_class_colours,
    format_colour,
    parse_colour,
    simulate_deficiencies,
    to_oklab,
    voc_palette,
)
from moduseg.miniature.world.scenes import CLASSES


def measure_smallest_distance(points: np.ndarray) -> float:
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float(distances[np.triu_indices(len(points), 1)].min())


@pytest.mark.parametrize(
    ("hue", "degrees"),
    [("red", 0), ("yellow", 55), ("green", 125), ("cyan", 190), ("blue", 235), ("magenta", 305)],
)
def test_miniature_classes_have_the_hue_of_their_name(hue: str, degrees: float) -> None:
    palette = choose_class_colours(CLASSES)
    labels = [label for label, name in enumerate(CLASSES) if name.startswith(hue)]
    assert len(labels) == 2
    for label in labels:
        seen = 360 * colorsys.rgb_to_hsv(*(palette[label] / 255))[0]
        assert abs((seen - degrees + 180) % 360 - 180) < 32
    assert measure_smallest_distance(to_oklab(palette[labels])) > 0.1


def test_voc_is_shown_in_the_colours_of_its_files() -> None:
    assert np.array_equal(find_class_colours(VOC_CLASSES), voc_palette())
    own = find_class_colours((*VOC_CLASSES, "kite"), {"kite": "#123456"})
    assert np.array_equal(own[:21], voc_palette(21))
    assert format_colour(own[21]) == "#123456"
    assert not np.array_equal(find_class_colours(VOC_CLASSES, scheme="distinct"), voc_palette())


@pytest.mark.parametrize("scheme", ["auto", "distinct", "colour_blind"])
def test_appended_classes_leave_colours_as_they_are(scheme: str) -> None:
    few, many = (choose_class_colours(COCO_STUFF_CLASSES[:n], scheme=scheme) for n in (20, 172))
    assert np.array_equal(few[:20], many[:20])
    assert len(np.unique(many[1:172], axis=0)) == 171
    assert np.array_equal(few[[0, 255]], voc_palette()[[0, 255]])


def test_distinct_colours_are_far_apart() -> None:
    names = ("background", *"abcdefghijklmnopqrst")
    distinct = to_oklab(choose_class_colours(names)[1:21])
    assert measure_smallest_distance(distinct) > 2 * measure_smallest_distance(to_oklab(voc_palette()[1:21]))


def test_colour_blind_palette_differs_without_any_cone() -> None:
    names = ("background", *"abcdefghijkl")
    safe, usual = (
        simulate_deficiencies(choose_class_colours(names, scheme=scheme)[1:13]) for scheme in ("colour_blind", "auto")
    )
    assert min(map(measure_smallest_distance, safe)) > 0.09
    assert min(map(measure_smallest_distance, safe)) > 2 * min(map(measure_smallest_distance, usual))


def test_class_lists_name_colours(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("background\ngrey cat  #FF8000\nno 5 #5\nsofa\n")
    assert read_classes(path) == ("background", "grey cat", "no 5 #5", "sofa")
    assert read_class_colours(path) == {"grey cat": "#ff8000"}
    palette = choose_class_colours(read_classes(path), read_class_colours(path))
    assert tuple(palette[1]) == (255, 128, 0)
    # The others keep off it, and off one another.
    assert measure_smallest_distance(to_oklab(palette[1:4])) > 0.2


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"colours: got 'rainbow', expected one of auto, voc"):
        choose_class_colours(CLASSES, scheme="rainbow")
    with pytest.raises(ValueError, match=r"got 'orange', expected #rrggbb"):
        parse_colour("orange")
