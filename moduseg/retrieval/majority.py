"""Every pixel takes the label of most proposals that hold it: for several segmentations of one image, side by side.

Superpixels of one segmentation cut objects in one way, those of another in another way; none is right everywhere, and
NMS by score between them believes one. Here all of them vote. An option, not in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.cells import Cells, partition
from moduseg.retrieval.rasterize import check_labels
from moduseg.retrieval.suppress import check_scored_masks

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
    if masks.numel() == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    # Pixels that the same masks hold get the same label: there are a few hundred such cells, not thousands.
    code, place = partition(masks)
    return majority(masks.flatten(1)[:, place], labels, scores)[code].view(masks.shape[1:])


def majority(cover: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """`[P]` uint8: the label of most proposals that hold each of some pixels; see `assemble_majority`.

    Args:
        cover: `[N, P]` bool, `N >= 1`, whether a proposal holds a pixel.
        labels, scores: `[N]`, see `assemble_majority`.
    """
    distinct, which = labels.long().unique(return_inverse=True)
    shape = (len(distinct), cover.shape[1])
    held = cover.long()
    counts = torch.zeros(shape, dtype=torch.int64, device=cover.device).index_add_(0, which, held)
    worth = ((scores.float().clamp(-1, 1) + 1) * _UNIT).round().long()
    sums = torch.zeros_like(counts).index_add_(0, which, held * worth[:, None])
    most = counts.amax(0)
    sums.masked_fill_(counts < most, -1)
    # `distinct` ascends: the first of those with the largest sum is the smallest.
    order = torch.arange(len(distinct), device=cover.device)[:, None].expand(shape)
    winner = order.masked_fill(sums < sums.amax(0), len(distinct)).amin(0)
    return torch.where(most > 0, distinct[winner], 0).to(torch.uint8)


def majority_of_cells(cells: Cells, places: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`[U]` int64: the label of most of some masks in each cell.

    Args:
        cells: of all masks.
        places: `[K]` indices of the masks that vote.
        labels: `[N]` integers, 0 background.
        scores: `[N]` float.
    """
    if not len(places):
        return np.zeros(len(cells.sizes), dtype=np.int64)
    cover = torch.from_numpy(np.ascontiguousarray(cells.cover[:, places].T))
    return majority(cover, torch.from_numpy(labels[places]), torch.from_numpy(scores[places])).long().numpy()
