"""Choose neighbours so that large classes do not outvote small ones: options, not in the paper.

If a bank holds hundreds of vectors of one class and a dozen of another, the large class has a neighbour nearly
everywhere. There are two remedies: a class fills at most half of the neighbours (`cap`), or a neighbour's distance is
divided by the spread of its class (`distance`).
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
    """The nearest bank vectors of each query within each class; columns are grouped by class, nearest first.

    Attributes:
        similarities: `[N, M]` float32.
        indices: `[N, M]` int64, rows of the bank.
        labels: `[M]` int64, ascending.
    """

    similarities: Tensor
    indices: Tensor
    labels: Tensor


class ClassIndex:
    """A bank prepared for exact searches within each class.

    Args:
        vectors: `[B, C]` float.
        labels: `[B]` integers.

    Raises:
        ValueError: vectors that cannot be searched, as for `ExactIndex`.
    """

    def __init__(self, vectors: Tensor, labels: Tensor) -> None:
        self._rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        self._labels = [labels[rows[0]].long() for rows in self._rows]
        self._indices = [ExactIndex(vectors[rows]) for rows in self._rows]

    def nearest(self, queries: Tensor, depth: int) -> Candidates:
        """Return the `min(depth, n)` nearest of the `n` vectors of each class.

        Args:
            queries: `[N, C]` float of any length; a zero vector has similarity 0 with everything.
            depth: vectors wanted of each class, 1 or more.

        Raises:
            ValueError: shapes that do not fit, vectors that are not finite, or `depth` below 1.
        """
        similarities = [queries.new_empty((len(queries), 0), dtype=torch.float32)]
        indices = [queries.new_empty((len(queries), 0), dtype=torch.int64)]
        labels = [queries.new_empty(0, dtype=torch.int64)]
        for index, rows, label in zip(self._indices, self._rows, self._labels, strict=True):
            class_similarities, positions = search(queries, index, depth)
            similarities.append(class_similarities)
            indices.append(rows[positions])
            labels.append(label.expand(positions.shape[1]))
        return Candidates(torch.cat(similarities, 1), torch.cat(indices, 1), torch.cat(labels))


def find_class_candidates(queries: Tensor, bank_vectors: Tensor, bank_labels: Tensor, depth: int) -> Candidates:
    """Return the nearest vectors of each class in a bank that is searched once; see `ClassIndex.nearest`."""
    return ClassIndex(bank_vectors, bank_labels).nearest(queries, depth)


def balance_neighbours(
    candidates: Candidates,
    top_k: int,
    balance: Balance,
    *,
    spreads: Tensor | None = None,
    is_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the neighbours that vote.

    Args:
        candidates: at least `top_k` of each class, and as many more as are not allowed.
        top_k: neighbours wanted, 1 or more.
        balance: `none`: the nearest, as `search` gives them. `cap`: the nearest, at most `max(1, top_k // 2)` of one
            class. `distance`: the nearest by the distance `(1 - similarity) / spread of its class`.
        spreads: `[S]` float64 by label, from `measure_class_spreads`; for `distance`.
        is_allowed: `[N, M]` bool, candidates that may vote; all if omitted.

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
    similarities, labels = candidates.similarities, candidates.labels
    if similarities.numel() == 0:
        return similarities[:, :0], candidates.indices[:, :0]
    is_usable = torch.ones_like(similarities, dtype=torch.bool) if is_allowed is None else is_allowed
    if balance == "cap":
        is_usable = is_usable & (rank_in_class(is_usable, labels) < max(1, top_k // 2))
    dtype = widest_float(similarities.device)
    distances = -similarities.to(dtype)
    if balance == "distance":
        if spreads is None:
            raise ValueError("spreads: got none, expected those of measure_class_spreads for balance=distance")
        distances = (1 - similarities.to(dtype)) / spreads.to(dtype)[labels]
    distances = distances.masked_fill(~is_usable, torch.inf)
    # The candidates are sorted by index first: the stable sort leaves equally distant ones in that order.
    order = candidates.indices.sort(dim=1).indices
    order = order.gather(1, distances.gather(1, order).sort(stable=True, dim=1).indices)
    order = order[:, : min(top_k, int(is_usable.sum(1).min()))]
    return similarities.gather(1, order), candidates.indices.gather(1, order)


def measure_class_spreads(vectors: Tensor, labels: Tensor) -> Tensor:
    """Return how far the vectors of each class lie from its mean direction.

    The distance is `1 - cosine`. One vector at the distance that is usual over all classes is added to the sum over the
    `n` vectors of a class, which is then divided by `n`: the mean of few vectors lies too close to them, and a single
    vector has no distance at all.

    Args:
        vectors: `[B, C]` float, L2-normalised.
        labels: `[B]` integers, 0 or more.

    Returns:
        `[S]` float64 (float32 on MPS), `S` the largest label + 1; positive.
    """
    dtype = widest_float(vectors.device)
    num_labels = int(labels.max()) + 1 if len(labels) else 0
    counts = torch.bincount(labels, minlength=num_labels)
    sums = torch.zeros((num_labels, vectors.shape[1]), dtype=dtype, device=vectors.device)
    sums = sums.index_add(0, labels, vectors.to(dtype))
    # The mean cosine of a class's vectors to its mean direction is the length of that mean.
    totals = (counts - torch.linalg.vector_norm(sums, dim=1)).clamp(min=0)
    num_free = int((counts - 1).clamp(min=0).sum())
    usual = float(totals.sum()) / num_free if num_free else 0.0
    usual = usual if usual > 1e-6 else 1.0
    return (totals + usual) / counts.clamp(min=1).to(dtype)


def count_smallest_class(bank_labels: Tensor) -> int:
    """Return the vectors of the rarest class that has any; 1 for an empty bank.

    With `retrieval.cap_top_k` no more neighbours vote, because the rarest class could not win among more of them.
    """
    counts = torch.bincount(bank_labels)
    counts = counts[counts > 0]
    return int(counts.min()) if len(counts) else 1


def rank_in_class(is_usable: Tensor, labels: Tensor) -> Tensor:
    """Return `[N, M]` int64: how many usable candidates of its class come before each one."""
    before = is_usable.cumsum(1) - is_usable.long()
    starts = torch.searchsorted(labels, labels)
    return before - before[:, starts]


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
