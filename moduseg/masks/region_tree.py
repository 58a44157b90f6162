"""Trees of regions: neighbours are merged pair by pair, from the weakest border to the strongest.

The leaves of a tree are put in an order in which every node is a run of leaves. So a node is two numbers, what it holds
is a difference of running sums, and two nodes of a tree are nested or disjoint.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RegionGraph:
    """The regions that an image is divided into, and the borders between neighbours.

    Attributes:
        labels: `[h, w]` int32, the region of each pixel, `0..n-1`, each of them connected.
        sizes: `[n]` int64, pixels.
        colours: `[n, D]` float64, mean colour.
        pairs: `[P, 2]` int64, neighbours across a side of a pixel, the smaller number first, ascending.
        lengths: `[P]` int64, sides of pixels along which they touch.
        strengths: `[P, C]` float64, sums along these sides of the larger value of the two pixels in each of `C` maps.
    """

    labels: np.ndarray
    sizes: np.ndarray
    colours: np.ndarray
    pairs: np.ndarray
    lengths: np.ndarray
    strengths: np.ndarray


def build_graph(labels: np.ndarray, colours: np.ndarray, maps: np.ndarray) -> RegionGraph:
    """Return the graph of the regions of a label map.

    Args:
        labels: `[h, w]` int, `0..n-1`, each present.
        colours: `[h, w, D]` float.
        maps: `[h, w, C]` float, how strong a contour each pixel is.
    """
    count = int(labels.max()) + 1
    flat = labels.ravel()
    sizes = np.bincount(flat, minlength=count)
    sums = [np.bincount(flat, weights=channel.ravel(), minlength=count) for channel in np.moveaxis(colours, -1, 0)]
    keys, values = [], []
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        is_border = labels[before] != labels[after]
        a, b = (labels[side][is_border].astype(np.int64) for side in (before, after))
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        values.append(np.maximum(maps[before][is_border], maps[after][is_border]))
    pairs, index = np.unique(np.concatenate(keys), return_inverse=True)
    strengths = [np.bincount(index, weights=column, minlength=len(pairs)) for column in np.concatenate(values).T]
    return RegionGraph(
        labels=labels.astype(np.int32),
        sizes=sizes,
        colours=np.stack(sums, axis=1) / sizes[:, None],
        pairs=np.stack(np.divmod(pairs, count), axis=1),
        lengths=np.bincount(index, minlength=len(pairs)),
        strengths=np.stack(strengths, axis=1),
    )


@dataclass(frozen=True)
class MergeRule:
    """What keeps neighbours apart: `(strength + colour * difference) * pixels of the smaller one ** balance`.

    Attributes:
        strength: weight of the mean strength along the border in each of the graph's maps.
        colour: weight of the distance between mean colours.
        balance: above 0, small regions are merged sooner.
    """

    strength: tuple[float, ...]
    colour: float
    balance: float


@dataclass(frozen=True)
class RegionTree:
    """A tree of regions: `n` leaves, then the `M` nodes made by merging, each after its children.

    Attributes:
        order: `[n]` int64, the leaves so that each node is a run of them.
        start, stop: `[n + M]` int64, the run of each node: `order[start:stop]`.
        parent: `[n + M]` int64, -1 for a root.
        level: `[n + M]` float64, what kept the two children apart (at least that of the nodes below); 0 for a leaf.
        gap_node: `[n]` int64, the node that joined the leaves at `i` and `i + 1` of the order; -1 if none did.
    """

    order: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    parent: np.ndarray
    level: np.ndarray
    gap_node: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_leaves(self) -> int:
        """Number of leaves, `n`."""
        return len(self.order)

    def sum_leaves(self, values: np.ndarray) -> np.ndarray:
        """Return for each node the sum over its leaves of `values` `[n, ...]`, `[n + M, ...]`."""
        total = np.zeros((self.num_leaves + 1, *values.shape[1:]), values.dtype)
        np.cumsum(values[self.order], axis=0, out=total[1:])
        return total[self.stop] - total[self.start]

    def sum_inside(self, pairs: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return for each node the sum over the borders that run inside it.

        Args:
            pairs: `[P, 2]` int64 leaves.
            values: `[P, ...]`, of each border.

        Returns:
            `[n + M, ...]`.
        """
        place = np.empty(self.num_leaves, np.int64)
        place[self.order] = np.arange(self.num_leaves)
        low, high = np.sort(place[pairs], axis=1).T
        # A border ends with the node that holds both sides, the last one made of all that join leaves between them.
        node = np.maximum.reduceat(self.gap_node, np.stack([low, high], axis=1).ravel())[::2] if len(pairs) else low
        at_gap = np.zeros((self.num_leaves + 1, *values.shape[1:]), values.dtype)
        gap_of_node = np.full(len(self), -1, np.int64)
        gap_of_node[self.gap_node[self.gap_node >= 0]] = np.flatnonzero(self.gap_node >= 0)
        np.add.at(at_gap, gap_of_node[node] + 1, values)
        total = np.cumsum(at_gap, axis=0)
        return total[self.stop - 1] - total[self.start]

    def extremes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each node the smallest and the largest value of its leaves, `values` being `[n, ...]`."""
        runs = np.stack([self.start, self.stop], axis=1).ravel()
        ordered = values[self.order]
        ordered = np.concatenate([ordered, ordered[-1:]])
        return np.minimum.reduceat(ordered, runs)[::2], np.maximum.reduceat(ordered, runs)[::2]

    def list_leaves(self, nodes: np.ndarray) -> np.ndarray:
        """Return the leaves of nodes, `[K, n]` bool, by the leaves' numbers."""
        members = np.zeros((len(nodes), self.num_leaves), dtype=bool)
        place = np.arange(self.num_leaves)
        members[:, self.order] = (place >= self.start[nodes, None]) & (place < self.stop[nodes, None])
        return members


def merge_regions(graph: RegionGraph, rule: MergeRule) -> RegionTree:
    """Merge neighbours until none are left; of equals, the pair of the smallest numbers first."""
    merger = _Merger(graph, rule)
    sums = (graph.strengths @ np.asarray(rule.strength)).tolist()
    for (a, b), length, total in zip(graph.pairs.tolist(), graph.lengths.tolist(), sums, strict=True):
        merger.connect(a, b, (length, total))
    return _order_leaves(len(graph.sizes), *merger.merge_all())


_Border = tuple[float, float]
"""Length of a border in sides of pixels, and the sum of the strengths along it."""


class _Merger:
    """Regions and their neighbours as plain numbers: a merge touches a handful, far too few for arrays to pay."""

    def __init__(self, graph: RegionGraph, rule: MergeRule) -> None:
        self.count = len(graph.sizes)
        self.sizes: list[float] = graph.sizes.tolist()
        self.colours: list[tuple[float, ...]] = [tuple(colour) for colour in graph.colours.tolist()]
        self.colour_weight, self.balance = rule.colour, rule.balance
        self.borders: list[dict[int, _Border]] = [{} for _ in range(self.count)]
        self.heap: list[tuple[float, int, int]] = []

    def connect(self, a: int, b: int, border: _Border) -> None:
        """Add a border between two regions."""
        self.borders[a][b] = self.borders[b][a] = border
        self._push(a, b, border)

    def _push(self, a: int, b: int, border: _Border) -> None:
        """Put a pair of neighbours into the heap."""
        difference = math.dist(self.colours[a], self.colours[b])
        balance = min(self.sizes[a], self.sizes[b]) ** self.balance
        heapq.heappush(self.heap, ((border[1] / border[0] + self.colour_weight * difference) * balance, a, b))

    def merge_all(self) -> tuple[list[tuple[int, int]], list[float]]:
        """Merge until no region has a neighbour; return the children and the level of each merge."""
        children: list[tuple[int, int]] = []
        levels: list[float] = []
        is_merged = [False] * (2 * self.count)
        while self.heap:
            level, a, b = heapq.heappop(self.heap)
            if is_merged[a] or is_merged[b]:
                continue
            is_merged[a] = is_merged[b] = True
            children.append((a, b))
            levels.append(level)
            self._merge(a, b)
        return children, levels

    def _merge(self, a: int, b: int) -> None:
        """Append the union of two regions."""
        node = len(self.sizes)
        size = self.sizes[a] + self.sizes[b]
        share = self.sizes[a] / size
        mixed = (x * share + y * (1 - share) for x, y in zip(self.colours[a], self.colours[b], strict=True))
        self.colours.append(tuple(mixed))
        self.sizes.append(size)
        self.borders.append(_join_borders(self.borders, a, b))
        for other, border in self.borders[node].items():
            neighbours = self.borders[other]
            neighbours.pop(a, None)
            neighbours.pop(b, None)
            neighbours[node] = border
            self._push(other, node, border)


def _join_borders(borders: list[dict[int, _Border]], a: int, b: int) -> dict[int, _Border]:
    """Return the borders of the union of `a` and `b`; the longer list of the two becomes it."""
    around, fewer = (borders[a], borders[b]) if len(borders[a]) >= len(borders[b]) else (borders[b], borders[a])
    for other, (length, total) in fewer.items():
        before = around.get(other, (0.0, 0.0))
        around[other] = (before[0] + length, before[1] + total)
    around.pop(a, None)
    around.pop(b, None)
    return around


def _order_leaves(count: int, children: Sequence[tuple[int, int]], levels: Sequence[float]) -> RegionTree:
    """Return the tree of `count` leaves and the merges in their order."""
    total = count + len(children)
    num_leaves = [1] * count + [0] * len(children)
    parent = np.full(total, -1, np.int64)
    level = np.zeros(total)
    for i, (a, b) in enumerate(children):
        num_leaves[count + i] = num_leaves[a] + num_leaves[b]
        parent[[a, b]] = count + i
        # Unlike a mean, a merge may come cheaper than one before it: levels never fall towards the root.
        level[count + i] = max(levels[i], level[a], level[b])
    # From the roots down, a node's run is shared by its children.
    start = [0] * total
    gap_node = np.full(count, -1, np.int64)
    place = 0
    for root in np.flatnonzero(parent < 0).tolist():
        start[root] = place
        place += num_leaves[root]
    for i in range(len(children) - 1, -1, -1):
        a, b = children[i]
        start[a] = start[count + i]
        start[b] = start[a] + num_leaves[a]
        gap_node[start[b] - 1] = count + i
    starts = np.array(start, np.int64)
    order = np.empty(count, np.int64)
    order[starts[:count]] = np.arange(count)
    return RegionTree(order, starts, starts + np.array(num_leaves, np.int64), parent, level, gap_node)
