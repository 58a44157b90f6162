"""One int64 confusion matrix of a whole split, and what is read from it (METHOD, data protocol).

Rows are truth, columns prediction; row and column 0 are the background. All measures are in percent.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from moduseg.errors import DataError
from moduseg.structures import IGNORE_INDEX

Array = np.ndarray | Tensor
Averaged = Literal["either", "truth"]
"""Classes that a mean counts: those in truth or prediction (the standard), or those in the truth alone."""
Uncovered = Literal["wrong", "ignore"]
"""Where label 0 is no class (Cityscapes, ADE20K): whether pixels predicted 0 count as wrong, or not at all."""

EXACT_FLOAT32 = 1 << 24
"""OpenCV counts in float32: exact up to here, so larger pictures are counted in parts."""
_FEW_RUNS = 8
"""Pixels a run from which on counting runs is faster than counting pixels."""


class ConfusionMatrix:
    """Counts pixels of `size` labels.

    Args:
        size: labels, background included (`num_classes + 1`), 1..255.
        device: where the counts live; `update` may be handed arrays from anywhere.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= size <= IGNORE_INDEX:
            raise ValueError(f"size: got {size}, expected 1..{IGNORE_INDEX} labels, background included")
        self.size = size
        self.matrix = torch.zeros(size, size, dtype=torch.int64, device=device)

    def update(self, truth: Array, prediction: Array, name: str = "") -> Tensor:
        """Add one image.

        Args:
            truth: `[H, W]` integers in 0..size-1, or 255 where ignored.
            prediction: `[H, W]` integers in 0..size-1.
            name: the image, for messages.

        Returns:
            The image's own counts, `[size, size]` int64, for intervals over images.

        Raises:
            DataError: sizes differ, or an id is out of range (255 in a prediction included).
        """
        counts = count_pixels(truth, prediction, self.size, name, self.matrix.device)
        self.matrix += counts
        return counts

    def add(self, counts: Array) -> None:
        """Add counts made elsewhere (another shard), `[size, size]`.

        Raises:
            ValueError: another shape.
        """
        if tuple(counts.shape) != (self.size, self.size):
            raise ValueError(f"counts: got {tuple(counts.shape)}, expected {(self.size, self.size)}")
        self.matrix += torch.as_tensor(counts, dtype=torch.int64, device=self.matrix.device)

    def iou(self) -> np.ndarray:
        """See `iou`."""
        return iou(self.matrix)

    def miou(self, classes: Averaged = "either") -> float:
        """See `miou`."""
        return miou(self.matrix, classes)

    def pixel_accuracy(self) -> float:
        """See `pixel_accuracy`."""
        return pixel_accuracy(self.matrix)

    def frequency_weighted_iou(self) -> float:
        """See `frequency_weighted_iou`."""
        return frequency_weighted_iou(self.matrix)


def count_pixels(
    truth: Array, prediction: Array, size: int, name: str = "", device: torch.device | str = "cpu"
) -> Tensor:
    """Confusion counts of one image, `[size, size]` int64; arguments and errors as `ConfusionMatrix.update`."""
    if tuple(truth.shape) != tuple(prediction.shape):
        raise DataError(
            f"image {name!r}: prediction is {tuple(prediction.shape)}, expected the truth's {tuple(truth.shape)}; "
            "predict at the size of the image"
        )
    if isinstance(truth, np.ndarray) and isinstance(prediction, np.ndarray) and torch.device(device).type == "cpu":
        counts = _count_bytes(truth, prediction, size)
        if counts is not None:
            return torch.from_numpy(counts)
    true, predicted = (_ids(array, device) for array in (truth, prediction))
    _check_range(true[true != IGNORE_INDEX], size, name, "truth")
    _check_range(predicted, size, name, "prediction")
    counted = true != IGNORE_INDEX
    return torch.bincount(true[counted] * size + predicted[counted], minlength=size * size).reshape(size, size)


def _count_bytes(truth: np.ndarray, prediction: np.ndarray, size: int) -> np.ndarray | None:
    """The counts of two 8-bit maps; `None` where they are not, or an id is out of range."""
    if truth.dtype != np.uint8 or prediction.dtype != np.uint8 or truth.size == 0:
        return None
    true, predicted = truth.ravel(), prediction.ravel()
    changes = true[1:] != true[:-1]
    changes |= predicted[1:] != predicted[:-1]
    if np.count_nonzero(changes) > truth.size // _FEW_RUNS:
        return _histogram(true, predicted, size)
    # Label maps are runs of equal pixels: one entry a run, weighted by its length, in place of one a pixel. The weights
    # are summed in float64, which is exact here.
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(starts, append=truth.size)
    true, predicted = true[starts], predicted[starts]
    counted = true != IGNORE_INDEX
    if int(predicted.max()) >= size or int(true[counted].max(initial=0)) >= size:
        return None
    codes = true[counted].astype(np.int64) * size + predicted[counted]
    return np.bincount(codes, lengths[counted], size * size).astype(np.int64).reshape(size, size)


def _histogram(true: np.ndarray, predicted: np.ndarray, size: int) -> np.ndarray | None:
    """`_count_bytes` for maps without long runs, flattened."""
    if int(predicted.max()) >= size:
        return None
    counts = np.zeros((size, size), dtype=np.int64)
    for start in range(0, len(true), EXACT_FLOAT32):
        maps = [part[start : start + EXACT_FLOAT32] for part in (true, predicted)]
        counts += cv2.calcHist(maps, [0, 1], None, [size, size], [0, size, 0, size]).astype(np.int64)
    # Ids out of range fall outside of the histogram.
    return counts if counts.sum() == len(true) - np.count_nonzero(true == IGNORE_INDEX) else None


def _ids(array: Array, device: torch.device | str) -> Tensor:
    return torch.as_tensor(array).to(device=device, dtype=torch.int64).flatten()


def _check_range(ids: Tensor, size: int, name: str, what: str) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        remedy = "a prediction labels every pixel" if wrong == IGNORE_INDEX else "class lists differ"
        raise DataError(f"image {name!r}: {what} has label id {wrong}, expected 0..{size - 1}; {remedy}")


def label_counts(matrix: Array, has_background: bool = True, uncovered: Uncovered = "wrong") -> np.ndarray:
    """What the measures need of a confusion matrix.

    Args:
        matrix: `[..., S, S]` counts, rows truth.
        has_background: whether label 0 is a class. Where it is not, a pixel predicted 0 was left uncovered, and label 0
            takes part in no mean.
        uncovered: for `has_background=False`: `wrong` counts such a pixel as a miss of its true class (the strict
            number), `ignore` leaves it out of every count (the flattering one).

    Returns:
        `[..., 3, S]` int64: correct, in the truth, predicted pixels of each label; zeros for a label 0 that is none.
    """
    counts = _as_counts(matrix)
    if not has_background:
        counts = counts.copy()
        counts[..., 0, :] = 0
        if uncovered == "ignore":
            counts[..., :, 0] = 0
    margins = np.stack([np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)], axis=-2)
    if not has_background:
        margins[..., 0] = 0
    return margins


def iou(matrix: Array) -> np.ndarray:
    """Intersection over union of each label.

    Args:
        matrix: `[S, S]` counts.

    Returns:
        `[S]` float64 in percent, NaN for labels absent from both truth and prediction.
    """
    hits, in_truth, predicted = _margins(matrix)
    return iou_of_counts(hits, in_truth, predicted)


def iou_of_counts(hits: np.ndarray, in_truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """IoU in percent from pixel counts of one shape: correct, in the truth, predicted; NaN where the union is empty."""
    union = in_truth + predicted - hits
    return np.where(union > 0, 100.0 * hits / np.maximum(union, 1), np.nan)


def miou(matrix: Array, classes: Averaged = "either") -> float:
    """Mean IoU in percent over the labels in truth or prediction (or in the truth alone); NaN where there is none.

    Labels absent from both are left out, never counted as 0.
    """
    hits, in_truth, predicted = _margins(matrix)
    return float(mean_iou_of_counts(hits, in_truth, predicted, classes))


def mean_iou_of_counts(
    hits: np.ndarray, in_truth: np.ndarray, predicted: np.ndarray, classes: Averaged = "either"
) -> np.ndarray:
    """Mean over the last axis of `iou_of_counts`, in percent; NaN where no label counts."""
    if classes not in ("either", "truth"):
        raise ValueError(f"classes: got {classes!r}, expected 'either' or 'truth'")
    each = iou_of_counts(hits, in_truth, predicted)
    counted = (in_truth > 0) if classes == "truth" else ~np.isnan(each)
    number = counted.sum(-1)
    total = np.where(counted, each, 0.0).sum(-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def pixel_accuracy(matrix: Array) -> float:
    """Correct pixels in percent of those not ignored; NaN where there is none."""
    return pixel_accuracy_of_counts(*_margins(matrix))


def pixel_accuracy_of_counts(hits: np.ndarray, in_truth: np.ndarray, predicted: np.ndarray) -> float:
    """`pixel_accuracy` from pixel counts of each label."""
    total = in_truth.sum()
    return float(100.0 * hits.sum() / total) if total else float("nan")


def frequency_weighted_iou(matrix: Array) -> float:
    """Mean IoU in percent, each label weighted by its share of the true pixels; NaN where there is none."""
    return frequency_weighted_iou_of_counts(*_margins(matrix))


def frequency_weighted_iou_of_counts(hits: np.ndarray, in_truth: np.ndarray, predicted: np.ndarray) -> float:
    """`frequency_weighted_iou` from pixel counts of each label."""
    total = in_truth.sum()
    each = np.nan_to_num(iou_of_counts(hits, in_truth, predicted))
    return float((in_truth / total * each).sum()) if total else float("nan")


def share_of_counts(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part` in percent of `whole`, NaN where that is 0: precision from correct and predicted, recall from correct and
    true pixels.
    """
    return np.where(whole > 0, 100.0 * part / np.maximum(whole, 1), np.nan)


def _margins(matrix: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, in the truth and predicted pixels of each label, `[S]` int64 each."""
    hits, in_truth, predicted = label_counts(matrix)
    return hits, in_truth, predicted


def _as_counts(matrix: Array) -> np.ndarray:
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim < 2 or counts.shape[-2] != counts.shape[-1]:
        raise ValueError(f"matrix: got {counts.shape}, expected [S, S] counts")
    return counts.astype(np.int64)
