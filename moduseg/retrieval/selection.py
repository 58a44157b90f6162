"""Choose among overlapping proposals the set that explains most of the image, instead of NMS by score.

SAM gives an object, its parts, and the object with its surroundings, and all of them are labelled. Suppression by score
decides between two masks of one label. Here the whole set is chosen at once, so that no two of its masks cover the same
region and the sum of their worths is largest. The worth of a mask is its area times the certainty of its label, less
the worth of its pixels as background: to paint nothing is to call them background, which is the better explanation
where a background proposal is certain of them. So a parent is kept iff it is worth more than the best choice of its
parts, and parts are kept where their parent is uncertain. An option, not in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.cells import Cells
from moduseg.masks.forest import are_nested, order_parents_first
from moduseg.retrieval.balance import Candidates, rank_in_class, widest_float
from moduseg.retrieval.rasterize import rasterize
from moduseg.retrieval.suppress import check_scored_masks, descending

NEAREST = 3
"""Neighbours that represent a class in a margin."""
_UNIT = 1 << 20
"""The worth of a pixel is rounded to this fraction and added as integers: the order of a sum changes no choice."""
_BRANCHINGS = 5000
"""Decisions after which the rest of an image is decided by the greedy rule."""
_DEPTH = 200
"""Nested decisions after which the greedy rule decides: far below Python's recursion limit."""


def compute_margins(candidates: Candidates, labels: Tensor, is_allowed: Tensor | None = None) -> Tensor:
    """Return how much closer each query is to its label than to any other: `1 - d / d'`.

    `d` is the mean distance (`1 - similarity`) of the query to the `NEAREST` nearest vectors of its label, `d'` the
    smallest such mean of another label. The margin is relative, so it needs no scale of the backbone's similarities.

    Args:
        candidates: of the queries, at least `NEAREST` of each class, and as many more as are not allowed.
        labels: `[N]` int64, the vote's.
        is_allowed: `[N, M]` bool, candidates that count; all if omitted.

    Returns:
        `[N]` float64 in [0, 1]: 0 if another label is closer or the bank has no vector of the label, 1 if it has no
        other label.
    """
    similarities, classes, device = candidates.similarities, candidates.labels, candidates.similarities.device
    # The nearest candidates of each class represent it.
    is_usable = torch.ones_like(similarities, dtype=torch.bool) if is_allowed is None else is_allowed
    is_usable = is_usable & (rank_in_class(is_usable, classes) < NEAREST)
    # Their mean distance to the query, by class.
    dtype = widest_float(device)
    num_labels = int(torch.cat((labels.flatten(), classes, classes.new_zeros(1))).max()) + 1
    shape, columns = (len(similarities), num_labels), classes.expand_as(similarities)
    distances = (1 - similarities.to(dtype)) * is_usable
    sums = torch.zeros(shape, dtype=dtype, device=device).scatter_add(1, columns, distances)
    counts = torch.zeros(shape, dtype=torch.int64, device=device).scatter_add(1, columns, is_usable.long())
    means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
    # The distance to the label against that to the closest other one.
    to_label = means.gather(1, labels[:, None])[:, 0]
    to_other = means.scatter(1, labels[:, None], torch.inf).amin(1)
    margin = torch.where(to_other > 0, 1 - to_label / to_other, torch.zeros_like(to_label))
    return torch.where(to_label.isinf(), torch.zeros_like(to_label), margin).clamp(0, 1)


def compute_worths(certainty: Tensor, quality: Tensor) -> np.ndarray:
    """Return `[N]` int64: the worth of a pixel of each mask, `certainty * quality`, as an integer.

    Args:
        certainty: `[N]` float, of the label: `compute_margins` or `compute_certainty`.
        quality: `[N]` float, of the outline: `Proposals.quality`, clamped to [0, 1].
    """
    product = certainty.cpu().double() * quality.cpu().double().clamp(0, 1)
    return (product.clamp(0, 1) * _UNIT).round().long().numpy()


def compute_certainty(scores: Tensor) -> Tensor:
    """Return `[N]` float64 in [0, 1] on the CPU: the fifth power of the score.

    A mask that covers two things resembles neither, and the power tells its score from that of a good mask.
    """
    base = scores.cpu().double().clamp(0, 1)
    return base * base * base * base * base


def select_masks(cells: Cells, labels: np.ndarray, worths: np.ndarray, parents: np.ndarray | None = None) -> np.ndarray:
    """Return the heaviest set of foreground masks of which no two overlap by more than half of the smaller one.

    Masks that are nested as `parents` says are decided from the leaves to the roots: exact, in one pass. Others are
    searched: exact in all but the most complex images, see `find_heaviest_set`.

    Args:
        cells: of the image's masks.
        labels: `[N]` integers, 0 background.
        worths: `[N]` int64, the worth of a pixel of each mask.
        parents: `[N]` int64, as `Proposals.parents`; `None` if the proposer knows of no tree.

    Returns:
        `[K]` int64, ascending indices; background masks are not among them.
    """
    if not len(labels):
        return np.zeros(0, dtype=np.int64)
    background = np.where(labels == 0, worths, 0)
    background_worth = (cells.cover * background).max(1)
    weights = worths * cells.areas - cells.cover.T.astype(np.int64) @ (cells.sizes * background_worth)
    weights = np.where(labels > 0, weights, 0)
    if parents is not None and are_nested(cells.cover, parents):
        return find_heaviest_in_forest(weights, parents)
    worthwhile = np.flatnonzero(weights > 0)
    shared = cells.shared[np.ix_(worthwhile, worthwhile)]
    areas = shared.diagonal()
    conflicts = 2 * shared > np.minimum(areas[:, None], areas)
    np.fill_diagonal(conflicts, False)
    return worthwhile[find_heaviest_set(weights[worthwhile], conflicts)]


def assemble_selected(
    masks: Tensor, labels: Tensor, scores: Tensor, worths: np.ndarray, parents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the masks that explain most of the image, and paint them.

    Args:
        masks: `[N, H, W]` bool.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float; decides which of the chosen masks has a pixel that several cover.
        worths: `[N]` int64, the worth of a pixel of each mask.
        parents: `[N]` int64, as `Proposals.parents`; `None` if the proposer knows of no tree.

    Returns:
        `label_map [H, W]` uint8 and `kept [K]` int64, in descending score, background proposals not among them.

    Raises:
        ValueError: shapes that do not fit, or a label outside 0..254.
    """
    check_scored_masks(masks, labels, scores)
    cells = Cells.of(masks, parents=parents)
    tree = None if parents is None else parents.cpu().numpy()
    kept = torch.from_numpy(select_masks(cells, labels.cpu().numpy(), worths, tree)).to(masks.device)
    kept = kept[descending(scores[kept])]
    return rasterize(masks[kept], labels[kept], scores[kept]), kept


def find_heaviest_in_forest(weights: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Return the set of largest total weight in which no mask is an ancestor of another, in one pass.

    From the leaves to the roots, a mask is taken if it is heavier than the best choice among its descendants.

    Args:
        weights: `[N]` int64; masks of a weight of 0 or less are not chosen.
        parents: `[N]` int64, -1 for a root, without circles.

    Returns:
        `[K]` int64, ascending. Of a mask and descendants of equal weight together, the descendants.
    """
    order = order_parents_first(parents).tolist()
    weight_of, parent_of = weights.tolist(), parents.tolist()
    # The last entry, at -1, stands above the roots.
    best_below = [0] * (len(order) + 1)
    is_taken = [False] * (len(order) + 1)
    for index in reversed(order):
        is_taken[index] = weight_of[index] > best_below[index]
        best_below[parent_of[index]] += max(weight_of[index], best_below[index])
    # From the roots down, what lies below a mask that is taken gives way to it.
    is_inside = [False] * (len(order) + 1)
    chosen = []
    for index in order:
        is_inside[index] = is_inside[parent_of[index]] or is_taken[parent_of[index]]
        if is_taken[index] and not is_inside[index]:
            chosen.append(index)
    return np.array(sorted(chosen), dtype=np.int64)


def find_heaviest_set(weights: np.ndarray, conflicts: np.ndarray) -> np.ndarray:
    """Return the independent set of largest total weight.

    Masks that conflict, directly or through others, form a connected component of the graph of conflicts; components
    are solved one by one. In a component, the mask with most conflicts is tried both ways: without it, the component
    falls into smaller ones; with it, its conflicts are removed. For nested masks this is the bottom-up rule "a parent
    iff it is heavier than the best of its children", in as many steps as there are masks. What is undecided after
    `_BRANCHINGS` steps is taken greedily, heaviest first.

    Args:
        weights: `[N]` int64, positive.
        conflicts: `[N, N]` bool, symmetric, false on the diagonal.

    Returns:
        `[K]` int64, ascending. Of equally heavy sets, the one without the mask that was tried first.
    """
    neighbours = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in conflicts]
    chosen = _Search([int(w) for w in weights], neighbours).best((1 << len(neighbours)) - 1)[1]
    return np.array(_members(chosen), dtype=np.int64)


class _Search:
    """Branching with memory; a set of masks is the bits of an integer."""

    def __init__(self, weights: list[int], conflicts: list[int]) -> None:
        self._weights, self._conflicts = weights, conflicts
        self._solved: dict[int, tuple[int, int]] = {}
        self._steps = self._depth = 0

    def best(self, among: int) -> tuple[int, int]:
        """Return weight and members of the heaviest set inside `among`."""
        total = members = 0
        while among:
            component = self._component(among)
            weight, chosen = self._solve(component)
            total, members, among = total + weight, members | chosen, among & ~component
        return total, members

    def _solve(self, component: int) -> tuple[int, int]:
        if component not in self._solved:
            inside = _members(component)
            if len(inside) == 1:
                self._solved[component] = self._weights[inside[0]], component
            elif self._steps >= _BRANCHINGS or self._depth >= _DEPTH:
                self._solved[component] = self._greedy(inside)
            else:
                self._steps, self._depth = self._steps + 1, self._depth + 1
                pivot = max(inside, key=lambda i: ((self._conflicts[i] & component).bit_count(), -i))
                rest = component & ~(1 << pivot)
                out = self.best(rest)
                weight, chosen = self.best(rest & ~self._conflicts[pivot])
                taken = weight + self._weights[pivot], chosen | 1 << pivot
                self._solved[component] = taken if taken[0] > out[0] else out
                self._depth -= 1
        return self._solved[component]

    def _greedy(self, inside: list[int]) -> tuple[int, int]:
        total = members = 0
        for i in sorted(inside, key=lambda i: (-self._weights[i], i)):
            if not self._conflicts[i] & members:
                total, members = total + self._weights[i], members | 1 << i
        return total, members

    def _component(self, among: int) -> int:
        """Return the masks of `among` that are connected with its first one."""
        component = added = among & -among
        while added:
            reached = 0
            for i in _members(added):
                reached |= self._conflicts[i]
            added = reached & among & ~component
            component |= added
        return component


def _members(bits: int) -> list[int]:
    """Return the positions of the ones, ascending."""
    positions = []
    while bits:
        lowest = bits & -bits
        positions.append(lowest.bit_length() - 1)
        bits ^= lowest
    return positions
