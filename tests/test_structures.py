"""Proposals: areas, and disjoint ones as a map of ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.bank.aggregation import coverage, proposal_coverage
from moduseg.retrieval.assemble import assemble, assemble_proposals
from moduseg.structures import Proposals, TokenMap
from tests import reference


def of_ids(rng: np.random.Generator, device: torch.device, count: int = 7) -> Proposals:
    """Blocks of `count` proposals, of which the last is empty, on 35 x 52 pixels."""
    ids = np.kron(rng.integers(-1, count - 1, (7, 13)), np.ones((5, 4), int))
    return Proposals.of_id_map(torch.from_numpy(ids).to(device), count, torch.rand(count).to(device))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (3, 7, 9), (3, 20, 17), (2, 300, 310)])
def test_areas(shape: tuple[int, int, int], device: torch.device, rng: np.random.Generator) -> None:
    masks = rng.random(shape) < 0.7
    masks[:1] = True
    found = Proposals(torch.from_numpy(masks).to(device)).areas
    assert found.dtype == torch.int64
    assert found.tolist() == masks.sum((1, 2)).tolist()
    turned = Proposals(torch.from_numpy(masks).to(device).transpose(1, 2)).areas
    assert turned.tolist() == found.tolist()


def test_map_and_masks_are_the_same(device: torch.device, rng: np.random.Generator) -> None:
    found = of_ids(rng, device)
    assert found.id_map is not None
    for index, mask in enumerate(found.masks):
        assert torch.equal(mask, found.id_map == index)
    assert found.areas.tolist() == found.masks.flatten(1).sum(1).tolist()
    assert found.areas.dtype == torch.int64
    assert torch.equal(found.stability_score, torch.ones(7, device=device))
    assert found.to(torch.device("cpu")).id_map is not None


@pytest.mark.parametrize(
    "keep", [[True, False, True, True, False, True, True], [5, 0, 3], [], [6], [False] * 7, [1, 2, 1]]
)
def test_selected(keep: list[int], device: torch.device, rng: np.random.Generator) -> None:
    found = of_ids(rng, device)
    chosen = found.select(torch.tensor(keep, dtype=None if keep else torch.int64, device=device))
    if keep == [1, 2, 1]:
        assert chosen.id_map is None
        return
    assert chosen.id_map is not None
    assert torch.equal(chosen.masks, chosen.id_map == torch.arange(len(chosen), device=device)[:, None, None])
    assert int(chosen.id_map.min()) >= -1


def test_masks_that_are_made_late(device: torch.device, rng: np.random.Generator) -> None:
    """Of an id map, and of proposals that are selected without a copy; scores, areas and size need none of them."""
    found = of_ids(rng, device)
    overlapping = Proposals(torch.from_numpy(reference.random_masks(rng, 7, 35, 52)).to(device), found.predicted_iou)
    keep = torch.tensor([5, 0, 3], device=device)
    for proposals in (found, overlapping):
        late, expected = proposals.select(keep, copy=False), proposals.select(keep)
        assert len(late) == 3
        assert torch.equal(late.predicted_iou, expected.predicted_iou)
        assert "masks" not in vars(late)
        for copied in (late.to(device), late.select(torch.tensor([1], device=device)), late):
            assert torch.equal(copied.masks, expected.masks[[1]] if len(copied) == 1 else expected.masks)
        assert late.masks is late.masks
        assert torch.equal(late.areas, expected.masks.flatten(1).sum(1))
    with pytest.raises(AttributeError, match="no attribute 'mask'"):
        found.mask  # type: ignore[attr-defined]  # noqa: B018


def test_any_negative_id_is_no_proposal(device: torch.device) -> None:
    proposals = Proposals.of_id_map(torch.tensor([[0, -2], [-7, 1]], device=device), 2)
    assert proposals.areas.tolist() == [1, 1]
    assert proposals.select(torch.tensor([1], device=device)).id_map.tolist() == [[-1, -1], [-1, 0]]  # type: ignore[union-attr]


def test_all_of_them_are_not_copied(rng: np.random.Generator) -> None:
    found = of_ids(rng, torch.device("cpu"))
    assert found.select(torch.ones(7, dtype=torch.bool)) is found
    with pytest.raises(IndexError):
        found.select(torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("input_size", [(35, 52), (70, 104)])
def test_every_step_takes_the_map(input_size: tuple[int, int], device: torch.device, rng: np.random.Generator) -> None:
    """To the same bits as the masks, at native size and where the image was resized."""
    found = of_ids(rng, device)
    masks = Proposals(found.masks, found.predicted_iou)
    grid = [-(-side // 8) for side in input_size]
    tokens = TokenMap(torch.zeros((*grid, 3), device=device), 8, (35, 52), input_size)
    assert torch.equal(proposal_coverage(found, tokens), coverage(found.masks, tokens))
    assert torch.equal(proposal_coverage(masks, tokens), coverage(found.masks, tokens))
    labels = torch.from_numpy(rng.integers(0, 5, 7)).to(device)
    expected = assemble(found.masks, labels, found.predicted_iou, 0.4)
    for proposals in (found, masks):
        for ours, theirs in zip(assemble_proposals(proposals, labels, found.predicted_iou, 0.4), expected, strict=True):
            assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(
        expected[0].cpu().numpy(),
        reference.rasterize(found.masks.cpu().numpy(), labels.cpu().numpy(), found.predicted_iou.cpu().numpy()),
    )


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"id_map is \(3, 3\), expected the masks' \(2, 2\)"):
        Proposals(torch.ones((1, 2, 2), dtype=torch.bool), id_map=torch.zeros((3, 3), dtype=torch.int32))
    tokens = TokenMap(torch.zeros(2, 2, 1), 4, (8, 8), (8, 8))
    with pytest.raises(ValueError, match="expected the image's"):
        proposal_coverage(Proposals.of_id_map(torch.zeros(4, 4), 1), tokens)


def nested(parents: list[int], device: torch.device | None = None) -> Proposals:
    """Proposals with the given parents; which pixels they have does not matter here."""
    scores = torch.arange(len(parents), device=device) / 10
    masks = torch.ones((len(parents), 2, 3), dtype=torch.bool, device=device)
    return Proposals(masks, scores, parents=torch.tensor(parents, dtype=torch.int64, device=device))


# A root 0 with the children 1 and 2, below 1 the chain 3, 4, and a second tree of 5 and 6.
FOREST = [-1, 0, 0, 1, 3, -1, 5]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        pytest.param([0, 1, 2, 3, 4, 5, 6], FOREST, id="all"),
        pytest.param([True, False, True, False, True, True, True], [-1, 0, 0, -1, 3], id="a removed parent"),
        pytest.param([1, 2, 3, 4, 6], [-1, -1, 0, 2, -1], id="a removed root"),
        pytest.param([4, 6, 0, 5], [2, 3, -1, -1], id="another order"),
        pytest.param([4, 3, 1, 0], [1, 2, 3, -1], id="a chain turned round"),
        pytest.param([False] * 7, [], id="none"),
        pytest.param([], [], id="no index"),
    ],
)
def test_a_removed_parent_is_replaced_by_the_nearest_ancestor(
    keep: list[int], expected: list[int], device: torch.device
) -> None:
    index = torch.tensor(keep, dtype=None if keep else torch.int64, device=device)
    chosen = nested(FOREST, device).to(device).select(index)
    assert chosen.parents is not None
    assert chosen.parents.device.type == chosen.masks.device.type
    assert chosen.parents.tolist() == expected


def test_selected_parents_are_those_of_a_walk(rng: np.random.Generator) -> None:
    for _ in range(30):
        count = int(rng.integers(1, 40))
        order = rng.permutation(count)
        parents = np.full(count, -1)
        for place in range(1, count):
            parents[order[place]] = order[rng.integers(place)] if rng.random() < 0.8 else -1
        keep = rng.permutation(count)[: int(rng.integers(count + 1))]
        expected = []
        for row in keep:
            ancestor = parents[row]
            while ancestor >= 0 and ancestor not in keep:
                ancestor = parents[ancestor]
            expected.append(int(np.flatnonzero(keep == ancestor)[0]) if ancestor >= 0 else -1)
        chosen = nested(parents.tolist()).select(torch.from_numpy(keep))
        assert chosen.parents is not None
        assert chosen.parents.tolist() == expected


def test_a_proposal_named_twice_has_no_tree() -> None:
    assert nested(FOREST).select(torch.tensor([0, 1, 1])).parents is None


def test_concatenated_parents_are_shifted() -> None:
    flat = Proposals.of_id_map(torch.zeros(2, 3), 1)
    joined = Proposals.concatenate([nested([-1, 0]), flat, nested([1, -1])])
    assert joined.parents is not None
    assert joined.parents.tolist() == [-1, 0, -1, 4, -1]
    assert joined.predicted_iou.tolist() == pytest.approx([0, 0.1, 1, 0, 0.1])
    assert joined.id_map is None
    assert Proposals.concatenate([flat, flat]).parents is None
    assert Proposals.concatenate([flat]).id_map is not None


@pytest.mark.parametrize("parts", [[], [nested([-1]), Proposals(torch.ones((1, 2, 2), dtype=torch.bool))]])
def test_lists_of_several_images_are_not_joined(parts: list[Proposals]) -> None:
    with pytest.raises(ValueError, match="expected one or more lists of one size"):
        Proposals.concatenate(parts)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        pytest.param([-1], r"got parents \(1,\) torch.int64, expected \(2,\)", id="too few"),
        pytest.param([-1.0, 0.0], r"torch.float32, expected \(2,\) torch.int64", id="no integers"),
        pytest.param([-1, 2], "got parent 2 of mask 1, expected the index of one of the 2 masks", id="beyond the end"),
        pytest.param([-2, 0], "got parent -2 of mask 0", id="below -1"),
        pytest.param([-1, 1], "mask 1 has itself among its ancestors", id="its own parent"),
        pytest.param([1, 0], "mask 0 has itself among its ancestors", id="a circle"),
    ],
)
def test_parents_that_are_no_forest(parents: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Proposals(torch.ones((2, 2, 2), dtype=torch.bool), parents=torch.tensor(parents))


def test_long_circles_and_chains() -> None:
    """A circle far from the mask that leads to it is seen, and a long chain is none."""
    chain = torch.arange(-1, 299)
    assert len(nested(chain.tolist())) == 300
    chain[100] = 200
    with pytest.raises(ValueError, match="mask 100 has itself"):
        nested(chain.tolist())
