"""Replace the vectors of each class by a few k-means centres: a small bank, equally large for every class.

An option, not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SEED = 0
_STARTS = 4
"""Number of random starts of k-means; the best one counts."""


@dataclass(frozen=True)
class Prototypes:
    """Centres of all classes.

    Attributes:
        vectors: `[M, C]` float32, L2-normalised, grouped by ascending label.
        labels: `[M]` int64.
        members: `[M]` int64, the row of the bank that is most similar to each centre (the first of equal ones). It
            stands for the centre where a neighbour is explained.
    """

    vectors: Tensor
    labels: Tensor
    members: Tensor


def find_prototypes(vectors: Tensor, labels: Tensor, count: int) -> Prototypes:
    """Return the k-means centres of each class (background included), L2-normalised.

    A class of at most `count` vectors keeps them. The result depends on the vectors alone: the seed is fixed, and sums
    are in float64 on one thread.

    Args:
        vectors: `[B, C]` float, L2-normalised.
        labels: `[B]` integers.
        count: number of centres of a class, 1 or more.

    Raises:
        ValueError: shapes that do not fit, or a count below 1.
    """
    if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
        raise ValueError(f"prototypes: got vectors {tuple(vectors.shape)} and labels {tuple(labels.shape)}, expected "
                         "[B, C] and [B]")  # fmt: skip
    if count < 1:
        raise ValueError(f"prototypes: got {count}, expected 1 or more; null keeps every vector")
    prototypes, names, members = [vectors[:0].float()], [labels[:0].long()], [labels[:0].long()]
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        centres = vectors[rows].float()
        if len(rows) > count:
            centres = _k_means(centres, count)
            rows = rows[(centres @ vectors[rows].float().T).argmax(1)]
        prototypes.append(centres)
        names.append(label.long().expand(len(rows)))
        members.append(rows)
    return Prototypes(torch.cat(prototypes), torch.cat(names), torch.cat(members))


def _k_means(vectors: Tensor, count: int) -> Tensor:
    """Return `[count, C]` float32 unit vectors."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):  # the order of sums depends on the number of threads
        fitted = KMeans(count, n_init=_STARTS, random_state=_SEED).fit(vectors.double().cpu().numpy())
    return functional.normalize(torch.from_numpy(fitted.cluster_centers_).to(vectors.device).float(), dim=1)
