"""How far a mIoU would move with other images: bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moduseg.evaluation.confusion import Averaged, mean_iou_of_counts

_CHUNK = 250
"""Resamples worked on at once, so that memory does not grow with their number."""


@dataclass(frozen=True)
class Interval:
    """A measure with its interval.

    Attributes:
        value: the measure on the images as they are, in percent.
        low, high: the interval's ends, in percent.
        confidence: its coverage, in (0, 1).
    """

    value: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class PairedInterval(Interval):
    """The difference second minus first of two runs on the same images.

    Attributes:
        share_above: share of the resamples in which the second run is ahead, in [0, 1].
    """

    share_above: float = 0.5


def image_counts(confusions: Sequence[np.ndarray | Tensor]) -> np.ndarray:
    """What mIoU needs of each image's confusion matrix, which is far smaller than the matrix.

    Args:
        confusions: `n` matrices `[S, S]`, rows truth.

    Returns:
        `[n, 3, S]` int64: correct, in the truth, predicted pixels of each label.
    """
    rows = []
    for confusion in confusions:
        matrix = np.asarray(confusion.cpu() if isinstance(confusion, Tensor) else confusion).astype(np.int64)
        rows.append(np.stack([np.diagonal(matrix), matrix.sum(1), matrix.sum(0)]))
    return np.stack(rows) if rows else np.zeros((0, 3, 1), dtype=np.int64)


def bootstrap_miou(
    counts: np.ndarray, resamples: int = 2000, confidence: float = 0.95, seed: int = 42, classes: Averaged = "either"
) -> Interval:
    """Percentile interval of the mIoU of a split, images drawn with replacement.

    Args:
        counts: `[n, 3, S]` of `image_counts`.
        resamples: how many splits are drawn.
        confidence: coverage of the interval, in (0, 1).
        seed: of the draws; the same seed and `n` draw the same images.
        classes: which labels the mean counts; see `miou`.

    Raises:
        ValueError: no image, another shape, or a number out of range.
    """
    _check(counts, resamples, confidence)
    drawn = _resampled_miou([counts], resamples, seed, classes)[0]
    low, high = _ends(drawn, confidence)
    return Interval(_miou(counts, classes), low, high, confidence)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 42,
    classes: Averaged = "either",
) -> PairedInterval:
    """Interval of the difference `second - first` in mIoU; both runs see the same draws of the same images.

    Args:
        first, second: `[n, 3, S]` of `image_counts`, images in the same order; other arguments as `bootstrap_miou`.

    Raises:
        ValueError: as `bootstrap_miou`, or runs over different images.
    """
    _check(first, resamples, confidence)
    _check(second, resamples, confidence)
    # The pixels in the truth depend on the images alone.
    if first.shape != second.shape or not np.array_equal(first[:, 1], second[:, 1]):
        raise ValueError(
            f"paired runs: got counts {first.shape} and {second.shape} of different truths, expected the same images "
            "in the same order"
        )
    drawn = _resampled_miou([first, second], resamples, seed, classes)
    difference = drawn[1] - drawn[0]
    low, high = _ends(difference, confidence)
    known = difference[~np.isnan(difference)]
    # A draw in which both are equal speaks for neither.
    above = float(np.mean((known > 0) + 0.5 * (known == 0))) if len(known) else float("nan")
    return PairedInterval(_miou(second, classes) - _miou(first, classes), low, high, confidence, above)


def _check(counts: np.ndarray, resamples: int, confidence: float) -> None:
    if counts.ndim != 3 or counts.shape[1] != 3 or len(counts) == 0:
        raise ValueError(f"counts: got {counts.shape}, expected [n, 3, S] of one image or more; see image_counts")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples, confidence: got {resamples}, {confidence}, expected >= 1 and inside (0, 1)")


def _miou(counts: np.ndarray, classes: Averaged) -> float:
    summed = counts.sum(0)
    return float(mean_iou_of_counts(summed[0], summed[1], summed[2], classes))


def _resampled_miou(runs: list[np.ndarray], resamples: int, seed: int, classes: Averaged) -> np.ndarray:
    """`[runs, resamples]` mIoU in percent."""
    rng = np.random.default_rng(seed)
    images, _, size = runs[0].shape
    # Sums of pixel counts stay exact in float64 (below 2^53), so the matmul may add in any order.
    flat = [run.reshape(images, -1).astype(np.float64) for run in runs]
    drawn = np.empty((len(runs), resamples))
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        weights = rng.multinomial(images, np.full(images, 1.0 / images), size=stop - start).astype(np.float64)
        for i, counts in enumerate(flat):
            summed = (weights @ counts).reshape(-1, 3, size)
            drawn[i, start:stop] = mean_iou_of_counts(summed[:, 0], summed[:, 1], summed[:, 2], classes)
    return drawn


def _ends(values: np.ndarray, confidence: float) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
