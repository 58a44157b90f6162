"""Each proposal divides a vote between the labels of its neighbours; small proposals weigh more.

Where many masks of a tree hold a pixel, most are far larger than the object there, and a plain majority is theirs. So
the vote of a mask weighs one over the root of its area. It is divided as its neighbours' votes are, so that a mask that
is not sure between two labels leaves the choice to those that are. An option, not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.cells import Cells, split_into_cells
from moduseg.retrieval.balance import widest_float

_UNIT = 1 << 24
"""Votes are rounded to this fraction and added as whole numbers, so that the order of a sum changes no choice."""
_BLOCK = 4096
"""Cells whose votes are counted at once, which bounds the memory."""


@dataclass(frozen=True)
class DividedVotes:
    """How proposals divide their votes.

    Attributes:
        labels: `[D]` int64, the labels that anyone votes for, ascending.
        units: `[N, D]` of whole numbers >= 0 as floats (float64, on MPS float32, which rounds large sums).
    """

    labels: Tensor
    units: Tensor

    def select(self, rows: Tensor) -> DividedVotes:
        """Return the votes of some proposals, `[K]` int64 indices."""
        return DividedVotes(self.labels, self.units[rows])


def divide_votes(
    areas: Tensor, neighbour_labels: Tensor, similarities: Tensor, temperature: float | None = None
) -> DividedVotes:
    """Return the votes of proposals, `area ** -0.5` divided as their neighbours vote.

    Args:
        areas: `[N]` integers, pixels; an empty proposal has no vote.
        neighbour_labels: `[N, k]` int64, -1 where there is no neighbour; a proposal without any has no vote.
        similarities: `[N, k]` float32.
        temperature: a neighbour counts `exp((similarity - largest) / temperature)`; 1 if `None`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if neighbour_labels.shape != similarities.shape or areas.shape != neighbour_labels.shape[:1]:
        raise ValueError(
            f"divide_votes: got areas {tuple(areas.shape)}, labels {tuple(neighbour_labels.shape)} and similarities "
            f"{tuple(similarities.shape)}, expected [N], [N, k] and [N, k]"
        )
    dtype, device = widest_float(similarities.device), similarities.device
    is_neighbour = neighbour_labels >= 0
    labels, positions = neighbour_labels[is_neighbour].unique(return_inverse=True)
    columns = torch.zeros_like(neighbour_labels).masked_scatter(is_neighbour, positions)
    weights = is_neighbour.to(dtype)
    if temperature is not None and similarities.numel():
        largest = similarities.masked_fill(~is_neighbour, -torch.inf).amax(1, keepdim=True)
        differences = torch.where(is_neighbour, similarities - largest, 0).to(dtype)
        weights = weights * (differences / temperature).exp()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    strength = torch.where(areas > 0, areas.clamp(min=1).to(device, dtype).rsqrt(), 0)
    shares = torch.zeros((len(areas), len(labels)), dtype=dtype, device=device)
    if len(labels):
        shares.scatter_add_(1, columns, weights)
    return DividedVotes(labels, (shares * strength[:, None] * _UNIT).round())


def assemble_shares(masks: Tensor, votes: DividedVotes, parents: Tensor | None = None) -> Tensor:
    """Return the label map in which each pixel takes the label with most votes of the proposals that cover it.

    Args:
        masks: `[N, H, W]` bool; they may overlap.
        votes: of the proposals, on the same device; those for background (0) count like the others.
        parents: `[N]` int64 of masks that may be nested (`Proposals.parents`): the same map sooner.

    Returns:
        `[H, W]` uint8; background where nobody votes. Of equal sums, the smaller label.
    """
    if masks.numel() == 0 or not len(votes.labels):
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    cell_of, cell_pixels = split_into_cells(masks, parents=parents, in_any_order=True)
    return count_shares(masks.flatten(1)[:, cell_pixels], votes)[cell_of].view(masks.shape[1:])


def measure_share_confidence(masks: Tensor, votes: DividedVotes, label_map: Tensor) -> np.ndarray:
    """Return the share of the votes in each pixel that its label has, `[H, W]` uint8 on the CPU, 255 for all of them.

    Args:
        masks: `[N, H, W]` bool.
        votes: of the proposals, on the same device.
        label_map: `[H, W]` uint8; a label that nobody votes for in a pixel, as tidying may leave it, has 0.
    """
    confidence = torch.zeros(label_map.numel(), dtype=votes.units.dtype, device=masks.device)
    if masks.numel() and len(votes.labels):
        cell_of, cell_pixels = split_into_cells(masks, in_any_order=True)
        cover = masks.flatten(1)[:, cell_pixels]
        sums = torch.cat([_sum_votes(block, votes) for block in cover.split(_BLOCK, dim=1)], dim=1)
        flat = label_map.flatten().long()
        column = torch.searchsorted(votes.labels, flat).clamp(max=len(votes.labels) - 1)
        mine = torch.where(votes.labels[column] == flat, sums[column, cell_of], 0)
        confidence = mine / sums.sum(0).clamp(min=1)[cell_of]
    return (confidence * 255).round().to(torch.uint8).view(label_map.shape).cpu().numpy()


def _sum_votes(cover: Tensor, votes: DividedVotes) -> Tensor:
    """Return the votes for each label in each of some pixels, `[D, P]`, `cover` being `[N, P]` bool."""
    return votes.units.T @ cover.to(votes.units.dtype)


def count_shares(cover: Tensor, votes: DividedVotes) -> Tensor:
    """Return `[P]` uint8, the label with most votes in each of some pixels.

    Args:
        cover: `[N, P]` bool, whether a proposal covers a pixel.
        votes: of the proposals.
    """
    winners = [torch.zeros(0, dtype=torch.uint8, device=cover.device)]
    order = torch.arange(len(votes.labels), device=cover.device)[:, None]
    for block in cover.split(_BLOCK, dim=1):
        sums = _sum_votes(block, votes)
        most = sums.amax(0)
        # The labels ascend: the first of those with the largest sum is the smallest.
        first = order.expand_as(sums).masked_fill(sums < most, len(votes.labels)).amin(0)
        winners.append(torch.where(most > 0, votes.labels[first], 0).to(torch.uint8))
    return torch.cat(winners)


def label_cells_by_shares(cells: Cells, voters: np.ndarray, votes: DividedVotes) -> np.ndarray:
    """Return `[U]` int64, the label with most votes of some masks in each cell.

    Args:
        cells: of all masks.
        voters: `[K]` indices of the masks that vote.
        votes: of all masks, on the CPU.
    """
    if not len(voters) or not len(votes.labels):
        return np.zeros(len(cells.sizes), dtype=np.int64)
    cover = torch.from_numpy(np.ascontiguousarray(cells.cover[:, voters].T))
    return count_shares(cover, votes.select(torch.from_numpy(voters))).long().numpy()
