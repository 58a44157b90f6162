"""How far a mIoU would move with other images: bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moduseg.evaluation.confusion import Averaged, iou_of_counts, mean_iou_of_counts

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Correct, in the truth, predicted pixels, `[n, S]` each -> `[n, M]` measures in percent."""

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

    @property
    def share_flipped(self) -> float | None:
        """Share of the resamples in which the difference has the other sign, those without a difference counting half;
        `None` where there is no difference to flip.
        """
        if not self.value or np.isnan(self.value) or np.isnan(self.share_above):
            return None
        return 1.0 - self.share_above if self.value > 0 else self.share_above


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
    drawn = _resampled([counts], resamples, seed, _mean_of(classes))[0, :, 0]
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
    _check_pair(first, second, resamples, confidence)
    drawn = _resampled([first, second], resamples, seed, _mean_of(classes))[..., 0]
    return _paired(_miou(second, classes) - _miou(first, classes), drawn[1] - drawn[0], confidence)


def paired_bootstrap_of_classes(
    first: np.ndarray, second: np.ndarray, resamples: int = 2000, confidence: float = 0.95, seed: int = 42
) -> list[PairedInterval]:
    """`paired_bootstrap` of the IoU of each label, over the same draws.

    A draw in which a label is absent from truth and prediction of one run says nothing of it and is left out.

    Returns:
        One interval for each of the `S` labels; NaN where a label is absent from one run altogether.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    _check_pair(first, second, resamples, confidence)
    drawn = _resampled([first, second], resamples, seed, iou_of_counts)
    differences = drawn[1] - drawn[0]
    totals = [counts.sum(0) for counts in (first, second)]
    values = iou_of_counts(*totals[1]) - iou_of_counts(*totals[0])
    return [_paired(float(values[i]), differences[:, i], confidence) for i in range(len(values))]


def _check_pair(first: np.ndarray, second: np.ndarray, resamples: int, confidence: float) -> None:
    _check(first, resamples, confidence)
    _check(second, resamples, confidence)
    # The pixels in the truth depend on the images alone.
    if first.shape != second.shape or not np.array_equal(first[:, 1], second[:, 1]):
        raise ValueError(
            f"paired runs: got counts {first.shape} and {second.shape} of different truths, expected the same images "
            "in the same order"
        )


def _paired(value: float, differences: np.ndarray, confidence: float) -> PairedInterval:
    low, high = _ends(differences, confidence)
    known = differences[~np.isnan(differences)]
    # A draw in which both are equal speaks for neither.
    above = float(np.mean((known > 0) + 0.5 * (known == 0))) if len(known) else float("nan")
    return PairedInterval(value, low, high, confidence, above)


def _check(counts: np.ndarray, resamples: int, confidence: float) -> None:
    if counts.ndim != 3 or counts.shape[1] != 3 or len(counts) == 0:
        raise ValueError(f"counts: got {counts.shape}, expected [n, 3, S] of one image or more; see image_counts")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples, confidence: got {resamples}, {confidence}, expected >= 1 and inside (0, 1)")


def _miou(counts: np.ndarray, classes: Averaged) -> float:
    summed = counts.sum(0)
    return float(mean_iou_of_counts(summed[0], summed[1], summed[2], classes))


def _mean_of(classes: Averaged) -> Measure:
    return lambda hits, in_truth, predicted: mean_iou_of_counts(hits, in_truth, predicted, classes)[..., None]


def _resampled(runs: list[np.ndarray], resamples: int, seed: int, measure: Measure) -> np.ndarray:
    """`[runs, resamples, M]`, the measures of every run on every draw, in percent."""
    rng = np.random.default_rng(seed)
    images, _, size = runs[0].shape
    # Sums of pixel counts stay exact in float64 (below 2^53), so the matmul may add in any order.
    flat = [run.reshape(images, -1).astype(np.float64) for run in runs]
    drawn: list[list[np.ndarray]] = [[] for _ in runs]
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        weights = rng.multinomial(images, np.full(images, 1.0 / images), size=stop - start).astype(np.float64)
        for chunks, counts in zip(drawn, flat, strict=True):
            summed = (weights @ counts).reshape(-1, 3, size)
            chunks.append(measure(summed[:, 0], summed[:, 1], summed[:, 2]))
    return np.stack([np.concatenate(chunks) for chunks in drawn])


def _ends(values: np.ndarray, confidence: float) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
