"""The steps of iSeg (Sun et al., 2024) on maps of attention: tensors in, tensors out, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moduseg.pseudo_masks.diffusion_maps import resize_maps, side_of

Logarithm = Literal["log10", "natural"]
_SMALLEST = 1e-6
"""What a zero of a distribution is replaced by before distributions are compared."""
_OFFSET = 1e-5
"""What is added to both distributions in their divergence."""


def check_propagation(self_places: Sequence[str], entropy: float, logarithm: str, iterations: int) -> None:
    """Check the settings of the propagation, which generator and discoverer share.

    Args:
        self_places: layers along whose self-attention maps spread, 1 or more.
        entropy: lambda of the entropy reduction, 0 or more.
        logarithm: one of `Logarithm`.
        iterations: 0 or more.

    Raises:
        ValueError: a value out of range.
    """
    if not self_places:
        raise ValueError("self_places: got none, expected one layer or more; iSeg has [up3.1]")
    if not entropy >= 0:
        raise ValueError(f"entropy: got {entropy}, expected 0 or more; iSeg has 0.015 for VOC")
    if logarithm not in get_args(Logarithm):
        names = ", ".join(get_args(Logarithm))
        raise ValueError(f"logarithm: got {logarithm!r}, expected one of {names}; iSeg's code has log10")
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, expected 0 or more; iSeg has 10 for VOC")


def merge_levels(levels: Sequence[Tensor], weights: Sequence[float], side: int) -> Tensor:
    """Return the weighted sum of cross-attention of several sizes, each token's map divided by its sum first.

    Args:
        levels: `[N, L]` each, a column for each token.
        weights: a factor for each level.
        side: of the result.

    Returns:
        `[side ** 2, L]`.
    """
    merged = [weight * resize_maps(_divide_by_sum(level), side) for level, weight in zip(levels, weights, strict=True)]
    return torch.stack(merged).sum(0)


def cluster_cells(maps: Tensor, stride: int, rounds: int) -> Tensor:
    """Return the cluster of each cell by k-means with the symmetric Kullback-Leibler divergence.

    `(KL(a | b) + KL(b | a)) / 2` compares the columns of two cells. Clusters start from cells on a grid and vanish when
    they have no cell; a cell between two goes to the one that comes first on the grid.

    Args:
        maps: `[N, L]` >= 0.
        stride: cells between two starts of a row or column; the first start is the first cell.
        rounds: how often cells are assigned, 1 or more.

    Returns:
        `[N]` int64, numbers of starts.
    """
    side = side_of(maps)
    distributions = torch.where(maps == 0, _SMALLEST, maps)
    grid = torch.arange(side * side, device=maps.device).view(side, side)[::stride, ::stride].flatten()
    centres = distributions[grid]
    has_cells = torch.ones(len(centres), dtype=torch.bool, device=maps.device)
    clusters = torch.zeros(len(maps), dtype=torch.int64, device=maps.device)
    for remaining in reversed(range(rounds)):
        divergence = _compute_divergence(centres, distributions)
        clusters = divergence.masked_fill(~has_cells[:, None], torch.inf).argmin(0)
        if remaining:
            centres, num_cells = _compute_means(distributions, clusters, len(grid))
            has_cells = num_cells > 0
    return clusters


def average_clusters(maps: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Return maps `[N, L]` in which every cell has the mean of its cluster.

    Args:
        maps: `[N, L]`.
        clusters: `[N]` int64, numbers below `num_clusters`.
        num_clusters: some of them may be empty.
    """
    means, _ = _compute_means(maps, clusters, num_clusters)
    return means[clusters]


def reduce_entropy(attention: Tensor, strength: float, logarithm: Logarithm = "log10") -> Tensor:
    """Return self-attention whose weak connections are cut, so that classes spread over fewer wrong cells.

    Each column is divided by its maximum; `A <- max(0, A + strength * log(e * A))`, where zeros stay zero; rows are
    divided by their sums.

    Args:
        attention: `[N, N]` >= 0; row: the cell that looks, column: the cell that is looked at.
        strength: lambda, 0 or more; 0 cuts nothing.
        logarithm: `log10`, as iSeg's code has it, or `natural`.

    Returns:
        `[N, N]`; rows sum to 1. A row of zeros stays one.
    """
    tiny = torch.finfo(attention.dtype).tiny
    scaled = attention / attention.amax(0, keepdim=True).clamp(min=tiny)
    # log(e A) = log(e) + log(A); the logarithm of a zero is minus infinity, which is cut to zero again.
    unit = math.log10(math.e) if logarithm == "log10" else 1.0
    if strength:
        scaled = (scaled + strength * unit * (1 + scaled.log())).clamp_(min=0)
    return scaled / scaled.sum(1, keepdim=True).clamp(min=tiny)


def propagate(maps: Tensor, connections: Tensor, iterations: int) -> Tensor:
    """Return class maps after `X <- P X`, minus the minimum, divided by the sum, several times.

    Args:
        maps: `[N, C]`.
        connections: `[N, N]`, P.
        iterations: how often, 0 or more; 0 returns the maps as they are.

    Returns:
        `[N, C]`; after one iteration or more, columns have minimum 0 and sum 1. A column that is the same everywhere
        becomes zero.
    """
    for _ in range(iterations):
        maps = shift_to_zero(connections @ maps)
    return maps


def shift_to_zero(maps: Tensor) -> Tensor:
    """Return maps `[N, C]` minus each column's minimum, divided by its sum; zeros for a column of equal values."""
    return _divide_by_sum(maps - maps.amin(0, keepdim=True))


def _divide_by_sum(maps: Tensor) -> Tensor:
    """Return maps `[N, C]` >= 0 divided by each column's sum; zeros stay zero."""
    return maps / maps.sum(0, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _compute_divergence(centres: Tensor, distributions: Tensor) -> Tensor:
    """Return the symmetric divergence `[K, N]` between `[K, L]` centres and `[N, L]` distributions."""
    centres, distributions = centres + _OFFSET, distributions + _OFFSET
    logs = distributions.log()
    # (KL(a | b) + KL(b | a)) / 2 is half the sum of (a - b) (log a - log b): in this form, equal ones are exactly 0.
    rows = [((centre - distributions) * (centre.log() - logs)).sum(1) / 2 for centre in centres]
    return torch.stack(rows)


def _compute_means(maps: Tensor, clusters: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the mean `[K, L]` of each cluster's cells, zero for an empty one, and their numbers `[K]`."""
    membership = torch.zeros(num_clusters, len(maps), dtype=maps.dtype, device=maps.device)
    membership.scatter_(0, clusters[None], 1.0)
    num_cells = membership.sum(1)
    return membership @ maps / num_cells.clamp(min=1)[:, None], num_cells
