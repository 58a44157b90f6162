"""Figures of a form of a method over all worlds, and which of them differ by more than chance.

Worlds are pooled: the images of all of them are scored as one set, so that intervals are over images. Differences are
paired: both rows are drawn on the same images (`moduseg.evaluation.bootstrap`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from moduseg.evaluation.bootstrap import PairedInterval, bootstrap, paired_bootstrap
from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.measures import mean_iou, to_json
from moduseg.report.quality_time import Point
from moduseg.studies.costs import LabellingCost

Key = tuple[str, str]
"""Method and form."""
CONFIDENCE = 0.95
"""Of an interval, and of all differences that are compared together."""


@dataclass(frozen=True)
class ScoredWorld:
    """What came of a form of a method on one world.

    Attributes:
        path: the folder of the label maps.
        split: what they are of.
        counts: pixels of each image.
        has_background: whether label 0 is a class.
        miou: of the world, in percent.
        train_miou: of the masks of the training images, in percent; `None` for forms that label none.
        cost: seconds and memory.
        num_parameters: how many numbers were learnt, by fits and students.
        supervision: masks that a part was trained on; `None` for none.
    """

    path: Path
    split: str
    counts: SplitCounts
    has_background: bool
    miou: float | None
    train_miou: float | None
    cost: LabellingCost
    num_parameters: int
    supervision: str | None = None


@dataclass(frozen=True)
class Comparisons:
    """Which rows differ.

    Attributes:
        alike: row -> letters; rows of a form that share none differ.
        gains: row -> difference from the same method's first form.
        differences: of each pair of methods in a form, as JSON values.
        confidence: of a single interval, by kind (`methods`, `forms`), so that all of a kind hold together.
    """

    alike: Mapping[Key, str]
    gains: Mapping[Key, dict[str, Any]]
    differences: list[dict[str, Any]]
    confidence: dict[str, float]


def summarise(worlds: Sequence[ScoredWorld], resamples: int, seed: int) -> dict[str, Any]:
    """Return the figures of a row over its worlds as JSON values, `None` for those that it does not have.

    Args:
        worlds: that it was scored on; none before its first run.
        resamples: of the intervals; 0 leaves them out.
        seed: of the draws.
    """
    labels = [world.counts.label_counts(world.has_background) for world in worlds]
    has_contours = bool(worlds) and all(world.counts.has_boundary for world in worlds)
    contours = [world.counts.boundary_counts(world.has_background) for world in worlds] if has_contours else []
    pictures = [world.cost.picture for world in worlds]
    preparations = [world.cost.preparation for world in worlds]
    supervision = dict.fromkeys(world.supervision for world in worlds if world.supervision)
    mious = [world.miou for world in worlds if world.miou is not None]
    return {
        "num_worlds": len(worlds),
        "images": sum(map(len, labels)) or None,
        **_measure("miou", labels, resamples, seed),
        **_measure("boundary_miou", contours, resamples, seed),
        "mious": [world.miou for world in worlds],
        "spread": stdev(mious) if len(mious) > 1 else None,
        "train_miou": _mean([world.train_miou for world in worlds]),
        **{name: _mean([cost[name] for cost in pictures]) for name in ("wall", "cpu")},
        "memory": _largest([cost["memory"] for cost in pictures]),
        **{f"preparation_{name}": _mean([cost[name] for cost in preparations]) for name in ("wall", "cpu")},
        "preparation_memory": _largest([cost["memory"] for cost in preparations]),
        "num_parameters": max((world.num_parameters for world in worlds), default=None),
        "supervision": "+".join(supervision) or None,
        "results": [str(world.path) for world in worlds],
    }


def compare_rows(
    scored: Mapping[Key, Sequence[ScoredWorld]], forms: Sequence[str], resamples: int, seed: int
) -> Comparisons:
    """Return which rows differ: the methods of each form, and the forms of each method from its first one.

    An interval is so wide that all those of its kind (the pairs of a form; the gains of the table) hold together with
    95 %, after Bonferroni. Rows with other worlds or without an image in common are not compared.

    Args:
        scored: of the rows that have results.
        forms: in the order of the table.
        resamples: of a difference; 0 compares nothing. At least 40 for each interval of a kind are drawn.
        seed: of the draws.
    """
    if not resamples:
        return Comparisons({}, {}, [], {})
    pairs = [
        (form, first, second)
        for form in forms
        for first, second in itertools.combinations([m for m, f in scored if f == form], 2)
    ]
    per_form = max((sum(pair[0] == form for pair in pairs) for form in forms), default=0)
    changes = [key for key in scored if key[1] != forms[0] and (key[0], forms[0]) in scored]
    levels = {"methods": 1 - (1 - CONFIDENCE) / max(per_form, 1), "forms": 1 - (1 - CONFIDENCE) / max(len(changes), 1)}
    drawn = max(resamples, 40 * max(per_form, len(changes)))
    differences, separated = [], set()
    for form, first, second in pairs:
        interval = _compare(scored[first, form], scored[second, form], drawn, seed, levels["methods"])
        if interval is not None:
            entry = _describe(interval)
            differences.append({"form": form, "first": first, "second": second, **entry})
            if entry["is_certain"]:
                separated.add((form, frozenset((first, second))))
    alike: dict[Key, str] = {}
    for form in forms:
        ranked = sorted((key for key in scored if key[1] == form), key=lambda key: -_pooled_miou(scored[key]))
        names = [method for method, _ in ranked]
        different = {pair for where, pair in separated if where == form}
        alike |= {(method, form): text for method, text in give_letters(names, different).items()}
    gains = {}
    for key in changes:
        interval = _compare(scored[key[0], forms[0]], scored[key], drawn, seed, levels["forms"])
        if interval is not None:
            gains[key] = _describe(interval)
    return Comparisons(alike, gains, differences, levels)


def give_letters(names: Sequence[str], different: set[frozenset[str]]) -> dict[str, str]:
    """Return letters for each row so that two rows share one if and only if they do not differ.

    Each letter stands for a largest set of rows no two of which differ (a maximal clique, found as by Bron and
    Kerbosch); the first letter is that of the best row.

    Args:
        names: of the rows, the best one first.
        different: pairs that differ.
    """
    alike = {a: {b for b in names if b != a and frozenset((a, b)) not in different} for a in names}
    cliques: list[list[int]] = []

    def extend(clique: list[str], candidates: set[str], excluded: set[str]) -> None:
        if not candidates and not excluded:
            cliques.append(sorted(names.index(name) for name in clique))
        for name in sorted(candidates, key=names.index):
            extend([*clique, name], candidates & alike[name], excluded & alike[name])
            candidates, excluded = candidates - {name}, excluded | {name}

    extend([], set(names), set())
    letters = dict.fromkeys(names, "")
    for index, clique in enumerate(sorted(cliques)):
        for member in clique:
            letters[names[member]] += _name_letter(index)
    return letters


def list_points(record: Mapping[str, Any]) -> list[Point]:
    """Return the points of the figure: the rows of a table's record that have a time and a quality."""
    time = record["time"]
    return [
        Point(
            row["method"],
            row["form"],
            row[time],
            row["miou"],
            row["miou_low"],
            row["miou_high"],
            is_told_tags=row["needs_tags"],
        )
        for row in record["rows"]
        if row["miou"] is not None and row[time]
    ]


def _name_letter(index: int) -> str:
    """Return `a`, `b`, ... `z`, then `a1`, `b1`, ..."""
    return chr(ord("a") + index % 26) + (str(index // 26) if index >= 26 else "")


def _measure(name: str, counts: Sequence[np.ndarray], resamples: int, seed: int) -> dict[str, float | None]:
    """Return a mean IoU of all images together, with the ends of its interval."""
    value = low = high = None
    if counts:
        pooled = np.concatenate(counts)
        value = to_json(float(mean_iou(pooled.sum(0))))
        if resamples:
            interval = bootstrap(pooled, resamples, confidence=CONFIDENCE, seed=seed)
            low, high = to_json(interval.low), to_json(interval.high)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _compare(
    first: Sequence[ScoredWorld], second: Sequence[ScoredWorld], resamples: int, seed: int, confidence: float
) -> PairedInterval | None:
    """Return the difference second minus first on the images that both have; `None` if they cannot be paired."""
    if len(first) != len(second):
        return None
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for left, right in zip(first, second, strict=True):
        scored = set(right.counts.ids)
        common = [image_id for image_id in left.counts.ids if image_id in scored]
        for side, world in zip(sides, (left, right), strict=True):
            side.append(world.counts.select(common).label_counts(world.has_background))
    pooled = [np.concatenate(side) for side in sides]
    if not len(pooled[0]) or not np.array_equal(pooled[0][:, 1], pooled[1][:, 1]):
        return None
    return paired_bootstrap(pooled[0], pooled[1], resamples, confidence=confidence, seed=seed)


def _describe(interval: PairedInterval) -> dict[str, Any]:
    return {
        "difference": to_json(interval.value),
        "low": to_json(interval.low),
        "high": to_json(interval.high),
        "is_certain": bool(interval.low > 0 or interval.high < 0),
    }


def _pooled_miou(worlds: Sequence[ScoredWorld]) -> float:
    counts = np.concatenate([world.counts.label_counts(world.has_background) for world in worlds])
    return float(mean_iou(counts.sum(0)))


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return mean(measured) if measured else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
