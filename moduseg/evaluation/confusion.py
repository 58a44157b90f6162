"""One int64 confusion matrix of a whole split, from which measures are computed (docs/method.md, "Data protocol").

Rows are truth, columns prediction; row and column 0 are the background.
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
Uncovered = Literal["wrong", "ignore"]
"""Where label 0 is no class (Cityscapes, ADE20K): whether pixels predicted as 0 count as wrong, or not at all."""

EXACT_FLOAT32 = 1 << 24
"""OpenCV counts in float32: exact up to here, so larger pictures are counted in parts."""
_FEW_RUNS = 8
"""Mean length of a run, in pixels, from which counting runs is faster than counting pixels."""


class ConfusionMatrix:
    """Counts pixels of `num_labels` labels.

    Args:
        num_labels: labels, background included (`num_classes + 1`), 1..255.
        device: where the counts live; `update` may be handed arrays from anywhere.
    """

    def __init__(self, num_labels: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= num_labels <= IGNORE_INDEX:
            raise ValueError(f"num_labels: got {num_labels}, expected 1..{IGNORE_INDEX} labels, background included")
        self.num_labels = num_labels
        self.matrix = torch.zeros(num_labels, num_labels, dtype=torch.int64, device=device)

    def update(self, truth: Array, prediction: Array, name: str = "") -> Tensor:
        """Add one image.

        Args:
            truth: `[H, W]` integers in 0..num_labels-1, or 255 where ignored.
            prediction: `[H, W]` integers in 0..num_labels-1.
            name: the image, for messages.

        Returns:
            The image's own counts, `[num_labels, num_labels]` int64, for intervals over images.

        Raises:
            DataError: sizes differ, or an id is out of range (255 in a prediction included).
        """
        counts = count_pixels(truth, prediction, self.num_labels, name, self.matrix.device)
        self.matrix += counts
        return counts

    def add(self, counts: Array) -> None:
        """Add counts made elsewhere (another shard), `[num_labels, num_labels]`.

        Raises:
            ValueError: another shape.
        """
        if tuple(counts.shape) != (self.num_labels, self.num_labels):
            raise ValueError(f"counts: got {tuple(counts.shape)}, expected {(self.num_labels, self.num_labels)}")
        self.matrix += torch.as_tensor(counts, dtype=torch.int64, device=self.matrix.device)

    def label_counts(self) -> np.ndarray:
        """Return what measures are computed from, `[3, S]` int64; see the function `label_counts`."""
        return label_counts(self.matrix)


def count_pixels(
    truth: Array, prediction: Array, num_labels: int, name: str = "", device: torch.device | str = "cpu"
) -> Tensor:
    """Return the confusion counts of one image; arguments, shape and errors as for `ConfusionMatrix.update`."""
    if tuple(truth.shape) != tuple(prediction.shape):
        raise DataError(
            f"image {name!r}: prediction is {tuple(prediction.shape)}, expected the truth's {tuple(truth.shape)}; "
            "predict at the size of the image"
        )
    if isinstance(truth, np.ndarray) and isinstance(prediction, np.ndarray) and torch.device(device).type == "cpu":
        counts = _count_bytes(truth, prediction, num_labels)
        if counts is not None:
            return torch.from_numpy(counts)
    true, predicted = (_ids(array, device) for array in (truth, prediction))
    _check_range(true[true != IGNORE_INDEX], num_labels, name, "truth")
    _check_range(predicted, num_labels, name, "prediction")
    counted = true != IGNORE_INDEX
    codes = true[counted] * num_labels + predicted[counted]
    return torch.bincount(codes, minlength=num_labels**2).reshape(num_labels, num_labels)


def _count_bytes(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray | None:
    """Count two 8-bit maps; `None` where they are not 8-bit, or an id is out of range."""
    if truth.dtype != np.uint8 or prediction.dtype != np.uint8 or truth.size == 0:
        return None
    true, predicted = truth.ravel(), prediction.ravel()
    changes = true[1:] != true[:-1]
    changes |= predicted[1:] != predicted[:-1]
    if np.count_nonzero(changes) > truth.size // _FEW_RUNS:
        return _histogram(true, predicted, num_labels)
    # Label maps are runs of equal pixels: one entry a run, weighted by its length, in place of one a pixel. The weights
    # are summed in float64, which is exact here.
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(starts, append=truth.size)
    true, predicted = true[starts], predicted[starts]
    counted = true != IGNORE_INDEX
    if int(predicted.max()) >= num_labels or int(true[counted].max(initial=0)) >= num_labels:
        return None
    codes = true[counted].astype(np.int64) * num_labels + predicted[counted]
    return np.bincount(codes, lengths[counted], num_labels**2).astype(np.int64).reshape(num_labels, num_labels)


def _histogram(true: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray | None:
    """Count flattened 8-bit maps without long runs; `None` where an id is out of range."""
    if int(predicted.max()) >= num_labels:
        return None
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    for start in range(0, len(true), EXACT_FLOAT32):
        maps = [part[start : start + EXACT_FLOAT32] for part in (true, predicted)]
        counts += cv2.calcHist(maps, [0, 1], None, [num_labels] * 2, [0, num_labels] * 2).astype(np.int64)
    # Ids out of range fall outside of the histogram.
    return counts if counts.sum() == len(true) - np.count_nonzero(true == IGNORE_INDEX) else None


def _ids(array: Array, device: torch.device | str) -> Tensor:
    return torch.as_tensor(array).to(device=device, dtype=torch.int64).flatten()


def _check_range(ids: Tensor, num_labels: int, name: str, what: str) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= num_labels:
        wrong = low if low < 0 else high
        remedy = "a prediction labels every pixel" if wrong == IGNORE_INDEX else "class lists differ"
        raise DataError(f"image {name!r}: {what} has label id {wrong}, expected 0..{num_labels - 1}; {remedy}")


def label_counts(matrix: Array, has_background: bool = True, uncovered: Uncovered = "wrong") -> np.ndarray:
    """Return what measures need of a confusion matrix.

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


def _as_counts(matrix: Array) -> np.ndarray:
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim < 2 or counts.shape[-2] != counts.shape[-1]:
        raise ValueError(f"matrix: got {counts.shape}, expected [S, S] counts")
    return counts.astype(np.int64)
