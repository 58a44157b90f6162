"""Windows of an image, as a CLIP sees them: its size, where they lie, what is put around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.inputs import fit_input
from moduseg.backbones.windows import list_window_starts

Resampling = Literal["area", "linear"]


def find_borders(size: tuple[int, ...], padding: int, patch: int) -> tuple[int, int, int, int]:
    """Return how many pixels a window gets at the top, bottom, left and right; negative ones are cut off.

    Args:
        size: `(height, width)` of the window.
        padding: it is padded to a multiple of this, half on each side (the odd pixel at the bottom or right); 0 cuts it
            to whole patches, unless it has none.
        patch: side of a patch.
    """
    borders = []
    for side in size:
        missing = -side % padding if padding else -(side % patch) if side >= patch else 0
        borders += [missing // 2, missing - missing // 2] if missing >= 0 else [0, missing]
    return borders[0], borders[1], borders[2], borders[3]


def pad_window(crop: np.ndarray, border: tuple[int, int, int, int], colour: Sequence[float]) -> np.ndarray:
    """Return a window `[H, W, 3]` uint8 with a border of one colour, or cut where the border is negative."""
    top, bottom, left, right = (max(0, pixels) for pixels in border)
    height, width = crop.shape[0] + min(0, border[1]), crop.shape[1] + min(0, border[3])
    return cv2.copyMakeBorder(crop[:height, :width], top, bottom, left, right, cv2.BORDER_CONSTANT, value=tuple(colour))


def pad_regions(ids: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Return the ids `[H, W]` of a window's regions as `pad_window` returns its pixels; the border is no region."""
    top, bottom, left, right = border
    return F.pad(ids, (left, right, top, bottom), value=-1)


def pad_masks(masks: Tensor, border: tuple[int, int, int, int]) -> Tensor:
    """Return masks `[N, H, W]` bool as `pad_window` returns the pixels of their window; the border is in none."""
    top, bottom, left, right = border
    return F.pad(masks.to(torch.uint8), (left, right, top, bottom)).bool()


def resize_sides(
    image: np.ndarray, short_side: int | None, long_side: int | None, resampling: Resampling = "area"
) -> np.ndarray:
    """Return the image `[H, W, 3]` uint8 with `short_side` pixels on its short side, but no more than `long_side` on
    its long one; as it is without either.
    """
    if resampling == "area" and long_side is None:
        return resize_short_side(image, short_side)
    sides = image.shape[:2]
    scale = min(
        1.0 if short_side is None else short_side / min(sides),
        float("inf") if long_side is None else long_side / max(sides),
    )
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    if (height, width) == sides:
        return image
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR if resampling == "linear" else method)


def resize_short_side(image: np.ndarray, short_side: int | None) -> np.ndarray:
    """Return the image `[H, W, 3]` uint8 with `short_side` pixels on its short side; as it is if `None`.

    Strips get fewer (`moduseg.backbones.inputs.fit_input`).
    """
    height, width = fit_input((image.shape[0], image.shape[1]), short_side)
    if (height, width) == image.shape[:2]:
        return image
    shrinks = height < image.shape[0] or width < image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def list_windows(height: int, width: int, window: int | None, stride: int) -> list[tuple[int, int, int, int]]:
    """Return `(top, bottom, left, right)` of the windows that cover an image, row by row.

    No window reaches beyond the image: the last one of each row and column is moved back to end at the border.
    """
    if window is None:
        return [(0, height, 0, width)]
    rows, columns = (
        [(start, min(start + window, side)) for start in list_window_starts(side, window, stride)]
        for side in (height, width)
    )
    return [(*row, *column) for row in rows for column in columns]
