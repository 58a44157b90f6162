"""Windows with overlap over images that are too large for one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(cells: int, window: int, step: int) -> list[int]:
    """First cell of each window that covers a row of `cells`.

    A window reaches no further than the row: the last one is moved back to end with it. All are given in patches, so
    every window begins where a patch does.
    """
    last = max(cells - window, 0)
    return [*range(0, last, step), last]


def over_windows(
    batch: Tensor, patch: int, window: int, step: int, batch_size: int, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Tokens of images, each the plain mean over the windows that hold its patch.

    Args:
        batch: `[B, 3, H, W]`, sides multiples of `patch`.
        patch: side of a patch in pixels.
        window, step: side and step of the windows, in patches; `1 <= step <= window`.
        batch_size: windows that share a call of `encode`.
        encode: `[n, 3, H', W']` to `[n, H' / patch, W' / patch, C]`.

    Returns:
        `[B, H / patch, W / patch, C]` float32. Where the images are no larger than a window, what `encode` gives.
    """
    rows, columns = batch.shape[2] // patch, batch.shape[3] // patch
    tall, wide = min(rows, window), min(columns, window)
    corners = [
        (image, top, left)
        for image in range(len(batch))
        for top in window_starts(rows, window, step)
        for left in window_starts(columns, window, step)
    ]
    if len(corners) == len(batch):
        return encode(batch).float()
    total = torch.zeros(0)
    seen = torch.zeros(rows, columns, 1, device=batch.device)
    for start in range(0, len(corners), batch_size):
        chosen = corners[start : start + batch_size]
        crops = [
            batch[i, :, top * patch : (top + tall) * patch, left * patch : (left + wide) * patch]
            for i, top, left in chosen
        ]
        for (image, top, left), tokens in zip(chosen, encode(torch.stack(crops)).float(), strict=True):
            if not len(total):
                total = tokens.new_zeros(len(batch), rows, columns, tokens.shape[-1])
            total[image, top : top + tall, left : left + wide] += tokens
            if image == 0:
                seen[top : top + tall, left : left + wide] += 1
    return total / seen
