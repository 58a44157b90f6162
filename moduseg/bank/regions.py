"""The regions of an image and their vectors: what it adds to a bank (docs/method.md, steps 2 and 3)."""

from __future__ import annotations

import torch

from moduseg.bank.aggregation import aggregate, coverage, harden
from moduseg.bank.purification import class_regions, purify
from moduseg.config import BankConfig
from moduseg.structures import Proposals, TokenMap


def labelled_regions(label_map: torch.Tensor, bank: BankConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the purified region of each class of a pseudo mask (docs/method.md, step 2).

    Args:
        label_map: `[H, W]` uint8, 255 ignore.
        bank: purification and minimum area.

    Returns:
        `labels` `[R]` int64, ascending, and `masks` `[R, H, W]` bool.
    """
    if bank.purify.enabled:
        label_map = purify(label_map, bank.purify.kernel_size, bank.purify.iterations)
    return class_regions(label_map, bank.min_area)


def unlabelled_regions(
    proposals: Proposals, bank: BankConfig, *, is_mirrored: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the proposals of at least `bank.min_area` pixels as regions, in their order.

    Args:
        proposals: of one image.
        bank: minimum area; proposals are not purified.
        is_mirrored: whether the regions of the mirror image are wanted.

    Returns:
        `labels` `[R]` int64, all 0, and `masks` `[R, H, W]` bool.
    """
    masks = proposals.select(proposals.areas >= bank.min_area).masks
    masks = masks.flip(-1) if is_mirrored else masks
    return torch.zeros(len(masks), dtype=torch.int64, device=masks.device), masks


def region_vectors(
    labels: torch.Tensor, masks: torch.Tensor, tokens: TokenMap, bank: BankConfig
) -> dict[str, torch.Tensor]:
    """Pool the patch tokens of regions (docs/method.md, step 3).

    Args:
        labels: `[R]` int64.
        masks: `[R, H, W]` bool on the device of the tokens.
        tokens: the image's patch tokens.
        bank: aggregation.

    Returns:
        `pooled` `[R, C]` float32, `labels` `[R]` int64, `areas` `[R]` int64.
    """
    weights = coverage(masks, tokens)
    if bank.aggregation == "hard":
        weights = harden(weights)
    pooled = aggregate(tokens.tokens, weights, normalize=False)
    return {"pooled": pooled, "labels": labels, "areas": masks.flatten(1).sum(1)}
