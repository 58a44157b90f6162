"""What a table of methods says of rows that lack something, and how it writes numbers."""

from __future__ import annotations

from typing import Any

import pytest

from moduseg.studies.method_markdown import format_count, make_markdown
from moduseg.studies.method_results import summarise


def row(method: str, form: str, *missing: str) -> dict[str, Any]:
    plain = {"method": method, "form": form, "status": "missing" if missing else "to do", "missing": list(missing)}
    rest = {"errors": [], "left_out": 0, "needs_tags": False, "alike": None, "gain": None, "published_source": None}
    return {**plain, **rest, "published": None, **summarise([], 0, 0)}


def problems(*rows: dict[str, Any]) -> list[str]:
    record = {"title": "t", "dataset": "voc", "split": "val", "worlds": [], "forms": ["masks", "student"], "notes": []}
    text = make_markdown({**record, "rows": rows, "confidence": {}})
    return text.partition("Missing:\n\n")[2].strip().splitlines()


@pytest.mark.parametrize(("lines", "expected"), [
    pytest.param(["x", "x", "x", "x"], "- every row: x", id="every row"),
    pytest.param(["x", "x", "", ""], "- a: x", id="every form of a method"),
    pytest.param(["", "x", "", "x"], "- every student: x", id="a form of every method"),
    pytest.param(["", "", "", "x"], "- b, student: x", id="one row"),
    pytest.param(["x", "x", "", "x"], "- a; every student: x", id="a method and a form"),
])  # fmt: skip
def test_a_line_is_said_once_with_the_rows_that_lack_it(lines: list[str], expected: str) -> None:
    keys = [("a", "masks"), ("a", "student"), ("b", "masks"), ("b", "student")]
    assert problems(*(row(*key, *filter(None, [line])) for key, line in zip(keys, lines, strict=True))) == [expected]


@pytest.mark.parametrize(("num_worlds", "expected"), [(3, "50.0"), (1, "50.0 (1 of 3 worlds)")])
def test_a_row_of_fewer_worlds_says_so(num_worlds: int, expected: str) -> None:
    """One that broke off in its second world has the figures of the first one, on other pictures than the rest."""
    broken = {**row("a", "masks"), "status": "failed", "miou": 50.0, "num_worlds": num_worlds}
    record = {"title": "t", "dataset": "miniature", "split": "val", "worlds": [0, 2, 3], "forms": ["masks"]}
    text = make_markdown({**record, "rows": [broken], "notes": [], "confidence": {}})
    assert [cell.strip() for cell in text.splitlines()[4].split("|")][3] == expected


@pytest.mark.parametrize(("number", "expected"), [(None, "-"), (0, "0"), (1677, "1,677"), (3_218_486, "3.2 M")])
def test_numbers_of_parameters(number: int | None, expected: str) -> None:
    assert format_count(number) == expected
