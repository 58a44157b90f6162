"""Every pixel takes the label of most proposals that hold it: for several segmentations of one image, side by side.

Superpixels of one segmentation cut objects in one way, those of another in another way; none is right everywhere, and
NMS by score between them believes one. Here all of them vote. An option, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.retrieval.rasterize import check_labels
from moduseg.retrieval.suppress import check_scored_masks

_BLOCK = 1 << 22
"""Mask pixels looked at together, which bounds the memory."""
_UNIT = 1 << 20
"""Scores are added in whole parts of this, so that no order of sums changes a choice."""


def assemble_majority(masks: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """The label map in which all proposals vote.

    Args:
        masks: `[N, H, W]` bool; they may overlap.
        labels: `[N]` integers, 0..254; background proposals vote like the others.
        scores: `[N]` float in [-1, 1]: of labels with equally many proposals, the one with the larger sum wins; then
            the smaller label.

    Returns:
        `[H, W]` uint8; background where there is no proposal.

    Raises:
        ValueError: shapes that do not fit, or a label outside 0..254.
    """
    check_scored_masks(masks, labels, scores)
    check_labels(labels)
    count, height, width = masks.shape
    label_map = torch.zeros((height, width), dtype=torch.uint8, device=masks.device)
    if count == 0 or height * width == 0:
        return label_map
    step = max(1, _BLOCK // (count * width))
    for start in range(0, height, step):
        part = masks[:, start : start + step]
        label_map[start : start + step] = majority(part.flatten(1), labels, scores).view_as(part[0])
    return label_map


def majority(cover: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """`[P]` uint8: the label of most proposals that hold each pixel; see `assemble_majority`.

    Args:
        cover: `[N, P]` bool, `N >= 1`, whether a proposal holds a pixel.
        labels, scores: `[N]`, see `assemble_majority`.
    """
    distinct, which = labels.long().unique(return_inverse=True)
    counts = cover.new_zeros((len(distinct), cover.shape[1]), dtype=torch.int32)
    counts.index_add_(0, which, cover.int())
    most = counts.amax(0)
    leads = counts == most
    # `distinct` ascends: the first that leads is the smallest.
    order = torch.arange(len(distinct), device=cover.device)[:, None].expand_as(leads)
    winner = order.masked_fill(~leads, len(distinct)).amin(0)
    tied = ((leads.sum(0) > 1) & (most > 0)).nonzero()[:, 0]
    if len(tied):
        worth = ((scores.float().clamp(-1, 1) + 1) * _UNIT).round().long()
        sums = torch.zeros((len(distinct), len(tied)), dtype=torch.int64, device=cover.device)
        sums.index_add_(0, which, cover[:, tied].long() * worth[:, None])
        sums.masked_fill_(~leads[:, tied], -1)
        best = sums == sums.amax(0)
        winner[tied] = order[:, tied].masked_fill(~best, len(distinct)).amin(0)
    return torch.where(most > 0, distinct[winner], 0).to(torch.uint8)
