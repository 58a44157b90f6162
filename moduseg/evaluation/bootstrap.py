"""Bootstrap intervals: how far a measure would move if other images had been scored.

Each draw weighs every image by an exponential random number (the Bayesian bootstrap: Rubin, Annals of Statistics 1981)
instead of drawing images with replacement. No weight is 0, so a class of few images is in every draw. Drawn with
replacement, a class in one of ten images is absent from a third of the draws, whose mean is then over other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moduseg.evaluation.measures import Compute, iou, mean_iou

_CHUNK = 250
"""Resamples worked on at once, so that memory does not grow with their number."""
_WEIGHT_UNITS = 1 << 12
"""Weights are whole multiples of one 4096th of their mean: sums of weighted pixel counts then stay exact in float64."""


@dataclass(frozen=True)
class Interval:
    """A measure of a split with its interval over images.

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
    """Return what measures need of each image's confusion matrix, which is far smaller than the matrix.

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


def bootstrap(
    counts: np.ndarray,
    resamples: int = 2000,
    *,
    confidence: float = 0.95,
    seed: int = 42,
    compute: Compute = mean_iou,
) -> Interval:
    """Return a measure of a split with its percentile interval over weighted images.

    Args:
        counts: `[n, 3, S]` of `image_counts`.
        resamples: how many times the images are weighted.
        confidence: coverage of the interval, in (0, 1).
        seed: of the draws; equal seeds and equal `n` draw the same weights.
        compute: the measure, one value for a split; a ratio of pixel counts, which do not have to be whole.

    Raises:
        ValueError: no image, another shape, or a number out of range.
    """
    _check(counts, resamples, confidence)
    low, high = _ends(_resample([counts], resamples, seed, compute)[0], confidence)
    return Interval(float(compute(counts.sum(0))), low, high, confidence)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    resamples: int = 2000,
    *,
    confidence: float = 0.95,
    seed: int = 42,
    compute: Compute = mean_iou,
) -> PairedInterval:
    """Return the difference `second - first` in a measure with its interval; both runs see the same draws.

    Args:
        first, second: `[n, 3, S]` of `image_counts`, images in the same order.
        resamples, confidence, seed, compute: as for `bootstrap`.

    Raises:
        ValueError: as `bootstrap`, or runs over different images.
    """
    _check_pair(first, second, resamples, confidence)
    drawn = _resample([first, second], resamples, seed, compute)
    difference = float(compute(second.sum(0))) - float(compute(first.sum(0)))
    return _to_paired_interval(difference, drawn[1] - drawn[0], confidence)


def paired_bootstrap_of_classes(
    first: np.ndarray,
    second: np.ndarray,
    resamples: int = 2000,
    *,
    confidence: float = 0.95,
    seed: int = 42,
    compute: Compute = iou,
) -> list[PairedInterval]:
    """Return `paired_bootstrap` of a measure of each label, over the same draws.

    Returns:
        One interval for each of the `S` labels; NaN where a label has no value in one run altogether.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    _check_pair(first, second, resamples, confidence)
    drawn = _resample([first, second], resamples, seed, compute)
    differences = drawn[1] - drawn[0]
    values = compute(second.sum(0)) - compute(first.sum(0))
    return [_to_paired_interval(float(values[i]), differences[:, i], confidence) for i in range(len(values))]


def _check_pair(first: np.ndarray, second: np.ndarray, resamples: int, confidence: float) -> None:
    _check(first, resamples, confidence)
    _check(second, resamples, confidence)
    # The pixels in the truth depend on the images alone.
    if first.shape != second.shape or not np.array_equal(first[:, 1], second[:, 1]):
        raise ValueError(
            f"paired runs: got counts {first.shape} and {second.shape} of different truths, expected the same images "
            "in the same order"
        )


def _to_paired_interval(value: float, differences: np.ndarray, confidence: float) -> PairedInterval:
    low, high = _ends(differences, confidence)
    valid = differences[~np.isnan(differences)]
    # A draw in which both are equal speaks for neither.
    above = float(np.mean((valid > 0) + 0.5 * (valid == 0))) if len(valid) else float("nan")
    return PairedInterval(value, low, high, confidence, above)


def _check(counts: np.ndarray, resamples: int, confidence: float) -> None:
    if counts.ndim != 3 or counts.shape[1] != 3 or len(counts) == 0:
        raise ValueError(f"counts: got {counts.shape}, expected [n, 3, S] of one image or more; see image_counts")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples, confidence: got {resamples}, {confidence}, expected >= 1 and inside (0, 1)")


def _resample(runs: list[np.ndarray], resamples: int, seed: int, compute: Compute) -> np.ndarray:
    """Return the measure of every run on every draw, `[runs, resamples, ...]`."""
    rng = np.random.default_rng(seed)
    num_images, _, num_labels = runs[0].shape
    # Sums of whole numbers stay exact in float64 (below 2^53), so the matmul may add in any order.
    flat = [run.reshape(num_images, -1).astype(np.float64) for run in runs]
    drawn: list[list[np.ndarray]] = [[] for _ in runs]
    for start in range(0, resamples, _CHUNK):
        num_draws = min(_CHUNK, resamples - start)
        weights = np.ceil(rng.standard_exponential((num_draws, num_images)) * _WEIGHT_UNITS)
        for chunks, counts in zip(drawn, flat, strict=True):
            chunks.append(compute((weights @ counts).reshape(-1, 3, num_labels)))
    return np.stack([np.concatenate(chunks) for chunks in drawn])


def _ends(values: np.ndarray, confidence: float) -> tuple[float, float]:
    valid = values[~np.isnan(values)]
    if len(valid) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(valid, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
