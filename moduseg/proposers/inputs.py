"""Images resized, normalised and padded for the models of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moduseg.devices import copy_arrays

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MAX_ASPECT = 4
"""A picture whose longest side is more than so many times the shortest one is a strip."""


def prepare_images(
    images: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    black: bool = False,
) -> Tensor:
    """Resize and normalise images, and pad them with zeros at the bottom and right; one copy brings all to the device.

    Resizing is Pillow's bilinear filter on bytes, which all of these models were published with.

    Args:
        images: `[H, W, 3]` uint8 RGB each.
        sizes: `(H', W')` that each image is resized to.
        padded: `(H'', W'')` of the input, at least as large as all sizes.
        mean, std: mean and deviation of values in [0, 1], for each channel.
        device: where the input is put.
        black: pad before the normalisation, as EoMT does, and not after it.

    Returns:
        `[B, 3, *padded]` float32 on the device.
    """
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        for image, (height, width) in zip(images, sizes, strict=True)
    ]
    mean_channels, std_channels = (_to_channels(tuple(values), device) for values in (mean, std))
    inputs = []
    for pixels, (height, width) in zip(copy_arrays(resized, device), sizes, strict=True):
        values = pixels.permute(2, 0, 1)[None].float() / 255
        border = (0, padded[1] - width, 0, padded[0] - height)
        if black:
            inputs.append((F.pad(values, border) - mean_channels) / std_channels)
        else:
            inputs.append(F.pad((values - mean_channels) / std_channels, border))
    return torch.cat(inputs)


@lru_cache
def _to_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number a channel as `[3, 1, 1]` float32, copied to the device once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def fit_longest_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size `(H', W')` whose longest side is `side`, halves rounded up, at least one pixel."""
    scale = side / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def fit_shortest_side(size: tuple[int, int], short: int, max_long: int | None) -> tuple[int, int]:
    """Return the size whose shortest side is `short`, or less if the longest would exceed `max_long`; at least 1.

    Without `max_long`, the longest side of a strip is `_MAX_ASPECT` times `short`: it could have any length.
    """
    shorter, longer = min(size), max(size)
    if max_long is None and longer > _MAX_ASPECT * shorter:
        max_long = _MAX_ASPECT * short
    exact = float(short)
    if max_long is not None and longer / shorter * short > max_long:
        exact = max_long * shorter / longer
    other = int(exact * longer / shorter)
    first = max(1, round(exact))
    return (first, max(1, other)) if size[0] <= size[1] else (max(1, other), first)
