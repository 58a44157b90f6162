"""Trees of regions: merges by hand, and sums over nodes beside loops over their leaves."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import label

from moduseg.masks.region_tree import MergeRule, RegionGraph, RegionTree, build_graph, merge_regions


def draw_graph(seed: int, size: tuple[int, int] = (24, 30), num_regions: int = 40) -> RegionGraph:
    """Cells around random points, with random colours and contours in two maps."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform([0, 0], size, (num_regions, 2))
    y, x = np.mgrid[: size[0], : size[1]]
    nearest = ((y - centres[:, 0, None, None]) ** 2 + (x - centres[:, 1, None, None]) ** 2).argmin(0)
    labels = label(nearest, connectivity=1, background=-1) - 1
    return build_graph(labels, rng.random((*size, 3)), rng.random((*size, 2)))


def list_leaves_plainly(tree: RegionTree) -> list[set[int]]:
    """Return the leaves of each node, by climbing from every leaf to its root."""
    leaves: list[set[int]] = [set() for _ in range(len(tree))]
    for leaf in range(tree.num_leaves):
        node = leaf
        while node >= 0:
            leaves[node].add(leaf)
            node = int(tree.parent[node])
    return leaves


RULE = MergeRule(strength=(1.0, 0.5), colour=1.0, balance=0.25)


def test_graph_of_a_small_map() -> None:
    labels = np.array([[0, 0, 1], [0, 2, 2]])
    maps = np.array([[1, 2, 3], [4, 5, 6]], float)[..., None]
    colours = np.arange(6, dtype=float).reshape(2, 3, 1)
    graph = build_graph(labels, colours, maps)
    assert graph.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert graph.lengths.tolist() == [1, 2, 1]
    # Of two pixels, the larger value: 3; 5 down and 5 across; 6.
    assert graph.strengths.tolist() == [[3], [10], [6]]
    assert graph.sizes.tolist() == [3, 1, 2]
    assert graph.colours[:, 0].tolist() == [4 / 3, 2, 4.5]


@pytest.mark.parametrize(
    ("rule", "parents", "levels"),
    [
        pytest.param(MergeRule((1.0,), 0.0, 0.0), [4, 4, 5, 6, 5, 6, -1], [0, 0, 0, 0, 2, 3, 4], id="by strength"),
        # Strengths 2, 3, 4 and differences of colour 5, 1, 9; the joint colour of 1 and 2 is 5.5.
        pytest.param(MergeRule((0.0,), 1.0, 0.0), [5, 4, 4, 6, 5, 6, -1], [0, 0, 0, 0, 1, 5.5, 9], id="by colour"),
    ],
)
def test_weakest_border_goes_first(rule: MergeRule, parents: list[int], levels: list[float]) -> None:
    """A row of four regions of one pixel each."""
    graph = RegionGraph(
        labels=np.arange(4, dtype=np.int32)[None],
        sizes=np.ones(4, np.int64),
        colours=np.array([[0.0], [5.0], [6.0], [15.0]]),
        pairs=np.array([[0, 1], [1, 2], [2, 3]]),
        lengths=np.ones(3, np.int64),
        strengths=np.array([[2.0], [3.0], [4.0]]),
    )
    tree = merge_regions(graph, rule)
    assert tree.parent.tolist() == parents
    assert tree.level[:6].tolist() == levels[:6]
    # A merge costs at least what those below it did.
    assert tree.level[6] >= levels[5]


def test_balance_merges_small_regions_first() -> None:
    graph = RegionGraph(
        labels=np.repeat(np.arange(4, dtype=np.int32), [50, 50, 1, 50])[None],
        sizes=np.array([50, 50, 1, 50]),
        colours=np.zeros((4, 1)),
        pairs=np.array([[0, 1], [1, 2], [2, 3]]),
        lengths=np.ones(3, np.int64),
        strengths=np.array([[2.0], [3.0], [4.0]]),
    )
    assert merge_regions(graph, MergeRule((1.0,), 0.0, 0.0)).parent[:2].tolist() == [4, 4]
    assert merge_regions(graph, MergeRule((1.0,), 0.0, 0.5)).parent[1:3].tolist() == [4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_nodes_are_nested_runs_of_leaves(seed: int) -> None:
    graph = draw_graph(seed)
    tree = merge_regions(graph, RULE)
    expected = list_leaves_plainly(tree)
    assert len(tree) == 2 * tree.num_leaves - 1
    members = tree.list_leaves(np.arange(len(tree)))
    assert [set(np.flatnonzero(row)) for row in members] == expected
    for node, parent in enumerate(tree.parent):
        assert parent == -1 or expected[node] < expected[parent]
        assert parent == -1 or tree.level[node] <= tree.level[parent]
        assert label(np.isin(graph.labels, list(expected[node])), connectivity=1).max() == 1, "a region in two parts"


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_loops(seed: int) -> None:
    graph = draw_graph(seed)
    tree = merge_regions(graph, RULE)
    values = np.random.default_rng(seed).random((tree.num_leaves, 2))
    sums, inside = tree.sum_leaves(values), tree.sum_inside(graph.pairs, graph.strengths)
    low, high = tree.extremes(values[:, 0])
    for node, leaves in enumerate(list_leaves_plainly(tree)):
        rows = sorted(leaves)
        np.testing.assert_allclose(sums[node], values[rows].sum(0))
        is_inside = np.isin(graph.pairs, rows).all(1)
        np.testing.assert_allclose(inside[node], graph.strengths[is_inside].sum(0), atol=1e-9)
        assert (low[node], high[node]) == (values[rows, 0].min(), values[rows, 0].max())


def test_the_same_graph_gives_the_same_tree() -> None:
    first, second = (merge_regions(draw_graph(5), RULE) for _ in range(2))
    for name in ("order", "start", "stop", "parent", "level", "gap_node"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 3)])
def test_one_region_is_a_tree(size: tuple[int, int]) -> None:
    graph = build_graph(np.zeros(size, int), np.ones((*size, 3)), np.ones((*size, 2)))
    tree = merge_regions(graph, RULE)
    assert (len(tree), tree.parent.tolist(), tree.num_leaves) == (1, [-1], 1)
    assert tree.sum_leaves(graph.sizes).tolist() == [size[0] * size[1]]
    assert tree.sum_inside(graph.pairs, graph.strengths).tolist() == [[0, 0]]


def test_regions_that_do_not_touch_are_two_trees() -> None:
    graph = RegionGraph(
        labels=np.array([[0, 1, 2, 3]], np.int32),
        sizes=np.ones(4, np.int64),
        colours=np.zeros((4, 1)),
        pairs=np.array([[0, 1], [2, 3]]),
        lengths=np.ones(2, np.int64),
        strengths=np.ones((2, 1)),
    )
    tree = merge_regions(graph, MergeRule((1.0,), 0.0, 0.0))
    assert tree.parent.tolist() == [4, 4, 5, 5, -1, -1]
    assert tree.sum_inside(graph.pairs, np.array([3.0, 4.0])).tolist() == [0, 0, 0, 0, 3, 4]
