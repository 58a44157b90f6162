"""Mask suppression inside each label (docs/method.md, step 8)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.bits import PACKED, PackedMasks

_BLOCK = 1 << 22
"""Mask pixels turned into floats at once: bounds the memory, and float32 counts that many without rounding."""


def suppress(masks: Tensor, labels: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress duplicates: greedy non-maximum suppression of masks, within each label (background too).

    In descending score, a mask goes if its intersection over union with a kept mask of its label is greater than
    `iou_threshold`. Areas are counted in full-resolution pixels.

    Args:
        masks: `[N, H, W]` bool.
        labels: `[N]` integers.
        scores: `[N]` float; equal ones rank by index.
        iou_threshold: in [0, 1].

    Returns:
        `[K]` int64, indices of the masks kept, in descending score.

    Raises:
        ValueError: shapes that do not fit, or a threshold outside [0, 1].
    """
    check_scored_masks(masks, labels, scores)
    check_threshold(iou_threshold)
    if masks.device.type in PACKED:
        return suppress_packed(PackedMasks.of(masks), labels, scores, iou_threshold)
    order = descending(scores)
    if len(order) < 2 or masks.numel() == 0:
        return order
    return _scan(order, _too_similar(masks, labels, iou_threshold))


def suppress_packed(masks: PackedMasks, labels: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress packed masks, with `labels` and `scores` on the CPU; as `suppress`, but nothing is checked."""
    order = descending(scores)
    if len(order) < 2 or masks.are_disjoint:
        return order
    similar = np.zeros((len(order), len(order)), dtype=bool)
    first, second = _candidate_pairs(masks, labels.numpy(), iou_threshold)
    first, second = _pairs_above(masks, first, second, masks.shared(first, second), iou_threshold)
    similar[first, second] = similar[second, first] = True
    return _scan(order, torch.from_numpy(similar))


def _candidate_pairs(masks: PackedMasks, labels: np.ndarray, iou_threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs `i < j` of one label that may have an IoU above the threshold, `[P]` each.

    Their boxes meet, and neither their areas nor the boxes' common part rule it out: two masks share no more than the
    smaller one, or than what their boxes do. Both bounds are divided like the IoU itself, so that rounding loses none.
    """
    first, second = np.nonzero(np.triu(labels[:, None] == labels, 1))
    max_shared = np.minimum(masks.areas[first], masks.areas[second])
    first, second = _pairs_above(masks, first, second, max_shared, iou_threshold)
    if not len(first):
        return first, second
    top, bottom, left, right = masks.boxes().T
    heights = np.minimum(bottom[first], bottom[second]) - np.maximum(top[first], top[second])
    widths = np.minimum(right[first], right[second]) - np.maximum(left[first], left[second])
    max_shared = np.minimum(masks.areas[first], masks.areas[second])
    max_shared = np.minimum(max_shared, heights.clip(0) * widths.clip(0))
    return _pairs_above(masks, first, second, max_shared, iou_threshold)


def _pairs_above(
    masks: PackedMasks, first: np.ndarray, second: np.ndarray, shared: np.ndarray, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs whose IoU would be above the threshold if they shared `shared` (`[P]`) pixels."""
    union = masks.areas[first] + masks.areas[second] - shared
    kept = shared / np.maximum(union, 1) > iou_threshold
    return first[kept], second[kept]


def _scan(order: Tensor, similar: Tensor) -> Tensor:
    """Return the masks that a greedy scan in `order [N]` keeps, given which pairs are too similar, `[N, N]` bool."""
    beats = similar[order][:, order].triu(1)
    # Mask j stays iff no kept mask beats it. Repeating that rule settles one more mask of each chain at every pass, and
    # what it settles to is the greedy scan's answer, as masks are only beaten by earlier ones.
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
    while True:
        updated = ~(beats & kept[:, None]).any(0)
        if torch.equal(updated, kept):
            return order[kept]
        kept = updated


def check_threshold(iou_threshold: float) -> None:
    """Raise ValueError unless the threshold is in [0, 1]."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold: got {iou_threshold}, expected a number in [0, 1]; try 0.4")


def descending(scores: Tensor) -> Tensor:
    """Return the indices that sort `scores [N]` from high to low, equal ones by index."""
    return scores.sort(descending=True, stable=True).indices


def check_scored_masks(masks: Tensor, labels: Tensor, scores: Tensor) -> None:
    """Raise ValueError unless the three describe the same proposals: `[N, H, W]` bool, `[N]` integers, `[N]`."""
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks: got {tuple(masks.shape)} {masks.dtype}, expected [N, H, W] bool")
    if labels.dtype.is_floating_point:
        raise ValueError(f"labels: got {labels.dtype}, expected integers")
    for name, values in (("labels", labels), ("scores", scores)):
        if values.shape != masks.shape[:1]:
            raise ValueError(f"{name}: got {tuple(values.shape)}, expected ({len(masks)},) as there are masks")


def _too_similar(masks: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Return `[N, N]` bool: equal labels and an IoU above the threshold. Nothing leaves the device."""
    # Bytes are reduced several times faster than booleans.
    pixels = masks.view(torch.uint8)
    top, bottom = _span(pixels.amax(2))
    left, right = _span(pixels.amax(1))
    may_overlap = labels[:, None] == labels
    may_overlap &= (top[:, None] < bottom) & (top < bottom[:, None]) & (left[:, None] < right) & (left < right[:, None])
    shared = _intersections(masks)
    areas = shared.diagonal()
    union = (areas[:, None] + areas - shared).clamp(min=1)
    # The division is in float64, so that a threshold like 0.4 equals an IoU of 2/5; MPS has none.
    dtype = torch.float32 if masks.device.type == "mps" else torch.float64
    return may_overlap & (shared.to(dtype) / union.to(dtype) > iou_threshold)


def _span(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and one past the last non-zero of each row of `occupied [N, L]`; an empty row overlaps none."""
    length = occupied.shape[1]
    positions = torch.arange(length, device=occupied.device).expand_as(occupied)
    is_empty = occupied == 0
    return positions.masked_fill(is_empty, length).amin(1), positions.masked_fill(is_empty, -1).amax(1) + 1


def _intersections(masks: Tensor) -> Tensor:
    """Return `[N, N]` int64: the pixels that each pair of masks shares; areas on the diagonal.

    Products of zeros and ones are exact in any float.
    """
    count, height, width = masks.shape
    shared = torch.zeros((count, count), dtype=torch.int64, device=masks.device)
    step = max(1, _BLOCK // (count * width))
    for start in range(0, height, step):
        part = masks[:, start : start + step].flatten(1).float()
        shared += (part @ part.T).long()
    return shared
