"""Regions of a training image that lie in one class of its pseudo mask: a bank with parts of objects and of background.

The mean of all sky, grass and road of an image is like none of them, and a mask of a wheel is like no bus. Retrieval
asks about proposals, so the bank gets vectors of proposals too, with the label of the class that they lie in. An
option, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.structures import IGNORE_INDEX

MIN_PURITY = 0.8
"""Share of a proposal's pixels that have its label; chosen on coco150's training photographs (docs/retrieval.md)."""
MIN_AREA = 300
"""Smallest part in pixels: what is smaller has the look of its surroundings in a token of 16 pixels."""


def find_parts(label_map: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the proposals that lie in one class.

    Args:
        label_map: `[H, W]` uint8 pseudo mask, 0 background, 255 ignore, not purified.
        masks: `[N, H, W]` bool, proposals of the image, on the same device.

    Returns:
        `labels` `[K]` int64 and `masks` `[K, H, W]` bool, in the order of the proposals; of equal shares, the smaller
        label.

    Raises:
        ValueError: masks of another size than the label map.
    """
    if masks.shape[1:] != label_map.shape:
        raise ValueError(
            f"find_parts: got masks {tuple(masks.shape[1:])}, expected the label map's {tuple(label_map.shape)}"
        )
    flat = label_map.flatten()
    ids = flat.unique()
    ids = ids[ids != IGNORE_INDEX]
    if not len(masks) or not len(ids):
        return torch.zeros(0, dtype=torch.int64, device=masks.device), masks[:0]
    # float32 counts pixels exactly up to 2^24.
    one_hot = (flat[:, None] == ids).float()
    shared = torch.stack([mask.flatten().float() @ one_hot for mask in masks])
    areas = masks.flatten(1).sum(1)
    most, index = shared.max(1)
    is_part = (areas >= MIN_AREA) & (most >= MIN_PURITY * areas)
    return ids[index[is_part]].long(), masks[is_part]
