"""Pack numbers and pictures as text that the scripts of a page hold."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

SIMILARITY_STEPS = 10_000
"""Similarities are stored as integers, this many for a difference of 1."""
NO_ROW = (1 << 32) - 1
"""Stands for "no neighbour" among packed rows."""


def to_base64(data: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def pack_numbers(array: np.ndarray, dtype: str) -> str:
    """Return integers as base64 of their little-endian bytes, which a page reads without parsing.

    Args:
        array: integers in the range of `dtype`.
        dtype: `u2` or `u4`.
    """
    return to_base64(np.ascontiguousarray(array, dtype=f"<{dtype}").tobytes())


def pack_neighbours(rows: np.ndarray, similarities: np.ndarray) -> dict[str, Any]:
    """Return rows of the bank and their similarities, `[N, k]` each, packed; row -1 ("none") becomes `NO_ROW`."""
    steps = np.clip(np.round((similarities.astype(np.float64) + 1) * SIMILARITY_STEPS), 0, 2 * SIMILARITY_STEPS)
    return {
        "k": int(rows.shape[1]),
        "rows": pack_numbers(np.where(rows < 0, NO_ROW, rows.astype(np.int64)), "u4"),
        "similarities": pack_numbers(steps, "u2"),
    }
