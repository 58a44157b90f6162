"""Label regions by words: their own CLIP feature and those of their neighbours in the bank (docs/words.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.structures import WordFeatures


def answer_by_words(
    values: Tensor, neighbour_values: Tensor, words: WordFeatures, neighbour_share: float
) -> tuple[Tensor, Tensor]:
    """Return the label of the word that each region is most similar to.

    The similarity to a word is a mix of two cosines: that of the region's own feature, and that of the normalised mean
    of its neighbours' features. A region without a feature (all zero) has its neighbours' alone, and the reverse; with
    neither, every word is as similar. Of equal words the first wins, so the smallest label.

    Args:
        values: `[N, D]` float, the regions' own features, of length 1 or all zero.
        neighbour_values: `[N, k, D]` float, likewise; `k` may be 0.
        words: the words, on the device of `values`.
        neighbour_share: share of the neighbours in the mix, in [0, 1]; CorrCLIP v2 has 0.5, and 0 is CLIP alone.

    Returns:
        `labels [N]` int64 and `scores [N]` float64 (float32 on MPS), the probability of the word, by a softmax over all
        words of `logit_scale` times the mix.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = words.features.shape[1]
    if values.ndim != 2 or neighbour_values.ndim != 3 or values.shape != neighbour_values[:, :1].sum(1).shape:
        raise ValueError(
            f"words: got values {tuple(values.shape)} and neighbours' {tuple(neighbour_values.shape)}, expected [N, D] "
            "and [N, k, D]"
        )
    if values.shape[1] != width:
        raise ValueError(f"words: got features of {values.shape[1]} channels, expected the words' {width}")
    # The direction of the sum is that of the mean, and a sum over no neighbours is zero.
    retrieved = F.normalize(neighbour_values.sum(1), dim=1)
    has_value, has_neighbours = (values != 0).any(1), (retrieved != 0).any(1)
    share = torch.full_like(values[:, 0], neighbour_share)
    share = share.masked_fill(~has_neighbours, 0.0).masked_fill(~has_value, 1.0)[:, None]
    cosines = (1 - share) * (values @ words.features.T) + share * (retrieved @ words.features.T)
    # MPS has no float64.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    probability = (words.logit_scale * cosines.to(dtype)).softmax(1)
    scores, best = probability.max(1)
    # `max` may return any of several equal words, so the first is looked up.
    positions = torch.arange(len(words.labels), device=values.device).expand_as(probability)
    first = positions.masked_fill(probability != scores[:, None], len(words.labels)).amin(1)
    return torch.tensor(words.labels, device=values.device)[torch.minimum(first, best)], scores
