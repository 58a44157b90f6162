"""The page of the table of all methods, in a real browser, opened from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moduseg.report.methods_page import write_methods_page
from moduseg.report.quality_time import Point, draw_quality_time
from tests.support.browser import WatchedPage


def row(method: str, form: str, miou: float | None, **fields: Any) -> dict[str, Any]:
    """A row of the record; one without mIoU is missing."""
    gain = {"difference": 3.0, "low": 1.0, "high": 5.0, "is_certain": True} if form == "student" and miou else None
    plain = {
        "method": method, "form": form, "status": "missing" if miou is None else "done", "miou": miou,
        "miou_low": None if miou is None else miou - 4, "miou_high": None if miou is None else miou + 4, "alike": "a",
        "gain": gain, "boundary_miou": 20.0, "train_miou": None, "wall": 0.5, "cpu": 0.25, "memory": 1.0,
        "preparation_cpu": 120.0, "num_parameters": 3_200_000, "needs_tags": form == "masks", "published": None,
        "images": 6, "missing": ["weights: got none, expected a file"] if miou is None else [], "errors": [],
        "command": "python scripts/infer.py",
    }  # fmt: skip
    return plain | fields


@pytest.fixture(scope="module")
def page_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "default-12345678"
    differences = [
        {"form": "masks", "first": "low", "second": "high", "difference": 20.0, "low": 12.0, "high": 28.0,
         "is_certain": True},
    ]  # fmt: skip
    rows = [row("low", "masks", 50.0), row("high", "masks", 70.0), row("low", "student", 53.0)]
    record = {
        "title": "Side by side.", "dataset": "miniature", "split": "val", "worlds": [0, 2], "notes": ["A note."],
        "forms": ["masks", "student"], "methods": ["low", "high"], "confidence": {"methods": 0.95, "forms": 0.95},
        "differences": differences, "rows": [*rows, row("high", "student", None)],
    }  # fmt: skip
    figure = draw_quality_time([Point("low", "masks", 0.25, 50.0)], "t", "s")["svg"]
    for name in ("table.csv", "table.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    return write_methods_page(folder, record, figure)


def read_column(page: Any, number: int) -> list[str]:
    cells = page.locator(f"table.methods:not(.matrix) tbody td:nth-child({number})")
    return [str(text) for text in cells.all_inner_texts()]


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_the_page_opens_from_disk(opened: Any, page_index: Path, width: int, theme: str) -> None:
    watched = WatchedPage(opened, width, 850, theme)
    page = watched.open(page_index)
    page.wait_for_timeout(250)
    assert (watched.errors, watched.outside) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#tabs a").all_inner_texts() == ["Methods"]
    assert page.evaluate("document.querySelector('.figure-picture').naturalWidth") > 100
    page.close()


def test_rows_are_sorted_by_a_click_and_chosen_by_their_form(opened: Any, page_index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(page_index)
    assert read_column(page, 3) == ["50.0", "70.0", "53.0", "missing"]
    page.get_by_role("button", name="mIoU").click()
    assert read_column(page, 3) == ["70.0", "53.0", "50.0", "missing"]
    page.get_by_role("button", name="mIoU").click()
    assert read_column(page, 3) == ["50.0", "53.0", "70.0", "missing"]
    page.get_by_role("radio", name="student").click()
    assert read_column(page, 1) == ["low", "high"]
    assert read_column(page, 5) == ["+3.0", "–"]
    assert "form=student" in page.url
    page.go_back()
    assert len(read_column(page, 1)) == 4
    assert watched.errors == []
    page.close()


def test_the_page_says_which_methods_differ_and_what_is_missing(opened: Any, page_index: Path) -> None:
    page = WatchedPage(opened).open(page_index)
    matrix = page.locator("table.matrix tbody tr").all_inner_texts()
    assert [" ".join(line.split()) for line in matrix] == ["high +20.0", "low −20.0"]
    assert "weights: got none, expected a file" in page.locator("dd").all_inner_texts()
    page.close()
