"""From an image to what a model is fed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.errors import DataError


def to_input(image: np.ndarray, short_side: int | None, device: torch.device) -> Tensor:
    """`[3, H', W']` float32 in [0, 1] on the device, at the size that the model sees before padding.

    Raises:
        DataError: not `[H, W, 3]` uint8 with at least one pixel.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(
            f"image: got {image.shape} {image.dtype}, expected [H, W, 3] uint8 RGB with at least one pixel; "
            "read it with moduseg.datasets.io.read_image"
        )
    # Copied: a tensor may not share memory with a read-only or negatively strided array.
    tensor = torch.from_numpy(np.array(image, order="C")).to(device).permute(2, 0, 1).float() / 255.0
    if short_side is None or short_side == min(image.shape[:2]):
        return tensor
    scale = short_side / min(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    return F.interpolate(tensor[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
