"""One int64 confusion matrix of a whole split, and what is read from it (METHOD, data protocol).

Rows are truth, columns prediction; row and column 0 are the background. All measures are in percent.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.errors import DataError
from moduseg.structures import IGNORE_INDEX

Array = np.ndarray | Tensor
Averaged = Literal["either", "truth"]
"""Classes that a mean counts: those in truth or prediction (the standard), or those in the truth alone."""


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
    true, predicted = (_ids(array, device) for array in (truth, prediction))
    _check_range(true[true != IGNORE_INDEX], size, name, "truth")
    _check_range(predicted, size, name, "prediction")
    counted = true != IGNORE_INDEX
    return torch.bincount(true[counted] * size + predicted[counted], minlength=size * size).reshape(size, size)


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
    hits, in_truth, _ = _margins(matrix)
    total = in_truth.sum()
    return float(100.0 * hits.sum() / total) if total else float("nan")


def frequency_weighted_iou(matrix: Array) -> float:
    """Mean IoU in percent, each label weighted by its share of the true pixels; NaN where there is none."""
    hits, in_truth, predicted = _margins(matrix)
    total = in_truth.sum()
    each = np.nan_to_num(iou_of_counts(hits, in_truth, predicted))
    return float((in_truth / total * each).sum()) if total else float("nan")


def _margins(matrix: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, in the truth and predicted pixels of each label, `[S]` int64 each."""
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"matrix: got {counts.shape}, expected [S, S] counts")
    counts = counts.astype(np.int64)
    return np.diagonal(counts), counts.sum(1), counts.sum(0)
