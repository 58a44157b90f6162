"""PNGs of several channels of 16 bits, which Pillow cannot write."""

from __future__ import annotations

import struct

import numpy as np

from tests.support.grey_png import join_chunks

_COLOUR_TYPES = {2: 4, 3: 2, 4: 6}


def encode_deep_png(pixels: np.ndarray) -> bytes:
    """Encode `[H, W, C]` uint16: grey with opacity, RGB, or RGB with opacity."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return join_chunks(struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0), rows)
