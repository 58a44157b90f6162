"""Draw where each head of a class token looks."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from moduseg.report.overlay import overlay_heat, resize_image
from moduseg.report.panel import stack_panels

_SIDE = 200
"""Longer side of one head's picture, in pixels."""


def draw_heads(image: np.ndarray, attention: Tensor, is_open: Tensor, *, first_block: int = 1) -> bytes:
    """Return a PNG with a row for each block and a column for each head; the image itself begins the first row.

    Maps are stretched to [0, 1] head by head: a picture says where a head looks, not how much.

    Args:
        image: `[H, W, 3]` uint8.
        attention: `[L, H, h, w]` float, of one class token to the patches in `L` blocks of `H` heads.
        is_open: `[L, H]` bool; the others are called closed.
        first_block: number of the first of the blocks.
    """
    factor = _SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[0] * factor)), max(1, round(image.shape[1] * factor)))
    shown = resize_image(image, size)
    blank = np.full_like(shown, 255)
    rows = []
    for block, (maps, opened) in enumerate(zip(attention.cpu(), is_open.tolist(), strict=True), start=first_block):
        row = [("image", shown) if block == first_block else ("", blank)]
        for head, (each, is_kept) in enumerate(zip(maps, opened, strict=True), start=1):
            heat = cv2.resize(_stretch(each).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
            row.append((f"{block}.{head}" if is_kept else f"{block}.{head} closed", overlay_heat(shown, heat)))
        rows.append(row)
    return stack_panels(rows)


def _stretch(values: Tensor) -> Tensor:
    lowest, highest = values.min(), values.max()
    return ((values - lowest) / (highest - lowest).clamp(min=1e-12)).to(torch.float32)
