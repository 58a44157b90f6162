"""From images to the batches that a model takes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.devices import copy_arrays
from moduseg.errors import DataError

Key = TypeVar("Key", bound=Hashable)
MAX_ASPECT = 4.0
"""A picture whose long side is more than so many times the short one is a strip; its input size is limited."""
_MAX_STRIP_COST = 1.5
"""How many times the pixels of a square picture the input of a strip may have; padding included."""


def to_inputs(
    images: Sequence[np.ndarray], short_side: int | None, device: torch.device, *, stride: int = 1
) -> list[Tensor]:
    """Return images as the model sees them before padding and normalisation; they are copied to the device at once.

    Args:
        images: `[H, W, 3]` uint8 RGB each.
        short_side: pixels of the short side after resizing; the image's own size if `None`.
        device: where the results are put.
        stride: sides will be padded to multiples of it, in pixels.

    Returns:
        `[3, H', W']` float32 in [0, 1] each.

    Raises:
        DataError: not `[H, W, 3]` uint8 with at least one pixel.
    """
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise DataError(
                f"image: got {image.shape} {image.dtype}, expected [H, W, 3] uint8 RGB with at least one pixel; "
                "read it with moduseg.datasets.io.read_image"
            )
    return [
        _resize(pixels.permute(2, 0, 1).float() / 255.0, fit_input(image.shape[:2], short_side, stride))
        for image, pixels in zip(images, copy_arrays(images, device), strict=True)
    ]


def fit_input(size: tuple[int, int], short_side: int | None, stride: int = 1) -> tuple[int, int]:
    """Return the size to which a picture is resized before a model sees it.

    The short side gets `short_side` pixels. Of a strip the long side would then have any length; it gets a size of at
    most one and a half times the pixels of a square of that side, which needs no padding across. A strip that is not
    resized is shortened only if it is so thin that padding would more than double it.

    Args:
        size: `(H, W)` of the picture.
        short_side: in pixels; the picture's own size if `None`.
        stride: sides will be padded to multiples of it, in pixels.

    Returns:
        `(H', W')`, at least one pixel each.
    """
    short, long = min(size), max(size)
    scale = 1.0 if short_side is None else short_side / short
    if long > MAX_ASPECT * short and short_side is not None:
        allowed = _MAX_STRIP_COST * short_side**2
        num_patches = max(1, int(short * min(scale, math.sqrt(allowed / (short * long))) / stride))
        scale = min(num_patches * stride / short, allowed / (num_patches * stride * long))
    elif long > MAX_ASPECT * short and 2 * short < stride:
        scale = _MAX_STRIP_COST * short / stride
    if scale == 1.0:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `[3, H, W]` in [0, 1] resized to `size`; as it is if it has that size."""
    if size == tuple(pixels.shape[1:]):
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def round_up(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """Return `(height, width)` rounded up to multiples of a number of pixels."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def batch_equal(keys: Sequence[Key], batch_size: int) -> Iterator[tuple[Key, list[int]]]:
    """Yield each key with the indices of up to `batch_size` of its equals, in the order in which keys first occur."""
    groups: dict[Key, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for key, members in groups.items():
        for start in range(0, len(members), batch_size):
            yield key, members[start : start + batch_size]


def pad_and_stack(inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return one batch `[B, 3, *size]` of inputs `[3, H', W']`, padded with black at the bottom and right."""
    batch = torch.zeros(len(inputs), 3, *size, device=inputs[0].device)
    for row, tensor in zip(batch, inputs, strict=True):
        row[:, : tensor.shape[1], : tensor.shape[2]] = tensor
    return batch
