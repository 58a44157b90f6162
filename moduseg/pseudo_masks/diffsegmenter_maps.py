"""The steps of DiffSegmenter (Wang et al., 2023) on maps of attention: tensors in, tensors out, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moduseg.pseudo_masks.diffusion_maps import resize_maps, side_of, stretch


def merge_sizes(levels: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of maps of several sizes, each stretched to [0, 1] first.

    Args:
        levels: `[N, C]` each; all are brought to the largest side before they are stretched.
        weights: a factor for each level.

    Returns:
        `[M, C]` at the largest side. A level that is the same everywhere adds nothing.
    """
    side = max(map(side_of, levels))
    stretched = [
        weight * stretch(resize_maps(level, side), (0,)) for level, weight in zip(levels, weights, strict=True)
    ]
    return torch.stack(stretched).sum(0)


def complete(maps: Tensor, self_attention: Sequence[Tensor]) -> Tensor:
    """Return maps in which every cell has the mean of the cells that it attends to.

    Args:
        maps: `[N, C]`.
        self_attention: `[M, M]` for each side that takes part, rows summing to 1. A side completes the map at its own
            size; the mean over the sides is taken at the map's. None leaves the maps as they are.

    Returns:
        `[N, C]`.
    """
    if not self_attention:
        return maps
    side = side_of(maps)
    completed = [resize_maps(attention @ resize_maps(maps, side_of(attention)), side) for attention in self_attention]
    return torch.stack(completed).mean(0)
