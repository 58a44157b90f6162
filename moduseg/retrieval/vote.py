"""The hierarchical vote of a query's neighbours (docs/method.md, step 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def vote(neighbour_labels: Tensor, similarities: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the label that each query's neighbours vote for.

    The label with most neighbours wins; a tie goes to the larger summed similarity (in float64), a full tie to the
    label whose first neighbour ranks highest.

    Args:
        neighbour_labels: `[N, k]` integers >= 0, nearest first; 0 is background, a label like any other. `k` may be 0.
        similarities: `[N, k]` float.
        temperature: if given, a neighbour's vote weighs `exp((similarity - largest) / temperature)` instead of 1: a
            softmax over the neighbours, so that a far one counts little and a large k does no harm. Not in the paper.

    Returns:
        `labels [N]` int64 and `scores [N]` float64 (float32 on MPS), the mean similarity of the winning label's
        neighbours; label 0 and score 0 if there are no neighbours.

    Raises:
        ValueError: shapes that do not fit, a negative label, or a temperature that is not positive.
    """
    if neighbour_labels.ndim != 2 or neighbour_labels.shape != similarities.shape:
        raise ValueError(
            f"vote: got labels {tuple(neighbour_labels.shape)} and similarities {tuple(similarities.shape)}, expected "
            "[N, k] twice"
        )
    if temperature is not None and temperature <= 0:
        raise ValueError(f"vote: got temperature {temperature}, expected more than 0; leave it out for equal votes")
    count, k = neighbour_labels.shape
    device = neighbour_labels.device
    # MPS has no float64. Float32 similarities add up exactly in float64, so the order of the scatter does not matter.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if neighbour_labels.numel() == 0:
        return torch.zeros(count, dtype=torch.int64, device=device), torch.zeros(count, dtype=dtype, device=device)
    labels = neighbour_labels.long()
    lowest, highest = labels.aminmax()
    if int(lowest) < 0:
        raise ValueError(f"vote: got label {int(lowest)}, expected 0 or more; leave out queries without neighbours")
    shape = (count, int(highest) + 1)
    votes = torch.zeros(shape, dtype=torch.int64, device=device).scatter_add(1, labels, torch.ones_like(labels))
    sums = torch.zeros(shape, dtype=dtype, device=device).scatter_add(1, labels, similarities.to(dtype))
    ranks = torch.arange(k, device=device).expand_as(labels)
    first = torch.full(shape, k, device=device).scatter_reduce(1, labels, ranks, "amin")

    ballots: Tensor = votes
    if temperature is not None:
        weights = ((similarities - similarities.amax(1, keepdim=True)).to(dtype) / temperature).exp()
        ballots = torch.zeros(shape, dtype=dtype, device=device).scatter_add(1, labels, weights)
    tied = ballots == ballots.amax(1, keepdim=True)
    best = sums.masked_fill(~tied, -torch.inf)
    tied &= best == best.amax(1, keepdim=True)
    winner = first.masked_fill(~tied, k).argmin(1, keepdim=True)
    scores = sums.gather(1, winner) / votes.gather(1, winner)
    return winner[:, 0], scores[:, 0]
