"""Neighbours chosen so that large classes do not outvote small ones: options, not in the paper.

Where a bank holds hundreds of vectors of one class and a dozen of another, the large class has a neighbour nearly
everywhere. Two remedies: a class fills at most half of the neighbours (`cap`), or a neighbour's distance is measured in
the spread of its class (`distance`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moduseg.retrieval.search import ExactIndex, search

Balance = Literal["none", "cap", "distance"]


@dataclass(frozen=True)
class Candidates:
    """The nearest bank vectors of each query in each class by itself; columns are grouped by class, nearest first.

    Attributes:
        similarities: `[N, M]` float32.
        indices: `[N, M]` int64, rows of the bank.
        labels: `[M]` int64, ascending.
    """

    similarities: Tensor
    indices: Tensor
    labels: Tensor


class ClassIndex:
    """A bank made ready for searches in each class by itself; exact.

    Args:
        vectors: `[B, C]` float.
        labels: `[B]` integers.

    Raises:
        ValueError: vectors that cannot be searched, see `ExactIndex`.
    """

    def __init__(self, vectors: Tensor, labels: Tensor) -> None:
        self._rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        self._labels = [labels[rows[0]].long() for rows in self._rows]
        self._parts = [ExactIndex(vectors[rows]) for rows in self._rows]

    def nearest(self, queries: Tensor, depth: int) -> Candidates:
        """The `min(depth, n)` nearest of the `n` vectors of each class.

        Args:
            queries: `[N, C]` float, see `moduseg.retrieval.search.search`.
            depth: vectors wanted of each class, 1 or more.

        Raises:
            ValueError: see `search`.
        """
        similarities = [queries.new_empty((len(queries), 0), dtype=torch.float32)]
        indices = [queries.new_empty((len(queries), 0), dtype=torch.int64)]
        labels = [queries.new_empty(0, dtype=torch.int64)]
        for part, rows, label in zip(self._parts, self._rows, self._labels, strict=True):
            near, which = search(queries, part, depth)
            similarities.append(near)
            indices.append(rows[which])
            labels.append(label.expand(near.shape[1]))
        return Candidates(torch.cat(similarities, 1), torch.cat(indices, 1), torch.cat(labels))


def class_candidates(queries: Tensor, bank_vectors: Tensor, bank_labels: Tensor, depth: int) -> Candidates:
    """`ClassIndex.nearest` of a bank that is searched once."""
    return ClassIndex(bank_vectors, bank_labels).nearest(queries, depth)


def balanced(
    candidates: Candidates,
    top_k: int,
    balance: Balance,
    spreads: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The neighbours that vote.

    Args:
        candidates: to a depth of `top_k` at least; where some are not allowed, by as many more.
        top_k: neighbours wanted, 1 or more.
        balance: `none`: the nearest, as `search` gives them. `cap`: the nearest of which no class has more than
            `max(1, top_k // 2)`. `distance`: the nearest where the distance to a vector is
            `(1 - similarity) / spread of its class`.
        spreads: `[S]` float64 by label, of `class_spreads`; for `distance`.
        allowed: `[N, M]` bool, candidates that may vote (all where left out).

    Returns:
        `similarities [N, k]` float32 (of `distance`: not descending) and `indices [N, k]` int64, the nearest by the
        rule's measure first, equal ones by index. `k` is the smallest number of such neighbours that any query has, and
        `top_k` at most.

    Raises:
        ValueError: another rule, `top_k < 1`, or no spreads for `distance`.
    """
    if balance not in ("none", "cap", "distance"):
        raise ValueError(f"balance: got {balance!r}, expected none, cap or distance")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected 1 or more; try 25")
    near, labels = candidates.similarities, candidates.labels
    if near.numel() == 0:
        return near[:, :0], candidates.indices[:, :0]
    usable = torch.ones_like(near, dtype=torch.bool) if allowed is None else allowed
    if balance == "cap":
        usable = usable & (class_ranks(usable, labels) < max(1, top_k // 2))
    wide = torch.float32 if near.device.type == "mps" else torch.float64
    distances = -near.to(wide)
    if balance == "distance":
        if spreads is None:
            raise ValueError("spreads: got none, expected those of class_spreads for balance=distance")
        distances = (1 - near.to(wide)) / spreads.to(wide)[labels]
    distances = distances.masked_fill(~usable, torch.inf)
    # Sorted by index first, so that the stable sort leaves equally far ones in that order.
    order = candidates.indices.sort(dim=1).indices
    order = order.gather(1, distances.gather(1, order).sort(stable=True, dim=1).indices)
    order = order[:, : min(top_k, int(usable.sum(1).min()))]
    return near.gather(1, order), candidates.indices.gather(1, order)


def class_spreads(vectors: Tensor, labels: Tensor) -> Tensor:
    """How far the vectors of each class lie from its mean direction.

    The distance is `1 - cosine`; the sum over the `n` vectors of a class, one more vector at the distance that is usual
    over all classes added, is divided by `n`: its own mean lies too near to few vectors, and a single one has none.

    Args:
        vectors: `[B, C]` float, L2-normalised.
        labels: `[B]` integers, 0 or more.

    Returns:
        `[S]` float64 (float32 on MPS), `S` the largest label + 1; positive.
    """
    wide = torch.float32 if vectors.device.type == "mps" else torch.float64
    size = int(labels.max()) + 1 if len(labels) else 0
    counts = torch.bincount(labels, minlength=size)
    sums = torch.zeros((size, vectors.shape[1]), dtype=wide, device=vectors.device).index_add(
        0, labels, vectors.to(wide)
    )
    # The mean cosine of a class's vectors to its mean direction is the length of that mean.
    within = (counts - torch.linalg.vector_norm(sums, dim=1)).clamp(min=0)
    free = int((counts - 1).clamp(min=0).sum())
    usual = float(within.sum()) / free if free else 0.0
    usual = usual if usual > 1e-6 else 1.0
    return (within + usual) / counts.clamp(min=1).to(wide)


def smallest_class(bank_labels: Tensor) -> int:
    """Vectors of the class that has fewest, those with none left out; 1 for an empty bank.

    With `retrieval.cap_top_k` no more neighbours vote: beyond it, the rarest class cannot win any more.
    """
    counts = torch.bincount(bank_labels)
    counts = counts[counts > 0]
    return int(counts.min()) if len(counts) else 1


def class_ranks(usable: Tensor, labels: Tensor) -> Tensor:
    """`[N, M]` int64: how many usable candidates of its class come before each one."""
    before = usable.cumsum(1) - usable.long()
    starts = torch.searchsorted(labels, labels)
    return before - before[:, starts]
