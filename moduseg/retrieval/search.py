"""Exact nearest neighbours in the bank by cosine similarity (METHOD, step 6).

A matrix product is fast but not reproducible to the last bit: its rounding depends on where in the matrix a row lies,
so two identical bank rows may come out different and swap places. So it only names candidates, every row that its
rounding error leaves a chance, and these few are computed again in whole numbers, where the order of a sum does not
matter. The result is the same for every chunk size, and equal similarities are really equal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

QUERY_CHUNK, BANK_CHUNK = 1024, 8192
"""Queries and bank vectors compared at once: 32 MiB of float32."""
_FIRST_CHUNK = 2048
"""Bank vectors of the first chunk, which gives later ones a floor to pass; chunks double from there."""
_BLOCK = {"cpu": 1 << 17}
"""Numbers held at once while candidates are computed again, by device: what a core's cache holds."""
_LARGE_BLOCK = 1 << 22
"""The same for devices not listed."""
_PENDING = 1 << 22
"""Candidates that may wait for the end; from here on they are computed again at once, and the k best of them stay."""
_ZERO = 1e-15
"""A vector as short as this counts as zero: squares of still smaller components would leave float32."""


class BankIndex(ABC):
    """Bank vectors made ready for many searches."""

    name: ClassVar[str]

    def __init__(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or not vectors.dtype.is_floating_point:
            raise ValueError(f"search: got a bank {tuple(vectors.shape)} {vectors.dtype}, expected [B, C] of floats")
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.vectors.shape[1]

    @abstractmethod
    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`search` for queries that were checked, with `1 <= k <= B`."""


class ExactIndex(BankIndex):
    """Every bank vector is compared with every query, chunk by chunk.

    Args:
        vectors: `[B, C]` float of any length, on the device of the queries to come. In half precision they take half
            the memory; they are computed with in float32 either way.
        query_chunk: queries compared at once.
        bank_chunk: bank vectors compared at once; memory is a few times `query_chunk * bank_chunk` floats.

    Raises:
        ValueError: not `[B, C]` of floats, vectors that are not finite, or a chunk below 1.
    """

    name = "exact"

    def __init__(self, vectors: Tensor, query_chunk: int = QUERY_CHUNK, bank_chunk: int = BANK_CHUNK) -> None:
        super().__init__(vectors)
        if query_chunk < 1 or bank_chunk < 1:
            raise ValueError(f"search: got chunks of {query_chunk} and {bank_chunk}, expected 1 or more")
        self.query_chunk, self.bank_chunk = query_chunk, bank_chunk
        parts = [_inverse_lengths(part.float()) for part in vectors.split(BANK_CHUNK)] if len(vectors) else []
        self.inverse_lengths = torch.cat(parts) if parts else vectors.new_zeros(0, dtype=torch.float32)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        parts = [self._nearest(part, k) for part in queries.split(self.query_chunk)]
        return torch.cat([similarities for similarities, _ in parts]), torch.cat([indices for _, indices in parts])

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = self._candidates(queries, k)
        return best_candidates(queries, self.vectors, found.rows, found.columns, k)

    def _candidates(self, queries: Tensor, k: int) -> _Candidates:
        """Pairs that hold the k nearest of every query for certain; columns ascend within a row.

        With `e` the largest error of the product, the k-th best true similarity is at least the k-th best computed one
        minus `e`, so whatever belongs to the k nearest was computed as no less than that minus `2 e`.
        """
        margin = 2 * _largest_error(self.dim)
        unit = queries.float() * _inverse_lengths(queries.float())[:, None]
        best = unit.new_empty((len(queries), 0))
        floor = unit.new_full((len(queries), 1), -math.inf)
        pending: list[_Candidates] = []
        room = _Room(len(queries), min(self.bank_chunk, len(self)), self.vectors)
        for start, stop in self._chunks():
            scores = room.scores(unit, start, stop).mul_(self.inverse_lengths[start:stop])
            if best.shape[1] < k:
                best = torch.cat((best, scores.topk(min(k, stop - start)).values), 1)
                best = best.topk(min(k, best.shape[1])).values
                if best.shape[1] == k:
                    floor = best[:, -1:] - margin
                found = _Candidates.above(scores, floor, start, room)
            else:
                # A few pass the floor, which is cheaper to see than the k largest of each chunk.
                found = _Candidates.above(scores, floor, start, room)
                best = found.merge(best)
                floor = best[:, -1:] - margin
            pending.append(found)
            if best.shape[1] == k and sum(len(part) for part in pending) > _PENDING:
                pending = [self._resolved(queries, _Candidates.cat(pending).pruned(floor), k)]
        return _Candidates.cat(pending).pruned(floor)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        start, size = 0, min(_FIRST_CHUNK, self.bank_chunk)
        while start < len(self):
            yield start, min(start + size, len(self))
            start, size = start + size, min(2 * size, self.bank_chunk)

    def _resolved(self, queries: Tensor, found: _Candidates, k: int) -> _Candidates:
        """The candidates, or the k nearest of them where they are still too many to be kept."""
        if len(found) <= _PENDING // 2:
            return found
        kept = _k_best(similarities_of(queries, self.vectors, found.rows, found.columns), found, len(queries), k)
        return found.select(kept.flatten().sort().values)


class _Room:
    """What every chunk of the bank is compared in, taken once.

    Blocks of this size taken and given back chunk after chunk, with small results that stay in between, leave the C
    library's heap full of holes: beside a bank of a million vectors that took gigabytes.

    Args:
        queries: their number.
        chunk: bank vectors of the largest chunk.
        vectors: `[B, C]`, the bank.
    """

    def __init__(self, queries: int, chunk: int, vectors: Tensor) -> None:
        self._vectors = vectors
        self._scores = torch.empty(queries * chunk, device=vectors.device)
        self._hits = torch.empty(queries * chunk, dtype=torch.bool, device=vectors.device)
        narrow = vectors.dtype != torch.float32
        self._wide = torch.empty((chunk, vectors.shape[1]), device=vectors.device) if narrow else None

    def scores(self, unit: Tensor, start: int, stop: int) -> Tensor:
        """`[N, stop - start]` float32, products of queries with the bank's vectors; valid until the next call."""
        part = self._vectors[start:stop]
        if self._wide is not None:
            part = self._wide[: stop - start].copy_(part)
        return torch.mm(unit, part.T, out=_view(self._scores, len(unit), stop - start))

    def at_least(self, scores: Tensor, floor: Tensor) -> Tensor:
        """`[N, n]` bool, `scores >= floor`; valid until the next call."""
        return torch.ge(scores, floor, out=_view(self._hits, *scores.shape))


def _view(flat: Tensor, rows: int, columns: int) -> Tensor:
    return flat[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class _Candidates:
    """Pairs of a query and a bank vector, `[P]` each; sorted by query, then by bank vector.

    Attributes:
        rows, columns: int64, the query and the bank vector.
        values: float32, the similarity as the matrix product has it.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def above(cls, scores: Tensor, floor: Tensor, start: int, room: _Room) -> _Candidates:
        """What is not below the floor, `[N, 1]`, of `scores [N, n]` whose columns begin at `start`."""
        hits = room.at_least(scores, floor).flatten()
        # NumPy finds the few among the many in a fraction of PyTorch's time on a CPU.
        places = torch.from_numpy(np.flatnonzero(hits.numpy())) if hits.device.type == "cpu" else hits.nonzero()[:, 0]
        rows = places.div(scores.shape[1], rounding_mode="floor")
        return cls(rows, places - rows * scores.shape[1] + start, scores.flatten()[places])

    @classmethod
    def cat(cls, parts: list[_Candidates]) -> _Candidates:
        """The pairs of parts whose columns ascend from part to part."""
        rows = torch.cat([part.rows for part in parts])
        whole = cls(rows, torch.cat([p.columns for p in parts]), torch.cat([p.values for p in parts]))
        return whole if len(parts) == 1 else whole.select(rows.sort(stable=True).indices)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor) -> _Candidates:
        """The pairs that `keep` names."""
        return _Candidates(self.rows[keep], self.columns[keep], self.values[keep])

    def pruned(self, floor: Tensor) -> _Candidates:
        """Without those below the floor: early chunks were judged by a lower one."""
        return self.select(self.values >= floor[self.rows, 0])

    def merge(self, best: Tensor) -> Tensor:
        """The k largest values of each row, `[N, k]` like `best`, with these among them."""
        if not len(self):
            return best
        place, widest = _places(self.rows, len(best))
        table = best.new_full((len(best), widest), -math.inf)
        table[self.rows, place] = self.values
        return torch.cat((best, table), 1).topk(best.shape[1]).values


def search(
    queries: Tensor,
    bank_vectors: Tensor | BankIndex,
    top_k: int,
    *,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The `k = min(top_k, B)` most similar bank vectors of each query.

    Args:
        queries: `[N, C]` float, of any length (computed in float32); a zero vector has similarity 0 with everything.
        bank_vectors: `[B, C]` float, likewise; or an index of them, which spares measuring them for every image.
        top_k: neighbours wanted, 1 or more.
        query_chunk: queries compared at once.
        bank_chunk: bank vectors compared at once; memory is a few times `query_chunk * bank_chunk` floats.

    Returns:
        `similarities [N, k]` float32 in [-1, 1], descending, and `indices [N, k]` int64; equal similarities rank by
        index.

    Raises:
        ValueError: shapes that do not fit, vectors that are not finite, or `top_k` or a chunk below 1.
    """
    shape = (len(bank_vectors), bank_vectors.dim) if isinstance(bank_vectors, BankIndex) else tuple(bank_vectors.shape)
    if queries.ndim != 2 or len(shape) != 2 or queries.shape[1] != shape[1]:
        raise ValueError(
            f"search: got queries {tuple(queries.shape)} and bank vectors {shape}, expected [N, C] and [B, C] with the "
            "same C"
        )
    bank_dtype = bank_vectors.vectors.dtype if isinstance(bank_vectors, BankIndex) else bank_vectors.dtype
    if not queries.dtype.is_floating_point or not bank_dtype.is_floating_point:
        raise ValueError(f"search: got {queries.dtype} queries and a {bank_dtype} bank, expected floats")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected 1 or more; try 25")
    index = bank_vectors if isinstance(bank_vectors, BankIndex) else ExactIndex(bank_vectors, query_chunk, bank_chunk)
    k = min(top_k, len(index))
    if k == 0 or len(queries) == 0:
        empty, device = (len(queries), k), queries.device
        return torch.zeros(empty, device=device), torch.zeros(empty, dtype=torch.int64, device=device)
    return index.nearest(queries, k)


def best_candidates(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of every query among candidates, computed again so that equal ones are equal.

    Args:
        queries: `[N, C]` float.
        bank: `[B, C]` float.
        rows, columns: `[P]` int64, pairs sorted by query, then by bank vector; each query has k of them or more.
        k: neighbours wanted.

    Returns:
        `similarities [N, k]` float32 and `indices [N, k]` int64, as `search`.
    """
    similarities = similarities_of(queries, bank, rows, columns)
    best = _k_best(similarities, _Candidates(rows, columns, similarities), len(queries), k)
    return similarities[best], columns[best]


def _k_best(similarities: Tensor, found: _Candidates, count: int, k: int) -> Tensor:
    """`[N, k]` int64, places in `found` of the k nearest of every query."""
    # Candidates of a query come in ascending bank index, and stable sorts keep that order among equals.
    order = similarities.sort(descending=True, stable=True).indices
    order = order[found.rows[order].sort(stable=True).indices]
    counts = torch.bincount(found.rows, minlength=count)
    starts = counts.cumsum(0) - counts
    return order[starts[:, None] + torch.arange(k, device=starts.device)]


def _places(rows: Tensor, count: int) -> tuple[Tensor, int]:
    """Each pair's place among those of its row, `[P]`, and how many the longest row has; `rows` ascend."""
    counts = torch.bincount(rows, minlength=count)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows], int(counts.max())


def similarities_of(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[P]` float32: cosine of query `rows[p]` and bank vector `columns[p]`, to the bit for equal vectors."""
    dim, device = queries.shape[1], queries.device
    # Vectors are scaled to a largest component of 2^bits, rounded: C products of 2^(2 bits) fit into the 53 bits in
    # which float64 counts exactly. That is multiplied several numbers at a time, which int64 is not on most CPUs.
    bits = (53 - max(dim - 1, 0).bit_length()) // 2
    fixed = _fixed(queries, bits)
    wide = torch.float32 if device.type == "mps" else torch.float64
    lengths = _dots(fixed, fixed).to(wide)
    parts = [torch.empty(0, device=device, dtype=wide)]
    step = max(1, _BLOCK.get(device.type, _LARGE_BLOCK) // max(dim, 1))
    for row, column in zip(rows.split(step), columns.split(step), strict=True):
        other = _fixed(bank[column], bits)
        squares = lengths[row] * _dots(other, other).to(wide)
        parts.append(_dots(fixed[row], other).to(wide) / torch.where(squares > 0, squares, 1).sqrt())
    return torch.cat(parts).clamp(-1, 1).float()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """`[n]`, the product of each two rows of `[n, C]` whole numbers, exact; the dtype is theirs."""
    if a.device.type == "cpu":
        return torch.from_numpy(np.einsum("nc,nc->n", a.numpy(), b.numpy()))
    return (a * b).sum(1)


def _fixed(vectors: Tensor, bits: int) -> Tensor:
    """`[n, C]` whole numbers as float64: rows scaled by their largest magnitude, which no order of summing can change.

    Zero rows stay. MPS has no float64; there they are int64.
    """
    whole = torch.int64 if vectors.device.type == "mps" else torch.float64
    vectors = vectors.float()
    if vectors.shape[1] == 0:
        return vectors.to(whole)
    largest = vectors.abs().amax(1, keepdim=True)
    zero = largest <= _ZERO
    if bool(zero.any()):
        zero = _lengths(vectors)[:, None] <= _ZERO
    # Powers of two scale exactly, so that one division does for both.
    return (vectors / largest.mul_(2.0**-bits).masked_fill_(zero, torch.inf)).round_().to(whole)


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _inverse_lengths(vectors: Tensor) -> Tensor:
    """`[n]` float32, 0 for zero rows."""
    lengths = _lengths(vectors)
    if not bool(torch.isfinite(lengths).all()):
        raise ValueError("search: got NaN, infinity or vectors too long for float32; check the backbone's precision")
    return torch.where(lengths > _ZERO, 1 / lengths, 0)


def _largest_error(dim: int) -> float:
    """Bound of |product - similarity|: rounding of C float32 terms, of the scaling and of the result."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised where the program set precisions one backend at a time
        precision = "medium"
    # What the inputs may be rounded to first: nothing, TF32, bfloat16.
    inputs = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}[precision]
    return inputs + (dim + 64) * 2.0**-23
