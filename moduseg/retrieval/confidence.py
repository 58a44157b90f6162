"""How sure retrieval is of each pixel: the share of the neighbours' votes that the pixel's label got."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.retrieval.suppress import descending


def measure_vote_shares(
    labels: Tensor, neighbour_labels: Tensor, similarities: Tensor, temperature: float | None = None
) -> Tensor:
    """Return the share of the votes that the label of each query got.

    Args:
        labels: `[N]` int64, the vote's.
        neighbour_labels: `[N, k]` int64, -1 where there is no neighbour.
        similarities: `[N, k]` float32.
        temperature: of the vote (`retrieval.vote_temperature`); `None` if all votes weigh the same.

    Returns:
        `[N]` float32 in [0, 1] on the device of the labels; 0 for a query without neighbours.
    """
    if not neighbour_labels.numel():
        return torch.zeros(len(labels), device=labels.device)
    weights = torch.ones_like(similarities)
    if temperature is not None:
        weights = ((similarities - similarities.amax(1, keepdim=True)) / temperature).exp()
    weights = weights * (neighbour_labels >= 0)
    winning = weights * (neighbour_labels == labels[:, None])
    return winning.sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)


def paint_confidence(
    masks: Tensor, labels: Tensor, scores: Tensor, shares: Tensor, label_map: Tensor, *, is_majority: bool = False
) -> np.ndarray:
    """Return the confidence of each pixel of a label map.

    Args:
        masks: `[N, H, W]` bool.
        labels: `[N]` int64, 0 background.
        scores: `[N]` float.
        shares: `[N]` float in [0, 1], of `measure_vote_shares`.
        label_map: `[H, W]` uint8.
        is_majority: whether the label of a pixel is that of most proposals that cover it.

    Returns:
        `[H, W]` uint8 on the CPU, 255 for a share of 1. A pixel has the share of the proposal of the highest score
        among those that cover it and have its label; with `is_majority` the mean over all that cover it, where those
        of another label count as 0. It is 0 where no proposal of its label is, as in holes that were closed.
    """
    confidence = torch.zeros(label_map.shape, device=masks.device)
    if is_majority:
        num_covering = torch.zeros(label_map.shape, device=masks.device)
        for mask, label, share in zip(masks, labels, shares, strict=True):
            num_covering += mask
            confidence += share * (mask & (label_map == label))
        confidence /= num_covering.clamp(min=1)
    else:
        # The last to be written has the highest score. The order as numbers: an index on the device is waited for.
        for index in descending(scores).flip(0).tolist():
            agrees = masks[index] & (label_map == labels[index])
            confidence = torch.where(agrees, shares[index], confidence)
    return (confidence.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
