"""Steps that DiffSegmenter and iSeg share, on maps of attention: tensors in, tensors out, on any device.

A map of `C` tokens or classes over `side x side` cells is `[N, C]`, `N = side ** 2` cells row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def side_of(maps: Tensor) -> int:
    """Return the side of square maps `[N, C]` in cells.

    Raises:
        ValueError: `N` is no square.
    """
    side = math.isqrt(len(maps))
    if side * side != len(maps):
        raise ValueError(f"maps: got {len(maps)} cells, expected a square number")
    return side


def resize_maps(maps: Tensor, side: int) -> Tensor:
    """Return maps `[N, C]` at another side (bilinear), `[side ** 2, C]`; as they are if it is theirs."""
    own_side = side_of(maps)
    if own_side == side:
        return maps
    grid = maps.T.unflatten(1, (own_side, own_side))[None]
    return F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)[0].flatten(1).T


def to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps `[N, C]` at the size of an image (bilinear), `[C, H, W]`."""
    side = side_of(maps)
    return F.interpolate(maps.T.unflatten(1, (side, side))[None], size, mode="bilinear", align_corners=False)[0]


def stretch(maps: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return values stretched to [0, 1] over `dims` (min-max); zeros where all are equal.

    Args:
        maps: float, of any shape.
        dims: over which minimum and maximum are taken.
    """
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), torch.zeros_like(maps))


def select_columns(maps: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean column of each class's tokens.

    Args:
        maps: `[N, L]`, a column for each token.
        spans: positions of the tokens of each of `C` classes.

    Returns:
        `[N, C]`.
    """
    return torch.stack([torch.stack([maps[:, position] for position in span]).mean(0) for span in spans], 1)


def renormalise_content(maps: Tensor, content: Sequence[int]) -> Tensor:
    """Return cross-attention divided by what each cell gives to the content of the text.

    Start, end and padding draw most of the attention; without them the words of the text compete with each other alone
    (an idea of GoCA).

    Args:
        maps: `[N, L]` >= 0, a column for each token.
        content: positions of the text's own tokens.

    Returns:
        `[N, L]`: rows sum to 1 over the content; other columns are 0.
    """
    is_content = torch.zeros(maps.shape[1], dtype=maps.dtype)
    is_content[list(content)] = 1
    kept = maps * is_content.to(maps.device)
    return kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
