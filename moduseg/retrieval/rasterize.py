"""From labelled masks to a label map (docs/method.md, step 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.masks.bits import PackedMasks
from moduseg.retrieval.suppress import PACKED, check_scored_masks, descending

_BLOCK = 1 << 22
"""Mask pixels processed at once: bounds the memory."""


def rasterize(masks: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Paint masks in descending score, each into the pixels that are still empty.

    A background mask (label 0) paints nothing: its pixels are left to masks of lower score. What no mask paints is
    background.

    Args:
        masks: `[N, H, W]` bool; they may overlap.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float; equal ones rank by index.

    Returns:
        `[H, W]` uint8.

    Raises:
        ValueError: shapes that do not fit, or a label outside 0..254.
    """
    check_scored_masks(masks, labels, scores)
    check_labels(labels)
    if masks.device.type in PACKED:
        return rasterize_packed(PackedMasks.of(masks), labels, descending(scores))
    height, width = masks.shape[1:]
    order = descending(scores)
    order = order[labels[order] > 0]
    count = len(order)
    if count == 0 or height * width == 0:
        return torch.zeros((height, width), dtype=torch.uint8, device=masks.device)
    # Each pixel takes the largest number of the masks that cover it: the first in order has `count`, "no mask" has 0.
    dtype = torch.uint8 if count <= 255 else torch.int32
    number = torch.arange(count, 0, -1, device=masks.device).to(dtype)[:, None, None]
    winner = torch.empty((height, width), dtype=torch.int64, device=masks.device)
    step = max(1, _BLOCK // (count * width))
    for start in range(0, height, step):
        part = masks[order, start : start + step]
        winner[start : start + step] = (part.to(dtype) * number).amax(0)
    table = torch.cat((labels.new_zeros(1), labels[order].flip(0))).to(torch.uint8)
    return table.index_select(0, winner.flatten()).view_as(winner)


def rasterize_packed(masks: PackedMasks, labels: Tensor, order: Tensor) -> Tensor:
    """Paint packed masks in an order, `[K]` int64, with `labels [N]` on the CPU; as `rasterize`, but unchecked."""
    order = order[labels[order] > 0]
    return torch.from_numpy(masks.paint(labels[order].to(torch.uint8).numpy(), order.numpy()))


def rasterize_id_map(id_map: Tensor, labels: Tensor) -> Tensor:
    """Paint disjoint masks by one look-up table; as `rasterize`, for which the scores then do not matter.

    Args:
        id_map: `[H, W]` integers below `N`: the mask of each pixel, negative for none.
        labels: `[N]` integers, 0..254.

    Returns:
        `[H, W]` uint8.

    Raises:
        ValueError: a label outside 0..254.
    """
    check_labels(labels)
    table = torch.cat((labels.new_zeros(1), labels)).to(torch.uint8)
    ids = id_map if id_map.dtype == torch.int32 else id_map.long()
    return table.index_select(0, (ids + 1).clamp_(min=0).flatten()).view_as(id_map)


def check_labels(labels: Tensor) -> None:
    """Raise ValueError unless all labels are in 0..254."""
    if bool(((labels < 0) | (labels > 254)).any()):
        raise ValueError(f"labels: got {labels.tolist()}, expected 0..254 (0 background, 255 is reserved for ignore)")
