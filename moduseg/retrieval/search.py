"""Exact nearest neighbours in the bank by cosine similarity (METHOD, step 6).

A matrix product is fast but not reproducible to the last bit: its rounding depends on where in the matrix a row lies,
so two identical bank rows may come out different and swap places. So it only names candidates, every row that its
rounding error leaves a chance, and these few are computed again in whole numbers, where the order of a sum does not
matter. The result is the same for every chunk size, and equal similarities are really equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Numbers held at once while candidates are computed again."""
_ZERO = 1e-15
"""A vector as short as this counts as zero: squares of still smaller components would leave float32."""


def search(
    queries: Tensor, bank_vectors: Tensor, top_k: int, *, query_chunk: int = 1024, bank_chunk: int = 16384
) -> tuple[Tensor, Tensor]:
    """The `k = min(top_k, B)` most similar bank vectors of each query.

    Args:
        queries: `[N, C]` float, of any length (computed in float32); a zero vector has similarity 0 with everything.
        bank_vectors: `[B, C]` float, likewise.
        top_k: neighbours wanted, 1 or more.
        query_chunk: queries compared at once.
        bank_chunk: bank vectors compared at once; memory is `query_chunk * bank_chunk` floats.

    Returns:
        `similarities [N, k]` float32 in [-1, 1], descending, and `indices [N, k]` int64; equal similarities rank by
        index.

    Raises:
        ValueError: shapes that do not fit, vectors that are not finite, or `top_k` or a chunk below 1.
    """
    if queries.ndim != 2 or bank_vectors.ndim != 2 or queries.shape[1] != bank_vectors.shape[1]:
        raise ValueError(
            f"search: got queries {tuple(queries.shape)} and bank vectors {tuple(bank_vectors.shape)}, expected [N, C] "
            "and [B, C] with the same C"
        )
    if not queries.dtype.is_floating_point or not bank_vectors.dtype.is_floating_point:
        raise ValueError(f"search: got {queries.dtype} queries and a {bank_vectors.dtype} bank, expected floats")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected 1 or more; try 25")
    if query_chunk < 1 or bank_chunk < 1:
        raise ValueError(f"search: got chunks of {query_chunk} and {bank_chunk}, expected 1 or more")
    k = min(top_k, len(bank_vectors))
    if k == 0 or len(queries) == 0:
        shape, device = (len(queries), k), queries.device
        return torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int64, device=device)
    parts = [_nearest(part, bank_vectors, k, bank_chunk) for part in queries.split(query_chunk)]
    return torch.cat([similarities for similarities, _ in parts]), torch.cat([indices for _, indices in parts])


def _nearest(queries: Tensor, bank: Tensor, k: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """`search` for one chunk of queries, with a bank that is not empty."""
    rows, columns = _candidates(queries, bank, k, bank_chunk)
    similarities = _similarities(queries, bank, rows, columns)
    # Candidates of a query come in ascending bank index, and stable sorts keep that order among equals.
    order = similarities.sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    counts = torch.bincount(rows, minlength=len(queries))
    starts = counts.cumsum(0) - counts
    best = order[starts[:, None] + torch.arange(k, device=starts.device)]
    return similarities[best], columns[best]


def _candidates(queries: Tensor, bank: Tensor, k: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """`(row, column)` pairs that hold the k nearest of every query for certain; columns ascend within a row.

    With `e` the largest error of the product, the k-th best true similarity is at least the k-th best computed one
    minus `e`, so whatever belongs to the k nearest was computed as no less than that minus `2 e`.
    """
    margin = 2 * _largest_error(queries.shape[1])
    unit = queries.float() * _inverse_lengths(queries.float())[:, None]
    best = unit.new_empty((len(queries), 0))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    floor = unit.new_full((len(queries),), -math.inf)
    for start in range(0, len(bank), bank_chunk):
        part = bank[start : start + bank_chunk].float()
        # Scaled after the product, which spares a copy of the bank for every image.
        scores = (unit @ part.T).mul_(_inverse_lengths(part))
        best = torch.cat((best, scores.topk(min(k, scores.shape[1])).values), 1)
        best = best.topk(min(k, best.shape[1])).values
        if best.shape[1] == k:
            floor = best[:, -1] - margin
        rows, columns = (scores >= floor[:, None]).nonzero(as_tuple=True)
        found.append((rows, columns + start, scores[rows, columns]))
    rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    # Early chunks were judged by a lower floor than the final one.
    left = values >= floor[rows]
    return rows[left], columns[left]


def _similarities(queries: Tensor, bank: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[P]` float32: cosine of query `rows[p]` and bank vector `columns[p]`, to the bit for equal vectors."""
    dim = queries.shape[1]
    # Vectors are scaled to a largest component of 2^bits, rounded: C products of 2^(2 bits) fit into 63 bits.
    bits = (62 - max(dim - 1, 0).bit_length()) // 2
    fixed = _fixed(queries, bits)
    lengths = fixed.square().sum(1)
    wide = torch.float32 if queries.device.type == "mps" else torch.float64
    parts = []
    for row, column in zip(*(pairs.split(max(1, _BLOCK // max(dim, 1))) for pairs in (rows, columns)), strict=True):
        other = _fixed(bank[column], bits)
        squares = lengths[row].to(wide) * other.square().sum(1).to(wide)
        parts.append((fixed[row] * other).sum(1).to(wide) / torch.where(squares > 0, squares, 1).sqrt())
    return torch.cat(parts).clamp(-1, 1).float()


def _fixed(vectors: Tensor, bits: int) -> Tensor:
    """`[n, C]` int64: rows scaled by their largest magnitude, which no order of summing can change; zero rows stay."""
    vectors = vectors.float()
    if vectors.shape[1] == 0:
        return vectors.long()
    largest = vectors.abs().amax(1, keepdim=True)
    scale = torch.where(_lengths(vectors)[:, None] > _ZERO, largest, torch.inf)
    return (vectors / scale * 2.0**bits).round().long()


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
