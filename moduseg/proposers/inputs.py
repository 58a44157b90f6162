"""Images resized, normalised and padded for the models of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare_image(
    image: np.ndarray,
    size: tuple[int, int],
    padded: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    black: bool = False,
) -> Tensor:
    """Resize and normalise an image, and pad it with zeros at the bottom and right.

    Resizing is Pillow's bilinear filter on bytes, which all of these models were published with.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        size: `(H', W')` that the image is resized to.
        padded: `(H'', W'')` of the input, `size` or more.
        mean, std: mean and deviation of values in [0, 1], for each channel.
        device: where the input is put.
        black: pad before the normalisation, as EoMT does, and not after it.

    Returns:
        `[1, 3, *padded]` float32 on the device.
    """
    height, width = size
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    # Copied: Pillow's memory is read-only.
    pixels = torch.from_numpy(resized.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    channels = [torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std)]
    border = (0, padded[1] - width, 0, padded[0] - height)
    if black:
        return (F.pad(pixels, border) - channels[0]) / channels[1]
    return F.pad((pixels - channels[0]) / channels[1], border)


def fit_longest_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size `(H', W')` whose longest side is `side`, halves rounded up, at least one pixel."""
    scale = side / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def fit_shortest_side(size: tuple[int, int], short: int, max_long: int | None) -> tuple[int, int]:
    """Return the size whose shortest side is `short`, or less if the longest would exceed `max_long`; at least 1."""
    shorter, longer = min(size), max(size)
    exact = float(short)
    if max_long is not None and longer / shorter * short > max_long:
        exact = max_long * shorter / longer
    other = int(exact * longer / shorter)
    first = max(1, round(exact))
    return (first, max(1, other)) if size[0] <= size[1] else (max(1, other), first)
