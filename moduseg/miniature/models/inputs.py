"""From pictures to the inputs of the miniature models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_pixels(image: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Turn an image `[H, W, 3]` uint8 into `[1, 3, H, W]` float32 in [0, 1]."""
    return torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255.0


def normalize_pixels(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Subtract a mean from `[B, 3, H, W]` pixels in [0, 1] and divide by a deviation, colour by colour."""
    shift, scale = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale
