"""The pictures that unsupervised protocols score: a square of fixed size from the middle of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

PictureProtocol = Literal["whole", "diffseg", "picie"]
_DIFFSEG_SIDE, _PICIE_SIDE = 512, 320


@dataclass(frozen=True)
class Square:
    """How a square picture is cut from an image of one size.

    Attributes:
        resized: `(height, width)` to which the image, or the box of it, is resized.
        box: `(top, left, height, width)` that is cut out.
        is_cut_first: whether the box is of the image itself, and resized afterwards; else of the resized image.
        is_smooth: whether images are resized bilinearly; label maps never are.
    """

    resized: tuple[int, int]
    box: tuple[int, int, int, int]
    is_cut_first: bool
    is_smooth: bool

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the picture."""
        return self.resized if self.is_cut_first else self.box[2:]


def plan_square(size: tuple[int, int], protocol: Literal["diffseg", "picie"]) -> Square:
    """Return how a protocol cuts its picture from an image.

    `diffseg` (Tian et al., 2024): the square in the middle, resized to 512 x 512, bilinearly. `picie` (Cho et al.,
    2021): the shorter side resized to 320, nearest neighbour, then the square of 320 x 320 in the middle.

    Args:
        size: `(height, width)` of the image.
        protocol: which one.
    """
    height, width = size
    shorter = min(size)
    if protocol == "diffseg":
        box = ((height - shorter) // 2, (width - shorter) // 2, shorter, shorter)
        return Square((_DIFFSEG_SIDE, _DIFFSEG_SIDE), box, is_cut_first=True, is_smooth=True)
    rows, columns = (side * _PICIE_SIDE // shorter for side in size)
    box = (round((rows - _PICIE_SIDE) / 2), round((columns - _PICIE_SIDE) / 2), _PICIE_SIDE, _PICIE_SIDE)
    return Square((rows, columns), box, is_cut_first=False, is_smooth=False)


def cut_picture(array: np.ndarray, square: Square, *, is_label_map: bool) -> np.ndarray:
    """Return the picture of an image or a label map.

    Args:
        array: `[H, W, 3]` uint8, `[H, W]` uint8 or `[H, W]` int32.
        square: of `plan_square`, for `H` and `W`.
        is_label_map: whether values are ids, which are never mixed.

    Returns:
        `[h, w, 3]` or `[h, w]` of the same type, `(h, w)` being `square.size`.
    """
    top, left, height, width = square.box
    if square.is_cut_first:
        array = array[top : top + height, left : left + width]
    smooth = square.is_smooth and not is_label_map
    rows, columns = square.resized
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    resized = np.asarray(Image.fromarray(array).resize((columns, rows), resampling)).astype(array.dtype)
    return resized if square.is_cut_first else resized[top : top + height, left : left + width]
