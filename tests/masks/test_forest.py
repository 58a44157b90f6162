"""Trees of nested masks: order, depth, whether masks are nested, and the deepest mask of each pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.masks.cells import Cells, split_into_cells
from moduseg.masks.forest import are_nested, measure_depths, order_parents_first, paint_deepest
from tests.support.trees import random_tree

CHAIN = [1, 2, 3, -1]
FOREST = [-1, 0, 0, 1, 3, -1, 5]


@pytest.mark.parametrize(
    ("parents", "order", "depths"),
    [
        pytest.param([], [], [], id="no masks"),
        pytest.param([-1, -1], [0, 1], [0, 0], id="roots"),
        pytest.param(CHAIN, [3, 2, 1, 0], [3, 2, 1, 0], id="leaves first"),
        pytest.param(FOREST, [0, 5, 1, 2, 6, 3, 4], [0, 1, 1, 2, 3, 0, 1], id="two trees"),
    ],
)
def test_order_and_depth(parents: list[int], order: list[int], depths: list[int]) -> None:
    assert order_parents_first(np.array(parents, dtype=np.int64)).tolist() == order
    assert measure_depths(np.array(parents, dtype=np.int64)).tolist() == depths


def strip(*spans: tuple[int, int]) -> torch.Tensor:
    """Masks of one row of ten pixels, `[N, 1, 10]`."""
    pixels = torch.arange(10)
    return torch.stack([((pixels >= start) & (pixels < end))[None] for start, end in spans])


@pytest.mark.parametrize(
    ("spans", "parents", "deepest"),
    [
        pytest.param([(0, 8), (0, 4), (4, 8)], [-1, 0, 0], [1] * 4 + [2] * 4 + [-1] * 2, id="two children"),
        pytest.param([(1, 3), (0, 8), (1, 5)], [2, -1, 1], [1, 0, 0, 2, 2, 1, 1, 1, -1, -1], id="leaves first"),
        pytest.param([(0, 3), (5, 9)], [-1, -1], [0] * 3 + [-1] * 2 + [1] * 4 + [-1], id="trees beside each other"),
        pytest.param([(0, 4), (0, 4)], [-1, 0], [1] * 4 + [-1] * 6, id="a child as large as its parent"),
        pytest.param([(0, 4), (2, 2)], [-1, 0], [0] * 4 + [-1] * 6, id="an empty child"),
        pytest.param([(0, 4), (2, 6)], [-1, 0], None, id="a child that leaves its parent"),
        pytest.param([(0, 8), (0, 5), (4, 8)], [-1, 0, 0], None, id="children that overlap"),
        pytest.param([(0, 8), (2, 6)], [-1, -1], None, id="trees over each other"),
        pytest.param([(0, 8), (0, 4), (2, 4)], [-1, 0, 0], None, id="a grandchild called a child"),
    ],
)
def test_deepest_mask_of_each_pixel(
    spans: list[tuple[int, int]], parents: list[int], deepest: list[int] | None
) -> None:
    masks, tree = strip(*spans), np.array(parents)
    painted = paint_deepest(masks, tree)
    assert are_nested(masks.flatten(1).T.numpy(), tree) == (deepest is not None)
    assert (None if painted is None else painted[0].tolist()) == deepest


def test_no_masks_are_nested() -> None:
    assert are_nested(np.zeros((5, 0), bool), np.zeros(0, np.int64))
    painted = paint_deepest(torch.zeros((0, 2, 3), dtype=torch.bool), np.zeros(0, np.int64))
    assert painted is not None
    assert (painted == -1).all()


@pytest.mark.parametrize("has_values", [False, True])
def test_a_tree_has_the_cells_of_its_masks(has_values: bool, device: torch.device, rng: np.random.Generator) -> None:
    for num_leaves in (1, 5, 40):
        masks, parents = random_tree(rng, num_leaves, (30, 40))
        values = torch.from_numpy(rng.integers(0, 3, (30, 40))) if has_values else None
        masks, tree = masks.to(device), parents.to(device)
        expected, found = split_into_cells(masks, values)[0], split_into_cells(masks, values, tree)[0]
        pairs = torch.stack((expected, found)).unique(dim=1)
        assert len(pairs[0]) == len(pairs[0].unique()) == len(pairs[1].unique()), "each cell is one of the others"
        cells = Cells.of(masks, values, tree)
        assert np.array_equal(cells.areas, masks.flatten(1).sum(1).cpu().numpy())
        assert np.array_equal(cells.shared, Cells.of(masks, values).shared)


def test_masks_that_are_no_tree_keep_their_cells(rng: np.random.Generator) -> None:
    masks = torch.from_numpy(rng.random((6, 9, 8)) < 0.5)
    parents = torch.tensor([-1, 0, 0, 1, -1, 4])
    assert torch.equal(split_into_cells(masks, None, parents)[0], split_into_cells(masks)[0])
