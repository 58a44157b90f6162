"""From images to the batches that a model takes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.devices import copy_arrays
from moduseg.errors import DataError

Key = TypeVar("Key", bound=Hashable)


def to_inputs(images: Sequence[np.ndarray], short_side: int | None, device: torch.device) -> list[Tensor]:
    """Return images as the model sees them before padding and normalisation; they are copied to the device at once.

    Args:
        images: `[H, W, 3]` uint8 RGB each.
        short_side: pixels of the short side after resizing; the image's own size if `None`.
        device: where the results are put.

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
    return [_resize(pixels.permute(2, 0, 1).float() / 255.0, short_side) for pixels in copy_arrays(images, device)]


def _resize(pixels: Tensor, short_side: int | None) -> Tensor:
    """Return `[3, H, W]` in [0, 1] resized to `short_side` pixels; as it is if it has them, or for `None`."""
    sides = pixels.shape[1:]
    if short_side is None or short_side == min(sides):
        return pixels
    scale = short_side / min(sides)
    size = tuple(max(1, round(side * scale)) for side in sides)
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
