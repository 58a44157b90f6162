"""What the page computes in the browser is what the evaluation computed, to the pixel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.measures import iou, read_path
from moduseg.masks.palette import choose_class_colours
from moduseg.miniature.world.scenes import CLASSES
from moduseg.report.page import read_program, read_script
from tests.support.browser import WatchedPage


def test_scores_of_images_are_those_of_the_evaluation(opened: Any, index: Path, run: Path) -> None:
    counts = SplitCounts.from_bytes((run / FILE).read_bytes(), "counts")
    expected = []
    for image in counts.label_counts():
        each = iou(image)
        wrong = 100 * (1 - image[0].sum() / image[1].sum())
        expected.append([float(np.nanmean(each)), float(wrong)])
    page = WatchedPage(opened).open(index)
    assert page.evaluate("Report.scores.all().map(s => [s.miou, s.wrong])") == pytest.approx(np.array(expected))
    page.close()


@pytest.mark.parametrize(
    ("background", "ignored", "expected"),
    [
        # truth x prediction of 3 labels: 1 right 6, 1 uncovered 2, 2 as 1 1, 2 right 3
        (True, False, (40.0, {0: 0.0, 1: 100 * 6 / 9, 2: 75.0})),
        (False, False, (None, {1: 100 * 6 / 9, 2: 75.0})),
        (False, True, (None, {1: 100 * 6 / 7, 2: 75.0})),
    ],
)
def test_scores_without_background(
    opened: Any, index: Path, background: bool, ignored: bool, expected: tuple[Any, dict[int, float]]
) -> None:
    matrix = np.array([[0, 0, 0], [2, 6, 0], [0, 1, 3]])
    page = WatchedPage(opened).open(index)
    found = page.evaluate(
        """([cells, counts, background, ignored]) => {
            Report.receive("summary", {...Report.get("summary"), classes: ["a", "b", "c"],
                has_background: background, ignore_uncovered: ignored});
            const score = Report.scores.ofImage([cells, counts]);
            return [...score.labels].map(([label, value]) => [label, value.iou]);
        }""",
        [np.flatnonzero(matrix).tolist(), matrix.ravel()[matrix.ravel() > 0].tolist(), background, ignored],
    )
    each = iou(label_counts(matrix, background, "ignore" if ignored else "wrong"))
    assert dict(map(tuple, found)) == pytest.approx({i: v for i, v in enumerate(each) if not np.isnan(v)})
    assert dict(map(tuple, found)) == pytest.approx(expected[1])
    page.close()


def test_labels_and_errors_are_painted_to_the_pixel(opened: Any, index: Path, run: Path) -> None:
    """The canvas of the viewer holds the colours of the stored label map, and of its errors."""
    page = WatchedPage(opened).open(index, "#/images/image/3")
    page.wait_for_selector(".layers button")
    labels = np.asarray(Image.open(run / "labels" / "val_00003.png"))
    read = """() => { const c = document.querySelector('.image-canvas canvas.layer');
        return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""
    height, width, data = page.evaluate(read)
    assert (height, width) == labels.shape
    painted = np.array(data, np.uint8).reshape(height, width, 4)
    palette = choose_class_colours(CLASSES)
    padded = np.pad(labels, 1, mode="edge")
    beside = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    is_inner = (labels > 0) & np.all([labels == other for other in beside], axis=0)
    is_edge = (labels > 0) & ~is_inner
    np.testing.assert_array_equal(painted[is_inner][:, :3], palette[labels[is_inner]])
    darker = np.floor(0.45 * palette[labels[is_edge]].astype(float))
    np.testing.assert_array_equal(painted[is_edge][:, :3], darker)
    assert (painted[labels == 0][:, 3] < 200).all()
    page.keyboard.press("5")
    assert page.locator(".layers [aria-checked=true]").inner_text() == "errors"
    _, _, data = page.evaluate(read)
    colours = {tuple(c[:3]) for c in np.array(data, np.uint8).reshape(-1, 4).tolist()}
    assert len(colours) <= 6
    page.close()


def test_the_program_names_no_address() -> None:
    for name, content in read_program().items():
        assert not re.search(rb"https?:|//[a-z0-9-]+\.[a-z]|@import|XMLHttpRequest|WebSocket|\bfetch\(", content), name


def test_the_page_loads_every_script_once() -> None:
    """`index.html` names each script of the program, and none that is not there."""
    files = read_program()
    loaded = re.findall(r'src="app/([^"]+)"', files["index.html"].decode())
    assert sorted(loaded) == sorted(name for name in files if name.endswith(".js"))


def test_scripts_have_short_lines() -> None:
    for name, content in read_program().items():
        if name.endswith(".js"):
            assert max(map(len, content.decode().splitlines())) <= 120, name


def test_the_page_shows_every_measure_of_its_data(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index)
    texts = page.evaluate(
        """() => {
            const summary = Report.get("summary");
            const unknown = { name: "new.figure", title: "a new figure", unit: "px", decimals: 2 };
            const each = { ...unknown, name: "new.each", title: "a new figure of classes", is_per_class: true };
            const values = Object.fromEntries(summary.classes.map((name, label) => [name, label / 8]));
            Report.receive("summary", { ...summary, measures: [...summary.measures, unknown, each],
                record: { ...summary.record, new: { figure: 1.375, each: values } } });
            return ["overview", "classes"].map((view) => Report.views[view].render(new URLSearchParams()).textContent);
        }"""
    )
    summary = read_script(index.parent / "data" / "summary.js")
    for measure in summary["measures"]:
        value = read_path(summary["record"], measure["name"].split("."))
        if value is not None and measure["name"] != "miou":
            shown = measure["title"] if measure["is_per_class"] else f"{measure['title']}{value:.1f} %"
            assert shown in texts[measure["is_per_class"]]
    assert "a new figure1.38 px" in texts[0]
    assert "a new figure of classes" in texts[1]
    page.close()
