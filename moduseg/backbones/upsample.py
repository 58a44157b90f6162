"""From the patch grid back to the pixels of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.backbones.inputs import MAX_ASPECT
from moduseg.structures import TokenMap

_PART = 1 << 18
"""Weights of positions and cells that are made at once for a strip."""


def upsample(maps: Tensor, token_map: TokenMap) -> Tensor:
    """Return bilinear values of patch maps at every pixel centre of the image; padding and resizing are undone.

    Patch `(i, j)` is centred at `((i + 0.5) * stride, (j + 0.5) * stride)` of the input. Beyond the outermost centres
    the border is repeated.

    Args:
        maps: `[R, h, w]` float on the grid of `token_map`.
        token_map: the grid, the size of the image and its size as input; its tokens are not read.

    Returns:
        `[R, H, W]` float of the same type, on the same device.

    Raises:
        ValueError: the maps are on another grid.
    """
    if maps.ndim != 3 or maps.shape[1:] != token_map.tokens.shape[:2]:
        raise ValueError(
            f"maps: got {tuple(maps.shape)}, expected [R, h, w] on the grid {tuple(token_map.tokens.shape[:2])}"
        )
    stride, is_strip = token_map.stride, max(token_map.image_size) > MAX_ASPECT * min(token_map.image_size)
    rows, columns = (
        (_make_centres(pixels, maps) / pixels * source).split(max(1, _PART // cells) if is_strip else pixels)
        for pixels, source, cells in zip(token_map.image_size, token_map.input_size, maps.shape[1:], strict=True)
    )
    # Two small matrix products, which are exact and repeatable on every device. A strip takes its long side in parts.
    down = [_make_interpolation(part, maps.shape[1], stride) @ maps for part in rows]
    tall = down[0] if len(down) == 1 else torch.cat(down, dim=1)
    across = [tall @ _make_interpolation(part, maps.shape[2], stride).T for part in columns]
    return across[0] if len(across) == 1 else torch.cat(across, dim=2)


def regrid(token_map: TokenMap, target: TokenMap) -> Tensor:
    """Return bilinear values of one map's tokens at the patch centres of another map of the same image.

    The two may have different strides and input sizes; tokens keep their position in the image. Beyond the
    outermost centres the border is repeated.

    Args:
        token_map: the tokens, `[h, w, C]`.
        target: the grid `h' x w'`; its tokens are not read.

    Returns:
        `[h', w', C]`, the type and device of `token_map`'s tokens.

    Raises:
        ValueError: the maps are of images of other sizes.
    """
    if token_map.image_size != target.image_size:
        raise ValueError(f"token maps: got images of {token_map.image_size} and {target.image_size}, expected one size")
    tokens = token_map.tokens
    rows, columns = (
        _make_interpolation(
            _make_centres(cells, tokens) * (target.stride / target_side * side), tokens.shape[axis], token_map.stride
        )
        for axis, (cells, target_side, side) in enumerate(
            zip(target.tokens.shape[:2], target.input_size, token_map.input_size, strict=True)
        )
    )
    down = (rows @ tokens.flatten(1)).unflatten(1, tokens.shape[1:])
    return columns @ down


def _make_centres(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype) + 0.5


def _make_interpolation(centres: Tensor, cells: int, stride: int) -> Tensor:
    """Return `[n, cells]` weights of each cell at `n` positions along one axis of the input, in its pixels."""
    position = (centres / stride - 0.5).clamp(0, cells - 1)
    distance = (position[:, None] - (_make_centres(cells, centres) - 0.5)).abs()
    return (1 - distance).clamp(min=0)
