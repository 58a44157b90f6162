"""Regions of a patch grid: from pixels to patches, and which of them belong together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_regions(ids: Tensor, grid: tuple[int, int], stride: int, input_size: tuple[int, int]) -> Tensor:
    """Return the region at the centre of each patch (nearest neighbour).

    Args:
        ids: `[H, W]` of an image.
        grid: `(h, w)` patches.
        stride: side of a patch, in pixels of the input.
        input_size: `(H', W')` of the model's input before padding. A patch centre in the padding counts as on the
            border: part of the patch is in the image.

    Returns:
        `[h, w]`.
    """
    rows, columns = (
        ((torch.arange(cells, device=ids.device) + 0.5) * (stride * pixels / side)).long().clamp(max=pixels - 1)
        for cells, pixels, side in zip(grid, ids.shape, input_size, strict=True)
    )
    return ids[rows[:, None], columns]


def merge_regions(tokens: Tensor, regions: Tensor, count: int, eps: float = 0.2) -> Tensor:
    """Return which regions belong together: clusters of regions whose mean tokens are close.

    DBSCAN with `min_samples` 1 on `max(sim) - sim`, `sim` the cosines of the mean normalised tokens. Up to two regions
    stay as they are (docs/method.md, section CorrCLIP).

    Args:
        tokens: `[h, w, C]` of the model that gives the affinities.
        regions: `[h, w]` int64, ids below `count`, -1 for no region.
        count: how many ids there may be.
        eps: distance up to which two regions are merged; 0 merges nothing.

    Returns:
        `[count + 1]` int64 on the device of `regions`: the merged id of each region, 0 and up; -1 for a region that is
        on no patch, and as last entry, so that indexing with -1 keeps "no region".
    """
    merged_ids = torch.full((count + 1,), -1, dtype=torch.int64, device=regions.device)
    present = regions[regions >= 0].unique()
    merged_ids[present] = torch.arange(len(present), device=regions.device)
    if len(present) <= 2 or eps == 0:
        return merged_ids
    from sklearn.cluster import DBSCAN

    directions = F.normalize(tokens.float().flatten(0, 1), dim=-1)
    weights = (regions.flatten() == present[:, None]).to(directions.dtype)
    means = F.normalize(weights @ directions / weights.sum(1, keepdim=True), dim=-1).double()
    similarity = means @ means.T
    # Rounding must not put a region at a distance from itself: it would be noise at a small eps.
    distance = (similarity.max() - similarity).fill_diagonal_(0).cpu().numpy()
    clusters = DBSCAN(eps=eps, min_samples=1, metric="precomputed").fit_predict(distance)
    merged_ids[present] = torch.from_numpy(clusters).to(merged_ids)
    return merged_ids
