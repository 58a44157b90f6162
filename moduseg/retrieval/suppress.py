"""Mask suppression inside each label (METHOD, step 8)."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Mask pixels turned into floats at once: bounds the memory, and float32 counts that many without rounding."""


def suppress(masks: Tensor, labels: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of masks, each label (background too) by itself.

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
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold: got {iou_threshold}, expected a number in [0, 1]; try 0.4")
    order = descending(scores)
    if len(order) < 2 or masks.numel() == 0:
        return order
    beats = _too_similar(masks, labels, iou_threshold)[order][:, order].triu(1)
    # Mask j stays iff no kept mask beats it. Repeating that rule settles one more mask of each chain at every pass, and
    # what it settles to is the greedy scan's answer, as masks are only beaten by earlier ones.
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
    while True:
        updated = ~(beats & kept[:, None]).any(0)
        if torch.equal(updated, kept):
            return order[kept]
        kept = updated


def descending(scores: Tensor) -> Tensor:
    """Indices that sort `scores [N]` from high to low, equal ones by index."""
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
    """`[N, N]` bool: same label and IoU greater than the threshold."""
    pixels = masks.view(torch.uint8)  # reduced several times faster than bool
    top, bottom = _span(pixels.amax(2))
    left, right = _span(pixels.amax(1))
    meets = labels[:, None] == labels
    meets &= (top[:, None] < bottom) & (top < bottom[:, None]) & (left[:, None] < right) & (left < right[:, None])
    meets.fill_diagonal_(False)
    meeting = meets.any(1)
    similar = torch.zeros_like(meets)
    for label in labels[meeting].unique():
        group = ((labels == label) & meeting).nonzero()[:, 0]
        box = torch.stack((top[group].min(), bottom[group].max(), left[group].min(), right[group].max())).tolist()
        shared = _intersections(masks, group, *box)
        areas = shared.diagonal()
        union = areas[:, None] + areas - shared
        # Divided in float64, so that a threshold like 0.4 equals an IoU of 2/5; MPS has none.
        wide = torch.float32 if masks.device.type == "mps" else torch.float64
        similar[group[:, None], group] = shared.to(wide) / union.to(wide) > iou_threshold
    return similar & meets


def _span(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last non-zero of each row of `occupied [N, L]`; an empty row meets nothing."""
    length = occupied.shape[1]
    places = torch.arange(length, device=occupied.device).expand_as(occupied)
    empty = occupied == 0
    return places.masked_fill(empty, length).amin(1), places.masked_fill(empty, -1).amax(1) + 1


def _intersections(masks: Tensor, group: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """`[n, n]` int64: pixels shared by each two masks of `group`, all inside the box; areas on the diagonal."""
    shared = torch.zeros((len(group), len(group)), dtype=torch.int64, device=masks.device)
    step = max(1, _BLOCK // (len(group) * (right - left)))
    for start in range(top, bottom, step):
        part = masks[:, start : min(start + step, bottom), left:right][group].flatten(1).float()
        shared += (part @ part.T).long()
    return shared
