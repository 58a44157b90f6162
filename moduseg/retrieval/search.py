"""Exact nearest neighbours in the bank by cosine similarity (docs/method.md, step 6).

A matrix product is fast but not reproducible to the last bit: its rounding depends on the position of a row in the
matrix, so that two identical bank rows may differ and swap ranks. It therefore only names candidates: every row that
may be among the nearest within the rounding error. These few are compared again in integers, where the order of a sum
does not matter. The result does not depend on the chunk size, and equal similarities are exactly equal.
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
"""Bank vectors of the first chunk, which sets the floor that later ones have to pass; chunks double from there."""
_BLOCK = {"cpu": 1 << 17}
"""Numbers held at once while candidates are compared again, by device: the size of a core's cache."""
_LARGE_BLOCK = 1 << 22
"""Numbers held at once on every other device."""
_PENDING = 1 << 22
"""Candidates that may be pending; when there are more, they are compared again, and only the k best stay."""
_ZERO = 1e-15
"""A vector as short as this counts as zero: squares of smaller components would underflow in float32."""


class BankIndex(ABC):
    """Bank vectors prepared for many searches."""

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
        """Return what `search` does, for queries that were checked and `1 <= k <= B`."""


class ExactIndex(BankIndex):
    """Every bank vector is compared with every query, chunk by chunk.

    Args:
        vectors: `[B, C]` float of any length, on the device of the queries to come. In half precision they take half
            the memory; the products are in float32 either way.
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
        candidates = self._candidates(queries, k)
        return best_candidates(queries, self.vectors, rows=candidates.rows, columns=candidates.columns, k=k)

    def _candidates(self, queries: Tensor, k: int) -> _Candidates:
        """Return pairs that certainly contain the k nearest of every query; columns ascend within a row.

        With `e` the largest error of the product, the k-th best true similarity is at least the k-th best computed one
        minus `e`, so a vector among the k nearest has a computed similarity of at least that minus `2 e`.
        """
        margin = 2 * _largest_error(self.dim)
        unit = queries.float() * _inverse_lengths(queries.float())[:, None]
        best = unit.new_empty((len(queries), 0))
        floor = unit.new_full((len(queries), 1), -math.inf)
        pending: list[_Candidates] = []
        scratch = _Scratch(len(queries), min(self.bank_chunk, len(self)), self.vectors)
        for start, stop in self._chunks():
            scores = scratch.multiply(unit, start, stop).mul_(self.inverse_lengths[start:stop])
            if best.shape[1] < k:
                best = torch.cat((best, scores.topk(min(k, stop - start)).values), 1)
                best = best.topk(min(k, best.shape[1])).values
                if best.shape[1] == k:
                    floor = best[:, -1:] - margin
                candidates = _Candidates.above(scores, floor, start, scratch)
            else:
                # Few candidates pass the floor, and finding them is cheaper than the k largest of each chunk.
                candidates = _Candidates.above(scores, floor, start, scratch)
                best = candidates.merge(best)
                floor = best[:, -1:] - margin
            pending.append(candidates)
            if best.shape[1] == k and sum(len(part) for part in pending) > _PENDING:
                pending = [self._reduce(queries, _Candidates.cat(pending).prune(floor), k)]
        return _Candidates.cat(pending).prune(floor)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        start, size = 0, min(_FIRST_CHUNK, self.bank_chunk)
        while start < len(self):
            yield start, min(start + size, len(self))
            start, size = start + size, min(2 * size, self.bank_chunk)

    def _reduce(self, queries: Tensor, candidates: _Candidates, k: int) -> _Candidates:
        """Return the candidates, or the k nearest of them if there are still too many to keep."""
        if len(candidates) <= _PENDING // 2:
            return candidates
        similarities = similarities_of(queries, self.vectors, candidates.rows, candidates.columns)
        kept = _k_best(similarities, candidates, len(queries), k)
        return candidates.select(kept.flatten().sort().values)


class _Scratch:
    """Scratch buffers, allocated once and reused for every chunk.

    Blocks of this size that are allocated and freed for each chunk, with small results kept in between, fragment the C
    library's heap: with a bank of a million vectors that took gigabytes.

    Args:
        queries: their number.
        chunk: bank vectors of the largest chunk.
        vectors: `[B, C]`, the bank.
    """

    def __init__(self, queries: int, chunk: int, vectors: Tensor) -> None:
        self._vectors = vectors
        self._scores = torch.empty(queries * chunk, device=vectors.device)
        self._hits = torch.empty(queries * chunk, dtype=torch.bool, device=vectors.device)
        is_narrow = vectors.dtype != torch.float32
        self._wide = torch.empty((chunk, vectors.shape[1]), device=vectors.device) if is_narrow else None

    def multiply(self, unit: Tensor, start: int, stop: int) -> Tensor:
        """Return `[N, stop - start]` float32, queries times bank vectors; valid until the next call."""
        part = self._vectors[start:stop]
        if self._wide is not None:
            part = self._wide[: stop - start].copy_(part)
        return torch.mm(unit, part.T, out=_view(self._scores, len(unit), stop - start))

    def at_least(self, scores: Tensor, floor: Tensor) -> Tensor:
        """Return `[N, n]` bool, `scores >= floor`; valid until the next call."""
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
    def above(cls, scores: Tensor, floor: Tensor, start: int, scratch: _Scratch) -> _Candidates:
        """Return the pairs of `scores [N, n]` not below the floor, `[N, 1]`; column 0 is bank vector `start`."""
        hits = scratch.at_least(scores, floor).flatten()
        # On a CPU, NumPy finds few hits in a fraction of PyTorch's time.
        flat = torch.from_numpy(np.flatnonzero(hits.numpy())) if hits.device.type == "cpu" else hits.nonzero()[:, 0]
        rows = flat.div(scores.shape[1], rounding_mode="floor")
        return cls(rows, flat - rows * scores.shape[1] + start, scores.flatten()[flat])

    @classmethod
    def cat(cls, parts: list[_Candidates]) -> _Candidates:
        """Return the pairs of all parts; columns ascend from part to part."""
        rows = torch.cat([part.rows for part in parts])
        joined = cls(rows, torch.cat([p.columns for p in parts]), torch.cat([p.values for p in parts]))
        return joined if len(parts) == 1 else joined.select(rows.sort(stable=True).indices)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor) -> _Candidates:
        """Return the pairs that `keep` names."""
        return _Candidates(self.rows[keep], self.columns[keep], self.values[keep])

    def prune(self, floor: Tensor) -> _Candidates:
        """Return the pairs that are not below the floor, which was lower when early chunks were compared."""
        return self.select(self.values >= floor[self.rows, 0])

    def merge(self, best: Tensor) -> Tensor:
        """Return the k largest of `best [N, k]` and these values in each row, `[N, k]`."""
        if not len(self):
            return best
        column, num_columns = _rank_in_row(self.rows, len(best))
        table = best.new_full((len(best), num_columns), -math.inf)
        table[self.rows, column] = self.values
        return torch.cat((best, table), 1).topk(best.shape[1]).values


def search(
    queries: Tensor,
    bank_vectors: Tensor | BankIndex,
    top_k: int,
    *,
    query_chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the `k = min(top_k, B)` most similar bank vectors of each query.

    Args:
        queries: `[N, C]` float, of any length (computed in float32); a zero vector has similarity 0 with everything.
        bank_vectors: `[B, C]` float, likewise; or an index of them, which measures them once for all images.
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


def best_candidates(queries: Tensor, bank: Tensor, *, rows: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of every query among candidates, compared again so that equal ones are exactly equal.

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


def _k_best(similarities: Tensor, candidates: _Candidates, count: int, k: int) -> Tensor:
    """Return `[N, k]` int64, the positions in `candidates` of the k nearest of every query."""
    # Candidates of a query come in ascending bank index, and stable sorts keep that order among equals.
    order = similarities.sort(descending=True, stable=True).indices
    order = order[candidates.rows[order].sort(stable=True).indices]
    counts = torch.bincount(candidates.rows, minlength=count)
    starts = counts.cumsum(0) - counts
    return order[starts[:, None] + torch.arange(k, device=starts.device)]


def _rank_in_row(rows: Tensor, count: int) -> tuple[Tensor, int]:
    """Return each pair's rank among those of its row, `[P]`, and the length of the longest row; `rows` ascend."""
    counts = torch.bincount(rows, minlength=count)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows], int(counts.max())


def similarities_of(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `[P]` float32: the cosine of query `rows[p]` and bank vector `columns[p]`, exact for equal vectors."""
    dim, device = queries.shape[1], queries.device
    # Vectors are scaled to a largest component of 2^bits and rounded: C products of 2^(2 bits) fit into the 53 bits in
    # which float64 counts exactly. Most CPUs multiply several float64 at a time, but only one int64.
    bits = (53 - max(dim - 1, 0).bit_length()) // 2
    fixed = _fixed(queries, bits)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    lengths = _dots(fixed, fixed).to(dtype)
    parts = [torch.empty(0, device=device, dtype=dtype)]
    step = max(1, _BLOCK.get(device.type, _LARGE_BLOCK) // max(dim, 1))
    for row, column in zip(rows.split(step), columns.split(step), strict=True):
        other = _fixed(bank[column], bits)
        squares = lengths[row] * _dots(other, other).to(dtype)
        parts.append(_dots(fixed[row], other).to(dtype) / torch.where(squares > 0, squares, 1).sqrt())
    return torch.cat(parts).clamp(-1, 1).float()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return `[n]`, the exact products of the rows of two `[n, C]` tensors of integers, in their dtype."""
    if a.device.type == "cpu":
        return torch.from_numpy(np.einsum("nc,nc->n", a.numpy(), b.numpy()))
    return (a * b).sum(1)


def _fixed(vectors: Tensor, bits: int) -> Tensor:
    """Return `[n, C]` integers as float64: rows scaled by their largest magnitude, whatever the order of summing.

    Zero rows stay. On MPS, which has no float64, the dtype is int64.
    """
    dtype = torch.int64 if vectors.device.type == "mps" else torch.float64
    vectors = vectors.float()
    if vectors.shape[1] == 0:
        return vectors.to(dtype)
    largest = vectors.abs().amax(1, keepdim=True)
    is_zero = largest <= _ZERO
    if bool(is_zero.any()):
        is_zero = _lengths(vectors)[:, None] <= _ZERO
    # Powers of two scale exactly, so that one division both normalises and scales.
    return (vectors / largest.mul_(2.0**-bits).masked_fill_(is_zero, torch.inf)).round_().to(dtype)


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _inverse_lengths(vectors: Tensor) -> Tensor:
    """Return `[n]` float32, 0 for zero rows."""
    lengths = _lengths(vectors)
    if not bool(torch.isfinite(lengths).all()):
        raise ValueError("search: got NaN, infinity or vectors too long for float32; check the backbone's precision")
    return torch.where(lengths > _ZERO, 1 / lengths, 0)


def _largest_error(dim: int) -> float:
    """Return a bound of |product - similarity|: the rounding of C float32 terms, of the scaling and of the result."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised where the program set precisions one backend at a time
        precision = "medium"
    # The inputs may be rounded first: not at all, to TF32, or to bfloat16.
    input_error = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}[precision]
    return input_error + (dim + 64) * 2.0**-23
