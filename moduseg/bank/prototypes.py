"""A few k-means centres of each class in place of all its vectors: a small bank, the same size for every class.

An option, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SEED = 0
_STARTS = 4
"""Random starts of k-means, of which the best counts."""


def class_prototypes(vectors: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The centres of k-means in each class (background included), on the unit sphere again.

    A class of `count` vectors or fewer keeps them as they are. The result depends on the vectors alone: the seed is
    fixed, sums are in float64 on one thread.

    Args:
        vectors: `[B, C]` float, L2-normalised.
        labels: `[B]` integers.
        count: centres of a class, 1 or more.

    Returns:
        `vectors [M, C]` float32, grouped by ascending label, `labels [M]` int64, and `members [M]` int64: of each the
        row of the bank that is most like it (the first of equals), which stands for it where a neighbour is explained.

    Raises:
        ValueError: shapes that do not fit, or a count below 1.
    """
    if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
        raise ValueError(f"prototypes: got vectors {tuple(vectors.shape)} and labels {tuple(labels.shape)}, expected "
                         "[B, C] and [B]")  # fmt: skip
    if count < 1:
        raise ValueError(f"prototypes: got {count}, expected 1 or more; null keeps every vector")
    kept, names, members = [vectors[:0].float()], [labels[:0].long()], [labels[:0].long()]
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        centres = vectors[rows].float()
        if len(rows) > count:
            centres = _k_means(centres, count)
            rows = rows[(centres @ vectors[rows].float().T).argmax(1)]
        kept.append(centres)
        names.append(label.long().expand(len(rows)))
        members.append(rows)
    return torch.cat(kept), torch.cat(names), torch.cat(members)


def _k_means(vectors: Tensor, count: int) -> Tensor:
    """`[count, C]` float32 unit vectors."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1):  # the order of sums follows the number of threads
        found = KMeans(count, n_init=_STARTS, random_state=_SEED).fit(vectors.double().cpu().numpy())
    return functional.normalize(torch.from_numpy(found.cluster_centers_).to(vectors.device).float(), dim=1)
