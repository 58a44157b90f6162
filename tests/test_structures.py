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
