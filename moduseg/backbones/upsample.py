"""From the patch grid back to the pixels of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.structures import TokenMap


def upsample(maps: Tensor, token_map: TokenMap) -> Tensor:
    """Bilinear values of patch maps at every pixel centre of the image, padding and resizing undone.

    Patch `(i, j)` is centred at `((i + 0.5) * stride, (j + 0.5) * stride)` of the input. Beyond the outermost centres
    the border is repeated.

    Args:
        maps: `[R, h, w]` float on the grid of `token_map`.
        token_map: the grid, the size of the image and the size it had as input; its tokens are not read.

    Returns:
        `[R, H, W]` float of the same type, on the same device.

    Raises:
        ValueError: the maps are on another grid.
    """
    if maps.ndim != 3 or maps.shape[1:] != token_map.tokens.shape[:2]:
        raise ValueError(
            f"maps: got {tuple(maps.shape)}, expected [R, h, w] on the grid {tuple(token_map.tokens.shape[:2])}"
        )
    rows, columns = (
        _interpolation(image, source, cells, token_map.stride, maps)
        for image, source, cells in zip(token_map.image_size, token_map.input_size, maps.shape[1:], strict=True)
    )
    # Two small matrix products, which are exact and repeatable on every device.
    return rows @ maps @ columns.T


def _interpolation(pixels: int, source: int, cells: int, stride: int, like: Tensor) -> Tensor:
    """`[pixels, cells]` weights of each cell at each pixel centre along one axis."""
    centres = (torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5) * (source / pixels)
    position = (centres / stride - 0.5).clamp(0, cells - 1)
    distance = (position[:, None] - torch.arange(cells, device=like.device, dtype=like.dtype)).abs()
    return (1 - distance).clamp(min=0)
