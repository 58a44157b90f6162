"""Colour pictures of 16 bits a channel, of which Pillow drops the lower eight without a word."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from moduseg.datasets.png import HEADER_BYTES, parse_png_header
from moduseg.errors import DataError

_GREY = 0
_BITS, _PLANES = 258, 284
"""Tags of a TIFF: bits of each channel, and whether channels lie beside (1) or after each other (2)."""


def has_deep_colours(picture: Image.Image, path: Path) -> bool:
    """Return whether a picture has several channels of 16 bits each, one of which may be transparency.

    Args:
        picture: the opened file, decoded or not.
        path: the file.
    """
    if picture.format == "PNG":
        with path.open("rb") as file:
            header = parse_png_header(file.read(HEADER_BYTES))
        return header is not None and header[2] == 16 and header[3] != _GREY
    if picture.format == "TIFF" and picture.mode in ("RGB", "RGBA"):
        return max(picture.tag_v2.get(_BITS, (8,))) == 16  # type: ignore[attr-defined]
    return False


def read_deep_colours(picture: Image.Image, path: Path) -> np.ndarray:
    """Read all bits of a picture that `has_deep_colours`.

    Args:
        picture: the opened file.
        path: the file.

    Returns:
        `[H, W, C]` uint16, RGB, with the opacity as fourth channel where the file has one; a TIFF is upright, as
        Pillow's are.

    Raises:
        DataError: the channels of a TIFF lie in planes, or it cannot be decoded.
    """
    if picture.format == "TIFF" and picture.tag_v2.get(_PLANES, 1) != 1:  # type: ignore[attr-defined]
        # OpenCV and Pillow both mix up the channels of such files.
        raise DataError(
            f"{path}: got a TIFF of 16 bits whose channels are stored in planes, expected them beside each other; "
            "store it again as PNG"
        )
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise DataError(f"{path}: got {picture.mode} pixels of 16 bits that cannot be decoded; store it again as PNG")
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
