"""Clusters of vectors: k-means and spectral clustering in plain tensors, on any device, repeatable from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

_STARTS = 4
"""Number of random starts of k-means; the one with the smallest distances counts."""
_BLOCK = 1 << 24
"""Distances that are computed at once."""


def find_nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centre of each vector and its squared distance, `[N]` int64 and `[N]`.

    Args:
        vectors: `[N, D]`.
        centres: `[K, D]`, 1 or more; of equally near ones the first counts.
    """
    lengths = (centres * centres).sum(1)
    labels, distances = [], []
    for part in vectors.split(max(1, _BLOCK // len(centres))):
        squared = (lengths - 2 * part @ centres.T) + (part * part).sum(1, keepdim=True)
        nearest = squared.min(1)
        labels.append(nearest.indices)
        distances.append(nearest.values.clamp(min=0))
    return torch.cat(labels), torch.cat(distances)


def k_means(vectors: Tensor, count: int, *, seed: int = 0, weights: Tensor | None = None, rounds: int = 50) -> Tensor:
    """Return centres that k-means finds from the best of four random starts (k-means++).

    Args:
        vectors: `[N, D]` float, 1 or more.
        count: centres; vectors that are fewer, or fewer different ones, give fewer.
        seed: of the starts.
        weights: `[N]` > 0, how much each vector counts; all alike if omitted.
        rounds: at most so many times centres move.

    Returns:
        `[K, D]`, `K <= count`; each has a vector or more.

    Raises:
        ValueError: no vector, or a count below 1.
    """
    if not len(vectors) or count < 1:
        raise ValueError(f"k-means: got {len(vectors)} vectors and {count} clusters, expected 1 or more of both")
    weights = vectors.new_ones(len(vectors)) if weights is None else weights.to(vectors)
    results: list[tuple[float, Tensor]] = []
    for start in range(_STARTS):
        # Drawn on the host, so that they are the same on every device.
        draws = torch.rand(count, generator=torch.Generator().manual_seed(seed * _STARTS + start)).to(vectors.device)
        centres = _choose_starts(vectors, weights, draws)
        labels, _ = find_nearest(vectors, centres)
        for _ in range(rounds):
            centres, labels, is_settled = _move(vectors, weights, centres, labels)
            if is_settled:
                break
        results.append((float((find_nearest(vectors, centres)[1] * weights).sum()), centres))
    return min(results, key=lambda result: result[0])[1]


def _choose_starts(vectors: Tensor, weights: Tensor, draws: Tensor) -> Tensor:
    """Return `[K, D]` vectors, each drawn with a probability that grows with its squared distance from the others."""
    chosen = [_draw(weights, draws[0])]
    distances = ((vectors - vectors[chosen[0]]) ** 2).sum(1)
    for draw in draws[1:]:
        chosen.append(_draw(weights * distances, draw))
        distances = torch.minimum(distances, ((vectors - vectors[chosen[-1]]) ** 2).sum(1))
    return torch.unique(vectors[torch.stack(chosen)], dim=0)


def _draw(probabilities: Tensor, draw: Tensor) -> Tensor:
    """Return the index at which the running sum of `[N]` values passes the share `draw` of their total."""
    total = probabilities.double().cumsum(0) if probabilities.device.type != "mps" else probabilities.cumsum(0)
    return torch.searchsorted(total, draw.to(total) * total[-1], right=True).clamp(max=len(total) - 1)


def _move(vectors: Tensor, weights: Tensor, centres: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the means of clusters that are not empty, the labels by these, and whether the labels stayed as before."""
    membership = torch.zeros(len(centres), len(vectors), dtype=vectors.dtype, device=vectors.device)
    membership[labels, torch.arange(len(vectors), device=vectors.device)] = weights
    totals = membership.sum(1)
    is_used = totals > 0
    moved = (membership @ vectors)[is_used] / totals[is_used, None]
    new_labels, _ = find_nearest(vectors, moved)
    return moved, new_labels, len(moved) == len(centres) and bool((new_labels == labels).all())


def embed_spectrally(vectors: Tensor, temperature: float, max_dims: int) -> tuple[Tensor, Tensor]:
    """Return the smallest eigenvalues of the normalised graph Laplacian of vectors, and their eigenvectors.

    Two vectors are connected by `exp((cos - 1) / temperature)`.

    Args:
        vectors: `[N, D]`.
        temperature: above 0; small ones cut what is not alike.
        max_dims: eigenvectors that are returned, all `N` at most.

    Returns:
        `[k]` ascending in 0..2, and `[N, k]`, `k = min(max_dims, N)`.
    """
    units = torch.nn.functional.normalize(vectors, dim=1)
    affinity = ((units @ units.T - 1) / temperature).exp()
    scale = affinity.sum(1).rsqrt()
    laplacian = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    laplacian -= scale[:, None] * affinity * scale
    values, eigenvectors = torch.linalg.eigh(laplacian)
    return values[:max_dims], eigenvectors[:, :max_dims]


def count_by_eigengap(values: Tensor, max_count: int) -> int:
    """Return the number of clusters in 2..`max_count` after which the eigenvalues jump most; the first of equals.

    Args:
        values: ascending eigenvalues, of `max_count + 1` or more where there are so many.
        max_count: 2 or more.
    """
    gaps = values[1:].diff()[: max_count - 1]
    return 2 + int(gaps.argmax()) if len(gaps) else min(2, len(values))
