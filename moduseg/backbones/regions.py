"""Regions of a patch grid: from masks to ids, from pixels to patches, and which of them are one thing (CorrCLIP)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.structures import Proposals

RegionOrder = Literal["score", "area"]


def make_id_map(proposals: Proposals, order: RegionOrder = "score") -> Tensor:
    """One region for each pixel.

    Args:
        proposals: masks that may overlap.
        order: which proposal has a pixel that several claim: `score` the one with the highest score, `area` the
            smallest one. Equal ones: the one listed first.

    Returns:
        `[H, W]` int64 on the device of the masks: the proposal's index, -1 where there is none.
    """
    masks = proposals.masks
    if not len(masks):
        return torch.full(masks.shape[1:], -1, dtype=torch.int64, device=masks.device)
    key = -proposals.predicted_iou if order == "score" else proposals.areas
    best_first = key.argsort(stable=True)
    stacked = masks[best_first]
    # argmax takes the first of equal maxima.
    return torch.where(stacked.any(0), best_first[stacked.to(torch.uint8).argmax(0)], -1)


def sample_regions(ids: Tensor, grid: tuple[int, int], stride: int, input_size: tuple[int, int]) -> Tensor:
    """The region at the centre of each patch (nearest neighbour).

    Args:
        ids: `[H, W]` of an image.
        grid: `(h, w)` patches.
        stride: side of a patch, in pixels of the input.
        input_size: `(H', W')` of the image as the model saw it before padding. The centre of a patch that lies in the
            padding counts as on the border: part of the patch is in the image.

    Returns:
        `[h, w]`.
    """
    rows, columns = (
        ((torch.arange(cells, device=ids.device) + 0.5) * (stride * pixels / seen)).long().clamp(max=pixels - 1)
        for cells, pixels, seen in zip(grid, ids.shape, input_size, strict=True)
    )
    return ids[rows[:, None], columns]


def merge_regions(tokens: Tensor, regions: Tensor, count: int, eps: float = 0.2) -> Tensor:
    """Which regions are one thing: clusters of regions whose mean tokens are close (METHOD, CorrCLIP, 2).

    DBSCAN with `min_samples` 1 on `max(sim) - sim`, `sim` the cosines of the mean normalised tokens. Up to two regions
    stay as they are.

    Args:
        tokens: `[h, w, C]` of the model that gives the affinities.
        regions: `[h, w]` int64, ids below `count`, -1 for no region.
        count: how many ids there may be.
        eps: distance up to which two regions are one; 0 merges nothing.

    Returns:
        `[count + 1]` int64 on the device of `regions`: the merged id of each region, 0 and up; -1 for a region that is
        on no patch, and in the last place, so that indexing by -1 leaves no region what it is.
    """
    table = torch.full((count + 1,), -1, dtype=torch.int64, device=regions.device)
    present = regions[regions >= 0].unique()
    table[present] = torch.arange(len(present), device=regions.device)
    if len(present) <= 2 or eps == 0:
        return table
    from sklearn.cluster import DBSCAN

    directions = F.normalize(tokens.float().flatten(0, 1), dim=-1)
    weights = (regions.flatten() == present[:, None]).to(directions.dtype)
    means = F.normalize(weights @ directions / weights.sum(1, keepdim=True), dim=-1).double()
    similarity = means @ means.T
    # A region is at no distance from itself, whatever rounding says: else it would be noise at a small eps.
    distance = (similarity.max() - similarity).fill_diagonal_(0).cpu().numpy()
    clusters = DBSCAN(eps=eps, min_samples=1, metric="precomputed").fit_predict(distance)
    table[present] = torch.from_numpy(clusters).to(table)
    return table
