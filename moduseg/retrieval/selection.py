"""Which of overlapping proposals to believe: the set that explains most of the image, in place of NMS by score.

SAM gives an object, its parts, and the object with its surroundings; all of them are labelled. Suppression by score
decides between two of a kind. Here the whole set is chosen at once, such that no two of its masks are one and the same
place, and that the sum of what its masks are worth is largest. A mask is worth its area times how sure its label is,
less what the same pixels are worth as background: to paint nothing is to call them background, and where a background
proposal is sure of them, that is the better explanation. So a parent is kept iff it is worth more than the best choice
of its parts, and a part stays where its parent is not sure. An option, not in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.cells import Cells
from moduseg.retrieval.balance import Candidates, class_ranks
from moduseg.retrieval.rasterize import rasterize
from moduseg.retrieval.suppress import check_scored_masks, descending

NEAREST = 3
"""Neighbours of a class that stand for it in a margin."""
_UNIT = 1 << 20
"""What a pixel is worth is counted in whole parts of this, so that no order of sums changes a choice."""
_BRANCHINGS = 5000
"""Decisions after which a knot of masks that overlap each other without order is left to the greedy rule."""
_DEPTH = 200
"""Decisions inside one another, the same: far below what Python nests."""


def margins(candidates: Candidates, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
    """How much nearer each query is to its label than to any other: `1 - d / d'`.

    `d` is the mean distance (`1 - similarity`) of the query to the `NEAREST` nearest vectors of its label, `d'` the
    smallest such mean of another label. The margin is relative, so it needs no scale of the backbone's similarities.

    Args:
        candidates: of the queries, to a depth of `NEAREST` at least (more by as many as may be left out).
        labels: `[N]` int64, what was voted.
        allowed: `[N, M]` bool, candidates that count; all where left out.

    Returns:
        `[N]` float64 in [0, 1]; 0 where another label is nearer or where there is no vector of the label, 1 where there
        is no other label.
    """
    near, of = candidates.similarities, candidates.labels
    wide = torch.float32 if near.device.type == "mps" else torch.float64
    usable = torch.ones_like(near, dtype=torch.bool) if allowed is None else allowed
    usable = usable & (class_ranks(usable, of) < NEAREST)
    size = int(torch.cat((labels.flatten(), of, of.new_zeros(1))).max()) + 1
    columns = of.expand_as(near)
    shape = (len(near), size)
    sums = torch.zeros(shape, dtype=wide, device=near.device).scatter_add(1, columns, (1 - near.to(wide)) * usable)
    counts = torch.zeros(shape, dtype=torch.int64, device=near.device).scatter_add(1, columns, usable.long())
    means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
    own = means.gather(1, labels[:, None])[:, 0]
    other = means.scatter(1, labels[:, None], torch.inf).amin(1)
    sure = torch.where(other > 0, 1 - own / other, torch.zeros_like(own))
    return torch.where(own.isinf(), torch.zeros_like(own), sure).clamp(0, 1)


def worth(certainty: Tensor, quality: Tensor) -> np.ndarray:
    """`[N]` int64: what a pixel of each mask is worth, `certainty * quality`, in whole numbers.

    Args:
        certainty: `[N]` float, of the label: `margins`, or the fifth power of the score (`similarity_certainty`).
        quality: `[N]` float, of the outline: `predicted_iou * stability_score` of the proposer; taken as in [0, 1].
    """
    product = certainty.cpu().double() * quality.cpu().double().clamp(0, 1)
    return (product.clamp(0, 1) * _UNIT).round().long().numpy()


def similarity_certainty(scores: Tensor) -> Tensor:
    """`[N]` float64 in [0, 1] on the CPU: the fifth power of the score; a mask of two things is like neither."""
    certain = scores.cpu().double().clamp(0, 1)
    return certain * certain * certain * certain * certain


def select(cells: Cells, labels: np.ndarray, worths: np.ndarray) -> np.ndarray:
    """The heaviest set of foreground masks of which no two overlap by more than half of the smaller one.

    Exact where masks are nested and in all but the most knotted images: see `heaviest`.

    Args:
        cells: of the image's masks.
        labels: `[N]` integers, 0 background.
        worths: `[N]` int64, of a pixel of each mask.

    Returns:
        `[K]` int64, ascending indices; background masks are not among them.
    """
    if not len(labels):
        return np.zeros(0, dtype=np.int64)
    background = np.where(labels == 0, worths, 0)
    price = (cells.cover * background).max(1)
    weights = worths * cells.shared.diagonal() - cells.cover.T.astype(np.int64) @ (cells.sizes * price)
    weights = np.where(labels > 0, weights, 0)
    places = np.flatnonzero(weights > 0)
    shared = cells.shared[np.ix_(places, places)]
    areas = shared.diagonal()
    conflicts = 2 * shared > np.minimum(areas[:, None], areas)
    np.fill_diagonal(conflicts, False)
    return places[heaviest(weights[places], conflicts)]


def assemble_selected(masks: Tensor, labels: Tensor, scores: Tensor, worths: np.ndarray) -> tuple[Tensor, Tensor]:
    """`moduseg.retrieval.assemble.assemble` with `select` in place of suppression; arguments as there and `select`.

    Returns:
        `label_map [H, W]` uint8 and `kept [K]` int64, in descending score, background proposals not among them.

    Raises:
        ValueError: shapes that do not fit, or a label outside 0..254.
    """
    check_scored_masks(masks, labels, scores)
    kept = torch.from_numpy(select(Cells.of(masks), labels.cpu().numpy(), worths)).to(masks.device)
    kept = kept[descending(scores[kept])]
    return rasterize(masks[kept], labels[kept], scores[kept]), kept


def heaviest(weights: np.ndarray, conflicts: np.ndarray) -> np.ndarray:
    """The independent set of largest total weight.

    Masks that conflict with each other, directly or over others, form a knot; knots are solved one by one. In a knot
    the mask with most conflicts is tried out and in: out, the rest falls into smaller knots; in, its conflicts go. For
    nested masks this is the bottom-up rule "a parent iff it is heavier than the best of its children", in as many steps
    as there are masks. What is undecided after `_BRANCHINGS` steps is taken greedily, heaviest first.

    Args:
        weights: `[N]` int64, positive.
        conflicts: `[N, N]` bool, symmetric, false on the diagonal.

    Returns:
        `[K]` int64, ascending. Of equally heavy sets the one without the mask that was tried first.
    """
    masks = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in conflicts]
    chosen = _Search([int(w) for w in weights], masks).best((1 << len(masks)) - 1)[1]
    return np.array([i for i in range(len(masks)) if chosen >> i & 1], dtype=np.int64)


class _Search:
    """Branching with memory; sets of masks are the bits of a whole number."""

    def __init__(self, weights: list[int], conflicts: list[int]) -> None:
        self._weights, self._conflicts = weights, conflicts
        self._known: dict[int, tuple[int, int]] = {}
        self._steps = self._depth = 0

    def best(self, among: int) -> tuple[int, int]:
        """Weight and members of the heaviest set inside `among`."""
        total = members = 0
        while among:
            knot = self._knot(among)
            weight, chosen = self._solve(knot)
            total, members, among = total + weight, members | chosen, among & ~knot
        return total, members

    def _solve(self, knot: int) -> tuple[int, int]:
        if knot not in self._known:
            inside = _members(knot)
            if len(inside) == 1:
                self._known[knot] = self._weights[inside[0]], knot
            elif self._steps >= _BRANCHINGS or self._depth >= _DEPTH:
                self._known[knot] = self._greedy(inside)
            else:
                self._steps, self._depth = self._steps + 1, self._depth + 1
                pivot = max(inside, key=lambda i: ((self._conflicts[i] & knot).bit_count(), -i))
                rest = knot & ~(1 << pivot)
                out = self.best(rest)
                weight, chosen = self.best(rest & ~self._conflicts[pivot])
                taken = weight + self._weights[pivot], chosen | 1 << pivot
                self._known[knot] = taken if taken[0] > out[0] else out
                self._depth -= 1
        return self._known[knot]

    def _greedy(self, inside: list[int]) -> tuple[int, int]:
        total = members = 0
        for i in sorted(inside, key=lambda i: (-self._weights[i], i)):
            if not self._conflicts[i] & members:
                total, members = total + self._weights[i], members | 1 << i
        return total, members

    def _knot(self, among: int) -> int:
        """The masks that hang together with the first of `among`."""
        knot = fresh = among & -among
        while fresh:
            reached = 0
            for i in _members(fresh):
                reached |= self._conflicts[i]
            fresh = reached & among & ~knot
            knot |= fresh
        return knot


def _members(bits: int) -> list[int]:
    """The positions of the ones, ascending."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
