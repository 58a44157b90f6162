"""Exact nearest neighbours in the bank by cosine similarity (docs/method.md, step 6).

A matrix product is fast but not reproducible to the last bit: its rounding depends on the position of a row in the
matrix, so that two identical bank rows may differ and swap ranks. It therefore only names candidates: every row that
may be among the nearest within the rounding error. These few are compared again in integers, where the order of a sum
does not matter. The result does not depend on the chunk size, and equal similarities are exactly equal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

QUERY_CHUNK, BANK_CHUNK = 1024, 8192
"""Queries and bank vectors compared at once: 32 MiB of float32."""
_GROUP = 32
"""Most similarities of a query that are represented by their largest while candidates are searched."""
_BLOCK = 1 << 16
"""Numbers held at once while candidates are compared again on a CPU: they fit the cache of a core."""
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
        bank_chunk: bank vectors compared at once with as many queries, with fewer queries in proportion more; memory is
            a few times `query_chunk * bank_chunk` floats.

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
        # Below every similarity, but above what fills up groups.
        floor = unit.new_full((len(queries), 1), torch.finfo(torch.float32).min)
        pending: list[_Candidates] = []
        is_narrow = self.vectors.dtype != torch.float32
        scale = 1 if is_narrow else max(1, self.query_chunk // len(queries))
        chunk = min(self.bank_chunk * scale, len(self))
        scratch = _Scratch(len(queries), chunk, self.vectors)
        for start in range(0, len(self), chunk):
            stop = min(start + chunk, len(self))
            groups = scratch.multiply(unit, self.inverse_lengths, start, stop, k)
            # The largest of each group are similarities of different vectors, so that the k-th largest of them is not
            # above the k-th best similarity: a floor for much less than the k largest of all would take.
            largest = groups.amax(1)
            best = torch.cat((best, largest), 1)
            best = best.topk(min(k, best.shape[1])).values
            if best.shape[1] == k:
                floor = best[:, -1:] - margin
            pending.append(_Candidates.above(groups, largest, floor, start))
            if best.shape[1] == k and sum(len(part) for part in pending) > _PENDING:
                pending = [self._reduce(queries, _Candidates.cat(pending).prune(floor).sort(len(self)), k)]
        return _Candidates.cat(pending).prune(floor).sort(len(self))

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
        self._scores = torch.empty(queries * (chunk + _GROUP), device=vectors.device)
        is_narrow = vectors.dtype != torch.float32
        self._wide = torch.empty((chunk, vectors.shape[1]), device=vectors.device) if is_narrow else None

    def multiply(self, unit: Tensor, inverse_lengths: Tensor, start: int, stop: int, k: int) -> Tensor:
        """Return the similarities of queries and bank vectors `start` to `stop`, in groups; valid until the next call.

        Args:
            unit: `[N, C]` float32 of length 1.
            inverse_lengths: `[B]` float32, of the bank.
            start, stop: of the chunk.
            k: neighbours wanted; there are several times as many groups, if the chunk has as many vectors.

        Returns:
            `[N, G, S]` float32; bank vector `start + i` is at `[:, i // S, i % S]`, minus infinity fills up the rest.
        """
        part = self._vectors[start:stop]
        if self._wide is not None:
            part = self._wide[: stop - start].copy_(part)
        count = stop - start
        group = max(1, min(_GROUP, count // (4 * k)))
        num_groups = -(-count // group)
        scores = self._scores[: len(unit) * group * num_groups].view(len(unit), -1)
        scores[:, count:] = -math.inf
        torch.mm(unit, part.T, out=scores[:, :count]).mul_(inverse_lengths[start:stop])
        # Members of a group are far from each other, so that a maximum is taken of whole rows at once.
        return scores.view(len(unit), group, num_groups)


@dataclass(frozen=True)
class _Candidates:
    """Pairs of a query and a bank vector, `[P]` each, in any order unless `sort` made them.

    Attributes:
        rows, columns: int64, the query and the bank vector.
        values: float32, the similarity as the matrix product has it.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def above(cls, groups: Tensor, largest: Tensor, floor: Tensor, start: int) -> _Candidates:
        """Return the pairs of a chunk that are not below the floor.

        Args:
            groups: `[N, G, S]`, the similarities of the chunk, see `_Scratch.multiply`.
            largest: `[N, S]`, the largest of each group.
            floor: `[N, 1]`.
            start: first bank vector of the chunk.
        """
        num_members, num_groups = groups.shape[1:]
        if groups.device.type == "cpu":
            # Few groups have a member above the floor, and only theirs are looked at; NumPy finds them in a fraction of
            # PyTorch's time.
            row, group = np.divmod(np.flatnonzero(largest.numpy() >= floor.numpy()), num_groups)
            members = groups.numpy()[row, :, group]
            flat = np.flatnonzero(members >= floor.numpy()[row])
            hit, member = np.divmod(flat, num_members)
            values = torch.from_numpy(members.ravel()[flat])
            rows, columns = torch.from_numpy(row[hit]), torch.from_numpy(member * num_groups + group[hit])
        else:
            rows, columns = (groups.flatten(1) >= floor).nonzero().T
            values = groups.flatten(1)[rows, columns]
        return cls(rows, columns + start, values)

    @classmethod
    def cat(cls, parts: list[_Candidates]) -> _Candidates:
        """Return the pairs of all parts."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "columns", "values")))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Tensor) -> _Candidates:
        """Return the pairs that `keep` names."""
        return _Candidates(self.rows[keep], self.columns[keep], self.values[keep])

    def prune(self, floor: Tensor) -> _Candidates:
        """Return the pairs that are not below the floor, which was lower when early chunks were compared."""
        return self.select(self.values >= floor[self.rows, 0])

    def sort(self, num_columns: int) -> _Candidates:
        """Return the pairs sorted by query, then by bank vector, of which there are `num_columns`."""
        return self.select((self.rows * num_columns + self.columns).argsort())


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
        bank_chunk: bank vectors compared at once, see `ExactIndex`.

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
        rows: `[P]` int64, the queries of pairs, sorted by query, then by bank vector; each query is in k or more.
        columns: `[P]` int64, the bank vectors of the pairs.
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


def similarities_of(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `[P]` float32: the cosine of query `rows[p]` and bank vector `columns[p]`, exact for equal vectors."""
    dim, device = queries.shape[1], queries.device
    # Vectors are scaled to a largest component of 2^bits and rounded: C products of 2^(2 bits) fit into the 53 bits in
    # which float64 counts exactly. Most CPUs multiply several float64 at a time, but only one int64.
    bits = (53 - max(dim - 1, 0).bit_length()) // 2
    fixed = _fixed(queries, bits)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if device.type == "cpu":
        return _compare_pairs(fixed.numpy(), bank, rows.numpy(), columns, bits)
    lengths = (fixed * fixed).sum(1).to(dtype)
    parts = [torch.empty(0, device=device, dtype=dtype)]
    step = max(1, _LARGE_BLOCK // max(dim, 1))
    for row, column in zip(rows.split(step), columns.split(step), strict=True):
        other = _fixed(bank[column], bits)
        squares = lengths[row] * (other * other).sum(1).to(dtype)
        parts.append((fixed[row] * other).sum(1).to(dtype) / torch.where(squares > 0, squares, 1).sqrt())
    return torch.cat(parts).clamp(-1, 1).float()


def _compare_pairs(fixed: np.ndarray, bank: Tensor, rows: np.ndarray, columns: Tensor, bits: int) -> Tensor:
    """Return what `similarities_of` does, on a CPU: a few vectors at a time, which stay in its cache.

    Args:
        fixed: `[N, C]`, the queries as `_fixed` makes them.
        bank: `[B, C]` float.
        rows, columns: `[P]` int64, the pairs.
        bits: of `_fixed`.
    """
    products, squares = np.empty(len(rows)), np.empty(len(rows))
    step = max(1, _BLOCK // max(fixed.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        other = _fixed(bank.index_select(0, columns[part]), bits).numpy()
        np.einsum("nc,nc->n", other, other, out=squares[part])
        # Pairs of a query stand side by side, so that it is not copied for each of them.
        row, result = rows[part], products[part]
        edges = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]
        for first, last in pairwise(edges):
            np.dot(other[first:last], fixed[row[first]], out=result[first:last])
    squares *= np.einsum("nc,nc->n", fixed, fixed)[rows]
    similarities = products / np.sqrt(np.where(squares > 0, squares, 1))
    return torch.from_numpy(similarities).clamp_(-1, 1).float()


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
