"""The colours of label maps."""

from __future__ import annotations

import numpy as np


def voc_palette(n: int = 256) -> np.ndarray:
    """The PASCAL VOC colour map: the bits of the id, dealt to R, G, B from the highest bit down.

    Returns:
        `[n, 3]` uint8, row = label id; id 0 is black and id 255 the cream of ignored pixels.
    """
    ids = np.arange(n, dtype=np.uint32)
    palette = np.zeros((n, 3), dtype=np.uint32)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            palette[:, channel] |= bit << (7 - level)
    return palette.astype(np.uint8)
