"""The one table of measures: how each is named, computed and written; every report iterates over it.

A measure is computed from pixel counts of each label, `[..., 3, S]`: correct, in the truth, predicted (see
`moduseg.evaluation.confusion.label_counts`). Values are in percent, NaN where there is nothing to measure.

A new measure is one function and one entry of `MEASURES`: results.json, the Markdown tables, the comparison of two runs
and the report show it; the studies show those with one value for a split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moduseg.evaluation.confusion import Uncovered, label_counts

Compute = Callable[[np.ndarray], np.ndarray]
"""`[..., 3, S]` pixel counts -> `[...]`, or `[..., S]` for a measure of each class, float64 in percent."""


def iou(counts: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each label, `[..., S]`; NaN for labels in neither truth nor prediction."""
    correct, in_truth, predicted = _split(counts)
    return _percent(correct, in_truth + predicted - correct)


def dice(counts: np.ndarray) -> np.ndarray:
    """Return the Dice coefficient (F1) of each label, `[..., S]`; NaN for labels in neither truth nor prediction."""
    correct, in_truth, predicted = _split(counts)
    return _percent(2 * correct, in_truth + predicted)


def precision(counts: np.ndarray) -> np.ndarray:
    """Return the share of each label's predicted pixels that are correct, `[..., S]`; NaN where none is predicted."""
    correct, _, predicted = _split(counts)
    return _percent(correct, predicted)


def recall(counts: np.ndarray) -> np.ndarray:
    """Return the share of each label's true pixels that are correct (its accuracy), `[..., S]`; NaN without any."""
    correct, in_truth, _ = _split(counts)
    return _percent(correct, in_truth)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the labels in truth or prediction, `[...]`; labels in neither never count as 0."""
    return _mean(iou(counts))


def mean_iou_in_truth(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the labels in the truth, `[...]`."""
    return _mean(np.where(_split(counts)[1] > 0, iou(counts), np.nan))


def mean_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the mean of the labels' recall over the labels in the truth, `[...]`."""
    return _mean(recall(counts))


def mean_dice(counts: np.ndarray) -> np.ndarray:
    """Return the mean Dice coefficient over the labels in truth or prediction, `[...]`."""
    return _mean(dice(counts))


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of the true pixels that are correct, `[...]`."""
    correct, in_truth, _ = _split(counts)
    return _percent(correct.sum(-1), in_truth.sum(-1))


def frequency_weighted_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU with each label weighted by its share of the true pixels, `[...]`."""
    in_truth = _split(counts)[1]
    total = in_truth.sum(-1, keepdims=True)
    weighted = (in_truth / np.maximum(total, 1) * np.nan_to_num(iou(counts))).sum(-1)
    return np.where(total[..., 0] > 0, weighted, np.nan)


def uncovered_share(counts: np.ndarray) -> np.ndarray:
    """Return the share of the true pixels that are predicted as no label, `[...]`, where label 0 is no class."""
    _, in_truth, predicted = _split(counts)
    total = in_truth.sum(-1)
    return _percent(total - predicted.sum(-1), total)


@dataclass(frozen=True)
class LabelMapCounts:
    """Pixel counts of a split, from which its measures are computed; or of several images, along a first axis.

    Attributes:
        confusion: `[..., S, S]` integers, rows truth.
        contours: `[..., 3, S]` int64 of `boundary_counts`; `None` where contours were not counted.
        has_background, uncovered: see `label_counts`.
    """

    confusion: np.ndarray
    contours: np.ndarray | None = None
    has_background: bool = True
    uncovered: Uncovered = "wrong"


def count_labels(counts: LabelMapCounts) -> np.ndarray:
    """Return the pixels of each label, `[..., 3, S]`, with uncovered pixels treated as `counts` says."""
    return label_counts(counts.confusion, counts.has_background, counts.uncovered)


def count_contours(counts: LabelMapCounts) -> np.ndarray | None:
    """Return the pixels near contours of each label, `[..., 3, S]`."""
    return counts.contours


def count_uncovered_as_wrong(counts: LabelMapCounts) -> np.ndarray | None:
    """Return the pixels of each label, uncovered ones being wrong, `[..., 3, S]`; `None` where label 0 is a class."""
    return None if counts.has_background else label_counts(counts.confusion, False, "wrong")


def count_without_uncovered(counts: LabelMapCounts) -> np.ndarray | None:
    """Return the pixels of each label but for uncovered ones, `[..., 3, S]`; `None` where label 0 is a class."""
    return None if counts.has_background else label_counts(counts.confusion, False, "ignore")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of results.json and how it is shown.

    Attributes:
        name: its key in results.json; a dot leads into a nested mapping.
        title: its row in tables; `{key}` stands for another value of the same results.
        column: its column in the tables of studies; the title if omitted.
        unit: `%`, another unit, or nothing for a plain number.
        decimals: how many are shown.
        is_larger_better: whether a larger value is the better one, which decides the colour of a difference.
    """

    name: str
    title: str
    column: str = ""
    unit: str = "%"
    decimals: int = 1
    is_larger_better: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.title)

    @property
    def path(self) -> tuple[str, ...]:
        """The keys that lead to it in results.json."""
        return tuple(self.name.split("."))

    def label(self, text: str) -> str:
        """Return a row or column title with the unit, which tables in percent leave out where it is percent."""
        return text if self.unit == "%" else f"{text} ({self.unit or 'number'})"

    def format(self, value: float | None, sign: str = "") -> str:
        """Return a value as tables show it, without the unit."""
        return format_value(value, sign, self.decimals)

    def read(self, record: Mapping[str, Any]) -> Any:
        """Return its value in results; `None` where they lack it, as those of an older version may."""
        return read_path(record, self.path)

    def is_in(self, record: Mapping[str, Any]) -> bool:
        """Return whether results hold it, be it as `None`."""
        holder = read_path(record, self.path[:-1])
        return isinstance(holder, Mapping) and self.path[-1] in holder

    def describe(self) -> dict[str, Any]:
        """Return what a page needs to show it, as JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "decimals": self.decimals,
            "is_larger_better": self.is_larger_better,
        }


@dataclass(frozen=True, kw_only=True)
class Measure(Figure):
    """A measure of label maps against the truth.

    Attributes:
        compute: pixel counts -> the value.
        counts: which pixel counts it is computed from; `None` where the measure does not apply. Counts of a split have
            to be the sum of those of its images.
        is_per_class: whether it has a value for each class in place of one.
    """

    compute: Compute
    counts: Callable[[LabelMapCounts], np.ndarray | None] = count_labels
    is_per_class: bool = False

    def describe(self) -> dict[str, Any]:
        """Return what a page needs to show it, as JSON values."""
        return {**super().describe(), "is_per_class": self.is_per_class}


MEASURES: tuple[Measure, ...] = (
    Measure(name="miou", title="mIoU", compute=mean_iou),
    Measure(
        name="miou_classes_in_truth",
        title="mIoU over classes in the truth",
        column="mIoU in truth",
        compute=mean_iou_in_truth,
    ),
    Measure(name="iou", title="IoU", compute=iou, is_per_class=True),
    Measure(name="precision", title="precision", compute=precision, is_per_class=True),
    Measure(name="recall", title="recall", compute=recall, is_per_class=True),
    Measure(name="pixel_accuracy", title="pixel accuracy", compute=pixel_accuracy),
    Measure(name="frequency_weighted_iou", title="frequency-weighted IoU", compute=frequency_weighted_iou),
    Measure(name="mean_accuracy", title="mean accuracy", compute=mean_accuracy),
    Measure(name="mean_dice", title="mean Dice", compute=mean_dice),
    Measure(name="boundary_iou.miou", title="boundary mIoU", compute=mean_iou, counts=count_contours),
    Measure(name="boundary_iou.iou", title="boundary IoU", compute=iou, counts=count_contours, is_per_class=True),
    Measure(
        name="uncovered.share",
        title="uncovered pixels",
        compute=uncovered_share,
        counts=count_uncovered_as_wrong,
        is_larger_better=False,
    ),
    Measure(
        name="uncovered.miou_wrong",
        title="mIoU, uncovered pixels counted as wrong",
        column="mIoU, uncovered wrong",
        compute=mean_iou,
        counts=count_uncovered_as_wrong,
    ),
    Measure(
        name="uncovered.miou_ignored",
        title="mIoU, uncovered pixels ignored",
        column="mIoU, uncovered ignored",
        compute=mean_iou,
        counts=count_without_uncovered,
    ),
)
"""Measures of label maps, in the order in which they are shown."""

PROPOSAL_FIGURES: tuple[Figure, ...] = (
    Figure(
        name="recall", title="recall of {objects} objects by proposals at IoU {threshold}", column="proposal recall"
    ),
    Figure(name="mean_best_iou", title="mean best IoU of proposals", column="mean best IoU"),
    Figure(name="proposals_per_image", title="proposals an image", column="proposals", unit=""),
)
"""What `ProposalQuality.summary` says of proposals, in the order in which it is shown."""


CLASSIFIER_FIGURES: tuple[Figure, ...] = (
    Figure(
        name="val.mean_average_precision",
        title="mAP of the fitted classifier, evaluated split",
        column="classifier mAP",
    ),
    Figure(
        name="train.mean_average_precision",
        title="mAP of the fitted classifier, training split",
        column="classifier mAP, training images",
    ),
    Figure(name="open_heads", title="heads of the fitted classifier that are open", column="open heads"),
)
"""What stage `scores` says of a generator that classifies images, in the order in which it is shown."""


MATCHED_FIGURES: tuple[Figure, ...] = tuple(
    Figure(name=f"matched_by_{protocol}.{name}_matched_by_{protocol}", title=f"{title}, matched by {protocol}")
    for protocol in ("image", "set")
    for name, title in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"))
)
"""What `discover` measures, each figure named by its protocol (`moduseg.evaluation.matching`)."""


def measure_label_maps(counts: LabelMapCounts, classes: Sequence[str]) -> dict[str, Any]:
    """Compute every measure that applies.

    Args:
        counts: of `S` labels.
        classes: `S` names, background first.

    Returns:
        Measures by their names, nested where a name has a dot; a mapping from class to value for those of each class.
        NaN becomes `None`.
    """
    record: dict[str, Any] = {}
    for measure in MEASURES:
        label_pixels = measure.counts(counts)
        if label_pixels is None:
            continue
        values = measure.compute(label_pixels)
        *groups, key = measure.path
        target = record
        for group in groups:
            target = target.setdefault(group, {})
        if measure.is_per_class:
            target[key] = {name: to_json(value) for name, value in zip(classes, values.tolist(), strict=True)}
        else:
            target[key] = to_json(float(values))
    return record


def single_measures() -> list[Measure]:
    """Return the measures that have one value for a whole split."""
    return [measure for measure in MEASURES if not measure.is_per_class]


def class_measures() -> list[Measure]:
    """Return the measures that have a value for each class."""
    return [measure for measure in MEASURES if measure.is_per_class]


def missing_measures(record: Mapping[str, Any], counts: LabelMapCounts) -> list[str]:
    """Return the names of the measures that apply to these counts and that the results lack."""
    applicable = [measure for measure in MEASURES if measure.counts(counts) is not None]
    return [measure.name for measure in applicable if not measure.is_in(record)]


def read_path(record: Any, path: Sequence[str]) -> Any:
    """Return the value that a path of keys leads to in nested mappings; `None` where a key is absent."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def to_json(value: float) -> float | None:
    """Return `None` for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def format_value(value: float | None, sign: str = "", decimals: int = 1) -> str:
    """Return a number as tables show it, `-` for `None`; `sign="+"` shows a plus as well."""
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.{decimals}f}"


def _split(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, in the truth and predicted pixels of each label, `[..., S]` each."""
    return counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]


def _percent(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(total > 0, 100.0 * part / np.maximum(total, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where there is nothing."""
    is_counted = ~np.isnan(values)
    num_counted = is_counted.sum(-1)
    total = np.where(is_counted, values, 0.0).sum(-1)
    return np.where(num_counted > 0, total / np.maximum(num_counted, 1), np.nan)
