"""Each pixel takes the label of most proposals that cover it: for several segmentations of one image together.

Superpixels of one segmentation cut objects in one way, those of another in another way; none is right everywhere, and
NMS by score between them trusts a single one. Here all of them vote. An option, not in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.cells import Cells, split_into_cells
from moduseg.retrieval.rasterize import check_labels
from moduseg.retrieval.suppress import check_scored_masks

_UNIT = 1 << 20
"""Scores are rounded to this fraction and added as integers, so that the order of a sum changes no choice."""


def assemble_majority(masks: Tensor, labels: Tensor, scores: Tensor, parents: Tensor | None = None) -> Tensor:
    """Return the label map in which all proposals vote.

    Args:
        masks: `[N, H, W]` bool; they may overlap.
        labels: `[N]` integers, 0..254; background proposals vote like the others.
        scores: `[N]` float in [-1, 1]: of labels with equally many proposals, the one with the larger sum wins; then
            the smaller label.
        parents: `[N]` int64 of masks that may be nested (`Proposals.parents`): the same map sooner. Each of the nested
            masks of a pixel has a vote, the large ones too.

    Returns:
        `[H, W]` uint8; background where no proposal is.

    Raises:
        ValueError: shapes that do not fit, or a label outside 0..254.
    """
    check_scored_masks(masks, labels, scores)
    check_labels(labels)
    if masks.numel() == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    # Pixels that the same masks cover get the same label: there are a few hundred such cells, not thousands.
    cell_of, cell_pixels = split_into_cells(masks, parents=parents, in_any_order=True)
    return vote_by_majority(masks.flatten(1)[:, cell_pixels], labels, scores)[cell_of].view(masks.shape[1:])


def vote_by_majority(cover: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Return `[P]` uint8, the label of most proposals that cover each of some pixels.

    Args:
        cover: `[N, P]` bool, `N >= 1`, whether a proposal covers a pixel.
        labels: `[N]` integers, 0..254; background proposals vote too.
        scores: `[N]` float in [-1, 1], for ties as in `assemble_majority`.
    """
    distinct, positions = labels.long().unique(return_inverse=True)
    shape = (len(distinct), cover.shape[1])
    covered = cover.long()
    counts = torch.zeros(shape, dtype=torch.int64, device=cover.device).index_add_(0, positions, covered)
    units = ((scores.float().clamp(-1, 1) + 1) * _UNIT).round().long()
    sums = torch.zeros_like(counts).index_add_(0, positions, covered * units[:, None])
    max_count = counts.amax(0)
    sums.masked_fill_(counts < max_count, -1)
    # `distinct` ascends: the first of those with the largest sum is the smallest.
    order = torch.arange(len(distinct), device=cover.device)[:, None].expand(shape)
    winner = order.masked_fill(sums < sums.amax(0), len(distinct)).amin(0)
    return torch.where(max_count > 0, distinct[winner], 0).to(torch.uint8)


def label_cells_by_majority(cells: Cells, voters: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return `[U]` int64, the label of most of some masks in each cell.

    Args:
        cells: of all masks.
        voters: `[K]` indices of the masks that vote.
        labels: `[N]` integers, 0 background.
        scores: `[N]` float.
    """
    if not len(voters):
        return np.zeros(len(cells.sizes), dtype=np.int64)
    cover = torch.from_numpy(np.ascontiguousarray(cells.cover[:, voters].T))
    return vote_by_majority(cover, torch.from_numpy(labels[voters]), torch.from_numpy(scores[voters])).long().numpy()
