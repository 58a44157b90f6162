"""The steps of DiffSeg (Tian et al., 2024) on maps of self-attention: tensors in, tensors out, on any device.

A map says how much a cell looks at each of `N` cells: non-negative, summing to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-12
"""What smaller entries of a map count as in a divergence, whose logarithms have to be finite."""
_BLOCK = 1 << 22
"""Entries of brought-up maps that are made at once, which bounds the memory beside the sum."""


def aggregate_levels(levels: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the self-attention of several sizes as one, at the largest of them.

    What a cell looks at is brought to the largest side (bilinear) and divided by its sum; a cell of a coarser map
    stands for all cells of the finest one that it covers.

    Args:
        levels: `[S_l, S_l]` each, `S_l` being the cells of a square map, row by row; rows are cells that look.
        weights: a factor for each level; their sum is divided out.

    Returns:
        `[N, N]`, `N` cells of the largest map; rows sum to 1.
    """
    sides = [round(len(level) ** 0.5) for level in levels]
    side, total = max(sides), float(sum(weights))
    cells = torch.arange(side, device=levels[0].device)
    merged = levels[0].new_zeros(side * side, side * side)
    for level, level_side, weight in zip(levels, sides, weights, strict=True):
        # The cell of this level that covers each row, or column, of the largest map.
        covering = cells * level_side // side
        source = (covering[:, None] * level_side + covering).flatten()
        rows = max(1, _BLOCK // (side * side))
        for start in range(0, side * side, rows):
            part = level[source[start : start + rows]].unflatten(1, (level_side, level_side))
            if level_side != side:
                part = F.interpolate(part[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
            flat = part.flatten(1)
            merged[start : start + rows] += flat / flat.sum(1, keepdim=True) * (weight / total)
    return merged


def choose_anchors(side: int, grid: int) -> Tensor:
    """Return the cells `[grid ** 2]` int64 of a regular grid on a square map, row by row.

    Its spacing is the largest whole number that fits, its margins are equal but for a cell.

    Args:
        side: of the map in cells.
        grid: anchors on a side; at most `side` of them are there.
    """
    count = min(grid, side)
    spacing = (side - 1) // (count - 1) if count > 1 else 1
    first = (side - 1 - spacing * (count - 1)) // 2
    line = first + spacing * torch.arange(count)
    return (line[:, None] * side + line).flatten()


def compute_divergences(first: Tensor, second: Tensor) -> Tensor:
    """Return half the symmetric Kullback-Leibler divergence of maps, `[K, M]`: `(KL(a | b) + KL(b | a)) / 2`.

    Args:
        first: `[K, N]` maps.
        second: `[M, N]` maps.
    """
    first, second = first.clamp(min=_SMALLEST), second.clamp(min=_SMALLEST)
    first_logs, second_logs = first.log(), second.log()
    # The sum of (a - b) (log a - log b), multiplied out, so that it is two products of matrices.
    self_products = (first * first_logs).sum(1)[:, None] + (second * second_logs).sum(1)
    return ((self_products - first @ second_logs.T - first_logs @ second.T) / 2).clamp(min=0)


def merge_maps(attention: Tensor, anchors: Tensor, tau: float, rounds: int) -> Tensor:
    """Return the maps of segments, from those of all cells.

    In the first round each anchor becomes the mean of all cells' maps that are nearer to it than `tau`. In every
    further round the first map that was not taken yet becomes the mean of all maps nearer to it than `tau`, which are
    then taken; one of them may take part in a later mean as well.

    Args:
        attention: `[N, N]` maps of all cells.
        anchors: `[K]` int64 cells.
        tau: limit of `compute_divergences`.
        rounds: 1 or more, the first one included.

    Returns:
        `[S, N]`, one segment or more.
    """
    starts = attention[anchors]
    is_near = compute_divergences(starts, attention) < tau
    # An anchor is near itself, unless tau is 0.
    is_near[torch.arange(len(anchors), device=anchors.device), anchors] = True
    weights = is_near.to(attention.dtype)
    maps = weights @ attention / weights.sum(1, keepdim=True)
    for _ in range(rounds - 1):
        maps = _merge_greedily(maps, tau)
    return maps


def _merge_greedily(maps: Tensor, tau: float) -> Tensor:
    """Return the maps `[S, N]` after one round of merging."""
    # Which maps merge is decided on the host from a table of at most 256 x 256, copied once.
    is_near = (compute_divergences(maps, maps) < tau).cpu()
    is_near.fill_diagonal_(True)
    is_taken = torch.zeros(len(maps), dtype=torch.bool)
    chosen = []
    for index in range(len(maps)):
        if not is_taken[index]:
            is_taken |= is_near[index]
            chosen.append(index)
    weights = is_near[chosen].to(maps.device, maps.dtype)
    return weights @ maps / weights.sum(1, keepdim=True)


def label_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the segment with the largest value at every pixel, the first of equals.

    Args:
        maps: `[S, N]` on a square of `N` cells.
        size: `(height, width)` of the image, to which maps are brought (bilinear).

    Returns:
        `[H, W]` int64 in 0..S-1.
    """
    side = round(maps.shape[1] ** 0.5)
    grid = maps.unflatten(1, (side, side))[None]
    best = torch.full(size, -torch.inf, device=maps.device, dtype=maps.dtype)
    labels = torch.zeros(size, dtype=torch.int64, device=maps.device)
    step = max(1, _BLOCK // (size[0] * size[1]))
    for start in range(0, len(maps), step):
        part = F.interpolate(grid[:, start : start + step], size, mode="bilinear", align_corners=False)[0]
        values, winners = part.max(0)
        is_better = values > best
        labels = torch.where(is_better, winners + start, labels)
        best = torch.where(is_better, values, best)
    return labels
