"""Figures over worlds, letters of rows that do not differ, and points of the figure."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from moduseg.evaluation.counts import ImageCounts, SplitCounts
from moduseg.evaluation.measures import mean_iou
from moduseg.studies.costs import LabellingCost
from moduseg.studies.method_results import ScoredWorld, compare_rows, give_letters, list_points, summarise


def world(share: float, images: int = 40, seed: int = 0, *, first: int = 0) -> ScoredWorld:
    """A world of two labels in which about `share` of the pixels of each image are right."""
    rng = np.random.default_rng(seed)
    counts = SplitCounts(2)
    for index in range(first, first + images):
        right = rng.binomial(100, share, 2)
        counts.append(f"i{index}", ImageCounts(np.array([[right[0], 100 - right[0]], [100 - right[1], right[1]]])))
    cost = LabellingCost({"wall": 2.0, "cpu": 1.0, "memory": 3.0}, {"wall": 8.0, "cpu": 4.0, "memory": None})
    return ScoredWorld(Path("x"), "val", counts, True, 50.0 + seed, None, cost, 5)


def draw_pairs(names: list[str], seed: int) -> set[frozenset[str]]:
    rng = np.random.default_rng(seed)
    return {frozenset(pair) for pair in itertools.combinations(names, 2) if rng.random() < 0.5}


@pytest.mark.parametrize("seed", range(12))
def test_two_rows_share_a_letter_if_they_do_not_differ(seed: int) -> None:
    names = list("pqrstu")
    different = draw_pairs(names, seed)
    letters = give_letters(names, different)
    for a, b in itertools.combinations(names, 2):
        assert set(letters[a]).isdisjoint(letters[b]) == (frozenset((a, b)) in different)
    assert "a" in letters["p"]
    assert all(letters.values())


@pytest.mark.parametrize(("different", "expected"), [
    pytest.param(set(), ["a", "a", "a"], id="none differ"),
    pytest.param({frozenset("xz")}, ["a", "ab", "b"], id="the ends differ"),
    pytest.param({frozenset("xy"), frozenset("xz"), frozenset("yz")}, ["a", "b", "c"], id="all differ"),
])  # fmt: skip
def test_letters(different: set[frozenset[str]], expected: list[str]) -> None:
    assert list(give_letters(["x", "y", "z"], different).values()) == expected


def test_far_rows_differ_and_near_ones_do_not() -> None:
    scored = {
        ("good", "masks"): [world(0.9, seed=1)],
        ("as good", "masks"): [world(0.9, seed=2)],
        ("bad", "masks"): [world(0.6, seed=3)],
        ("bad", "student"): [world(0.9, seed=4)],
    }
    found = compare_rows(scored, ["masks", "student"], 200, 0)
    letters = {method: found.alike[method, "masks"] for method in ("good", "as good", "bad")}
    assert letters == {"good": "a", "as good": "a", "bad": "b"}
    assert found.gains["bad", "student"]["is_certain"]
    assert found.gains["bad", "student"]["low"] > 0
    assert list(found.gains) == [("bad", "student")]
    # Three pairs share 5 %, one gain has them alone.
    assert found.confidence == {"methods": pytest.approx(1 - 0.05 / 3), "forms": pytest.approx(0.95)}
    assert {frozenset((d["first"], d["second"])) for d in found.differences if d["is_certain"]} == {
        frozenset(("good", "bad")), frozenset(("as good", "bad")),
    }  # fmt: skip


def test_rows_are_paired_on_the_images_that_both_have() -> None:
    scored = {("a", "masks"): [world(0.9)], ("b", "masks"): [world(0.9, first=10)]}
    (entry,) = compare_rows(scored, ["masks"], 100, 0).differences
    first, second = (scored[name, "masks"][0].counts.label_counts() for name in ("a", "b"))
    expected = float(mean_iou(second[:30].sum(0))) - float(mean_iou(first[10:].sum(0)))
    assert expected != 0
    assert entry["difference"] == pytest.approx(expected)


@pytest.mark.parametrize("second", [
    pytest.param([world(0.9), world(0.9)], id="more worlds"),
    pytest.param([world(0.9, first=100)], id="no image in common"),
])  # fmt: skip
def test_what_cannot_be_paired_is_not_compared(second: list[ScoredWorld]) -> None:
    scored = {("a", "masks"): [world(0.9)], ("b", "masks"): second}
    assert compare_rows(scored, ["masks"], 100, 0).differences == []


def test_without_resamples_nothing_is_compared() -> None:
    assert compare_rows({("a", "masks"): [world(0.9)]}, ["masks"], 0, 0).alike == {}
    assert summarise([world(0.9)], 0, 0)["miou_low"] is None


def test_a_row_without_results_has_no_figures() -> None:
    figures = summarise([], 100, 0)
    assert (figures["num_worlds"], figures["images"], figures["miou"], figures["cpu"]) == (0, None, None, None)


def test_costs_are_means_and_memory_the_largest() -> None:
    figures = summarise([world(0.9, seed=0), world(0.9, seed=4)], 10, 0)
    assert (figures["wall"], figures["cpu"], figures["memory"]) == (2.0, 1.0, 3.0)
    assert (figures["preparation_cpu"], figures["preparation_memory"]) == (4.0, None)
    assert figures["spread"] == pytest.approx(np.std([50.0, 54.0], ddof=1))
    assert figures["images"] == 80


def test_points_are_rows_with_a_time() -> None:
    row = {"method": "m", "form": "f", "miou": 50.0, "miou_low": 40.0, "miou_high": 60.0, "cpu": 0.5}
    row |= {"wall": 2.0, "needs_tags": True}
    lacking = {**row, "miou": None}
    (point,) = list_points({"time": "cpu", "rows": [row, lacking, {**row, "cpu": None}]})
    assert (point.seconds, point.miou, point.low, point.high, point.is_told_tags) == (0.5, 50.0, 40.0, 60.0, True)
