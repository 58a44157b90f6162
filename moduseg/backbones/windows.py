"""Overlapping windows over images that are too large for one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def list_window_starts(cells: int, window: int, step: int) -> list[int]:
    """Return the first cell of each window that covers a row of `cells`.

    No window reaches beyond the row: the last one is moved back to end with it. All numbers are in patches, so every
    window begins where a patch does.
    """
    last = max(cells - window, 0)
    return [*range(0, last, step), last]


def encode_windows(
    batch: Tensor, encode: Callable[[Tensor], Tensor], *, patch: int, window: int, step: int, batch_size: int
) -> Tensor:
    """Return the tokens of images, each the plain mean over the windows that hold its patch.

    Args:
        batch: `[B, 3, H, W]`, sides multiples of `patch`.
        encode: from `[n, 3, H', W']` to `[n, H' / patch, W' / patch, C]`.
        patch: side of a patch in pixels.
        window, step: side and step of the windows, in patches; `1 <= step <= window`.
        batch_size: windows that share a call of `encode`.

    Returns:
        `[B, H / patch, W / patch, C]` float32. Images no larger than a window are encoded at once.
    """
    rows, columns = batch.shape[2] // patch, batch.shape[3] // patch
    height, width = min(rows, window), min(columns, window)
    corners = [
        (image, top, left)
        for image in range(len(batch))
        for top in list_window_starts(rows, window, step)
        for left in list_window_starts(columns, window, step)
    ]
    if len(corners) == len(batch):
        return encode(batch).float()
    total = torch.zeros(0)
    num_windows = torch.zeros(rows, columns, 1, device=batch.device)
    for start in range(0, len(corners), batch_size):
        batch_corners = corners[start : start + batch_size]
        crops = [
            batch[i, :, top * patch : (top + height) * patch, left * patch : (left + width) * patch]
            for i, top, left in batch_corners
        ]
        for (image, top, left), tokens in zip(batch_corners, encode(torch.stack(crops)).float(), strict=True):
            if not len(total):
                total = tokens.new_zeros(len(batch), rows, columns, tokens.shape[-1])
            total[image, top : top + height, left : left + width] += tokens
            if image == 0:
                num_windows[top : top + height, left : left + width] += 1
    return total / num_windows
