"""Overlapping proposals as disjoint regions: one map of ids, or masks without a common pixel."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.bits import PACKED, PackedMasks
from moduseg.structures import Proposals

RegionOrder = Literal["score", "area", "largest"]
_BLOCK = 1 << 25
"""Mask pixels turned into integers at once, on devices that pack no masks: this bounds the memory."""


def make_id_map(proposals: Proposals, order: RegionOrder = "score") -> Tensor:
    """Return the region of each pixel.

    Args:
        proposals: masks that may overlap.
        order: which proposal has a pixel that several cover: `score` the one with the highest predicted IoU, `area` the
            smallest one, `largest` the largest one. Equal proposals: the first in the list; of equally large ones the
            last, since `largest` is what painting in ascending area leaves.

    Returns:
        `[H, W]` int64 on the device of the masks: the proposal's index, -1 for none.
    """
    masks = proposals.masks
    if not len(masks):
        return torch.full(masks.shape[1:], -1, dtype=torch.int64, device=masks.device)
    key = -proposals.predicted_iou if order == "score" else proposals.areas
    best_first = key.argsort(stable=True)
    if order == "largest":
        best_first = best_first.flip(0)
    stacked = masks[best_first]
    # argmax takes the first of equal maxima.
    return torch.where(stacked.any(0), best_first[stacked.to(torch.uint8).argmax(0)], -1)


def find_first(masks: Tensor, order: Tensor) -> Tensor:
    """Return which mask covers each pixel first.

    Args:
        masks: `[N, H, W]` bool.
        order: `[K]` int64, indices of masks, first to last, on the device of the masks.

    Returns:
        `[H, W]` int64, positions in `order`, -1 where none of its masks is.
    """
    count = len(order)
    if not count:
        return torch.full(masks.shape[1:], -1, dtype=torch.int64, device=masks.device)
    if masks.device.type in PACKED:
        painted = PackedMasks.of(masks).paint(np.arange(1, count + 1, dtype=np.int32), order.numpy())
        return torch.from_numpy(painted).long() - 1
    # The first mask has the highest rank. One maximum for many masks: the host does not wait for each.
    step = max(1, _BLOCK // max(1, masks[0].numel()))
    best = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    for start in range(0, count, step):
        rows = order[start : start + step]
        ranks = torch.arange(count - start, count - start - len(rows), -1, dtype=torch.int32, device=masks.device)
        best = torch.maximum(best, (masks[rows] * ranks[:, None, None]).amax(0))
    return torch.where(best > 0, count - best, -1).long()


def to_disjoint(proposals: Proposals) -> Proposals:
    """Give each pixel to the first proposal that covers it.

    Args:
        proposals: best first.

    Returns:
        The pixels that each mask keeps; masks without a pixel are dropped, scores are unchanged.
    """
    if not len(proposals):
        return proposals
    # argmax takes the first of equal maxima.
    owner = proposals.masks.to(torch.uint8).argmax(0)
    index = torch.arange(len(proposals), device=owner.device)
    masks = proposals.masks & (owner == index[:, None, None])
    disjoint = Proposals(masks, proposals.predicted_iou, proposals.stability_score)
    return disjoint.select(disjoint.areas > 0)
