"""Comparison of two runs over the same images: differences class by class, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moduseg.errors import DataError
from moduseg.evaluation.bootstrap import PairedInterval, paired_bootstrap, paired_bootstrap_of_classes
from moduseg.evaluation.confusion import Uncovered
from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.measures import Measure, format_value, iou, single_measures, to_json
from moduseg.evaluation.tables import markdown_table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class CompareSettings:
    """How two runs are compared.

    Attributes:
        resamples: number of draws of the images; both runs see the same.
        seed: of the draws.
        has_background, uncovered: see `label_counts`.
    """

    resamples: int = 1000
    seed: int = 42
    has_background: bool = True
    uncovered: Uncovered = "wrong"


def compare(
    first: SplitCounts,
    second: SplitCounts,
    classes: Sequence[str],
    *,
    names: tuple[str, str],
    settings: CompareSettings | None = None,
) -> dict[str, Any]:
    """Return the differences `second - first` in percent points, with paired intervals over images scored by both.

    Args:
        first, second: counts of the two runs.
        classes: `S` names, background first.
        names: what the runs are called.
        settings: the defaults if omitted.

    Returns:
        A dictionary fit for JSON: `measures` (name -> entry, for each measure with one value for a split that counts
        the same true pixels in both; those of contours only if both counted them, at one width) and `classes` (name ->
        entry of the IoU). An entry holds `first`, `second`, `difference`, `low`, `high` (ends of the 95 % interval),
        `share_flipped` (share of the draws in which the difference has the other sign, ties counting half; `None` where
        there is no difference), those of classes also `images`, in whose truth they are. `miou`,
        `miou_classes_in_truth` and `boundary_miou` (`None` without contours) repeat three of `measures`.

    Raises:
        DataError: no image in common, or scored against different truths.
        ValueError: counts of other labels than `classes`.
    """
    if {first.num_labels, second.num_labels} != {len(classes)}:
        raise ValueError(
            f"counts: got {first.num_labels} and {second.num_labels} labels, expected {len(classes)} as class names"
        )
    settings = settings or CompareSettings()
    left, right = _select_common(first, second, names)
    counts = [side.label_counts(settings.has_background, settings.uncovered) for side in (left, right)]
    _check_truth(counts, left.ids, names)
    measured = _measure_entries(left, right, settings)
    return {
        "first": names[0],
        "second": names[1],
        "unit": "percent points",
        "images": len(left),
        "left_out": sorted(set(first.ids) ^ set(second.ids)),
        "resamples": settings.resamples,
        "seed": settings.seed,
        "confidence": CONFIDENCE,
        "miou": measured["miou"],
        "miou_classes_in_truth": measured["miou_classes_in_truth"],
        "boundary_miou": measured.get("boundary_iou.miou"),
        "measures": measured,
        "classes": _class_entries(counts, classes, settings),
    }


def compare_markdown(record: Mapping[str, Any]) -> str:
    """Return a record of `compare` as Markdown: the measures of the split, then a row for each class."""
    first, second = record["first"], record["second"]
    head = (
        f"**{second} against {first}**: {record['images']} images, percent, difference in percent points, "
        f"{100 * record['confidence']:g} % interval and share of flipped signs over {record['resamples']} paired "
        "resamples of the images."
    )
    if record["left_out"]:
        head += f" Left out, scored by one alone: {len(record['left_out'])}."
    rows = [
        (measure.label(measure.title), *_cells(record["measures"][measure.name], measure.decimals), record["images"])
        for measure in single_measures()
        if measure.name in record["measures"]
    ]
    rows += [(name, *_cells(entry), entry["images"]) for name, entry in record["classes"].items()]
    header = ("", first, second, "difference", "low", "high", "flipped", "images")
    return f"{head}\n\n{markdown_table(header, rows)}"


def _select_common(first: SplitCounts, second: SplitCounts, names: tuple[str, str]) -> tuple[SplitCounts, SplitCounts]:
    """Return the counts of the images that both runs scored, in the first one's order."""
    scored = set(second.ids)
    common_ids = [image_id for image_id in first.ids if image_id in scored]
    if not common_ids:
        raise DataError(
            f"compare: {names[0]} and {names[1]} have no image in common, expected two runs over the same split; score "
            "both on one"
        )
    return first.select(common_ids), second.select(common_ids)


def _check_truth(counts: Sequence[np.ndarray], image_ids: Sequence[str], names: tuple[str, str]) -> None:
    """Check that both runs were scored against the same truth."""
    differs = (counts[0][:, 1] != counts[1][:, 1]).any(1)
    if differs.any():
        raise DataError(
            f"compare: image {image_ids[int(differs.argmax())]!r} has another truth in {names[0]} than in {names[1]}, "
            "expected the same; score both against the same label maps"
        )


def _class_entries(
    counts: Sequence[np.ndarray], classes: Sequence[str], settings: CompareSettings
) -> dict[str, dict[str, float | None]]:
    intervals = paired_bootstrap_of_classes(
        counts[0], counts[1], settings.resamples, confidence=CONFIDENCE, seed=settings.seed
    )
    first, second = (iou(side.sum(0)).tolist() for side in counts)
    num_images = (counts[0][:, 1] > 0).sum(0).tolist()
    return {
        name: {**_entry(first[i], second[i], intervals[i]), "images": num_images[i]} for i, name in enumerate(classes)
    }


def _measure_entries(
    left: SplitCounts, right: SplitCounts, settings: CompareSettings
) -> dict[str, dict[str, float | None]]:
    """Return the entry of each measure that counts the same true pixels in both runs."""
    has_contours = left.has_boundary and right.has_boundary and left.widths == right.widths
    by_count: dict[Any, list[Measure]] = {}
    for measure in single_measures():
        by_count.setdefault(measure.counts, []).append(measure)
    entries = {}
    for count, measures in by_count.items():
        first, second = (
            side.counts_of(count, settings.has_background, settings.uncovered, has_contours=has_contours)
            for side in (left, right)
        )
        # Where uncovered pixels are ignored, the pixels that count depend on the run, and draws would not be paired.
        if first is None or second is None or not np.array_equal(first[:, 1], second[:, 1]):
            continue
        for measure in measures:
            interval = paired_bootstrap(
                first, second, settings.resamples, confidence=CONFIDENCE, seed=settings.seed, compute=measure.compute
            )
            before, after = (float(measure.compute(side.sum(0))) for side in (first, second))
            entries[measure.name] = _entry(before, after, interval)
    return entries


def _entry(first: float, second: float, interval: PairedInterval) -> dict[str, float | None]:
    return {
        "first": to_json(first),
        "second": to_json(second),
        "difference": to_json(interval.value),
        "low": to_json(interval.low),
        "high": to_json(interval.high),
        "share_flipped": interval.share_flipped,
    }


def _cells(entry: Mapping[str, Any], decimals: int = 1) -> list[str]:
    values = [format_value(entry[key], decimals=decimals) for key in ("first", "second")]
    changes = [format_value(entry[key], "+", decimals) for key in ("difference", "low", "high")]
    flipped = entry["share_flipped"]
    return [*values, *changes, "-" if flipped is None else f"{100 * flipped:.1f} %"]
