"""Prototype purification: drop the vectors of a class that lie farthest from its mean (docs/method.md, step 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nearest_to_centre(vectors: Tensor, drop_ratio: float) -> Tensor:
    """Return the indices of the vectors of one class that are kept.

    The centre is the plain mean, not re-normalised; `floor(drop_ratio * M)` vectors farthest from it (Euclidean) are
    dropped. Among equal distances the higher index is dropped first.

    Args:
        vectors: `[M, C]` float, the L2-normalised vectors of one class.
        drop_ratio: share to drop, in [0, 1].

    Returns:
        `[M - floor(drop_ratio * M)]` int64, ascending.

    Raises:
        ValueError: `vectors` is not `[M, C]` float, or a ratio outside [0, 1].
    """
    if vectors.ndim != 2 or not vectors.dtype.is_floating_point:
        raise ValueError(f"vectors: got {tuple(vectors.shape)} {vectors.dtype}, expected [M, C] float")
    if not 0 <= drop_ratio <= 1:
        raise ValueError(f"drop_ratio: got {drop_ratio}, expected a number in [0, 1]; try 0.25, or 0 to keep all")
    count = len(vectors)
    dropped = math.floor(drop_ratio * count)
    if dropped == 0:
        return torch.arange(count, device=vectors.device)
    # In float64 the rounding of the mean does not decide between equal distances. MPS has no float64.
    precise = vectors.float() if vectors.device.type == "mps" else vectors.double()
    distances = (precise - precise.mean(0)).square().sum(1)
    return distances.sort(stable=True).indices[: count - dropped].sort().values
