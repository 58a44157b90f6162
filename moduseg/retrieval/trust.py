"""Regions that a person named: they decide alone, or have no say.

A trusted vector is one of a region that a person named. A region takes the class of its nearest trusted vector if that
is at least as similar to it as every vector of another class; else its neighbours vote as if nothing were trusted. So

- the region that was named has its name, however many neighbours vote and whatever the outlier filter drops;
- so have all regions that resemble it more than anything the bank holds of other classes;
- nothing else changes: trusted vectors do not vote, and neither centre nor outlier filter look at them.

A region that is the named one itself is also painted as it was named, over all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moduseg.retrieval.balance import ClassIndex
from moduseg.retrieval.search import search
from moduseg.structures import Proposals, SearchBank

SAME = 1e-5
"""Similarities that differ by less are equal: the same region, pooled once more, differs by rounding."""


@dataclass(frozen=True)
class TrustedAnswer:
    """What trusted vectors say of `F` queries.

    Attributes:
        decides: `[F]` bool, queries that a trusted vector decides.
        is_same: `[F]` bool, those of them whose region is the named one.
        labels: `[F]` int64, the class of the nearest trusted vector.
        positions: `[F]` int64, its position in the bank.
        similarities: `[F]` float32, cosine with it.
    """

    decides: Tensor
    is_same: Tensor
    labels: Tensor
    positions: Tensor
    similarities: Tensor


def order_trusted_last(bank: SearchBank) -> tuple[SearchBank, int]:
    """Return the bank with its trusted vectors at the end, and the number of the others; order is kept among each."""
    if bank.is_trusted is None or not bool(bank.is_trusted.any()):
        return bank, len(bank.vectors)
    order = bank.is_trusted.to(torch.int64).sort(stable=True).indices
    return bank.select(order), int((~bank.is_trusted).sum())


class TrustedVectors:
    """The trusted vectors of a bank, and the others by class.

    Args:
        bank: with trusted vectors last.
        num_others: vectors before them.
    """

    def __init__(self, bank: SearchBank, num_others: int) -> None:
        # The latest comes first: of equal similarities, `search` gives the first.
        self._vectors = bank.vectors[num_others:].flip(0)
        self._labels = bank.labels[num_others:].flip(0)
        self._last = len(bank.vectors) - 1
        self._classes = ClassIndex(bank.vectors, bank.labels)

    def answer(self, queries: Tensor) -> TrustedAnswer:
        """Return what the trusted vectors say.

        Args:
            queries: `[F, C]` float on the bank's device, centred as the bank is.
        """
        similarities, positions = search(queries, self._vectors, 1)
        similarities, positions = similarities[:, 0], positions[:, 0]
        labels = self._labels[positions]
        nearest = self._classes.nearest(queries, 1)
        others = nearest.similarities.masked_fill(nearest.labels == labels[:, None], -torch.inf).amax(1)
        return TrustedAnswer(
            decides=similarities >= others - SAME,
            is_same=similarities >= 1 - SAME,
            labels=labels,
            positions=self._last - positions,
            similarities=similarities,
        )


def paint_named(label_map: np.ndarray, proposals: Proposals, labels: Tensor, is_named: Tensor) -> np.ndarray:
    """Return a label map with the regions that a person named painted over all others, small ones last.

    Args:
        label_map: `[H, W]` uint8.
        proposals: `N` of them.
        labels: `[N]` int64.
        is_named: `[N]` bool, proposals that are the named regions themselves.
    """
    painted = label_map.copy()
    named = is_named.nonzero()[:, 0]
    order = proposals.areas[named.to(proposals.masks.device)].sort(descending=True, stable=True).indices
    for index in named[order.to(named.device)].tolist():
        painted[proposals.masks[index].cpu().numpy()] = int(labels[index])
    return painted
