"""Each pixel takes the label with most of the divided votes of the proposals that hold it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.masks.cells import Cells
from moduseg.retrieval.shares import (
    assemble_shares,
    divide_votes,
    label_cells_by_shares,
    measure_share_confidence,
)
from moduseg.structures import Proposals
from tests.support.retrieval import make_retriever
from tests.support.trees import random_tree

UNIT = 2**24


def by_loops(
    masks: np.ndarray, labels: np.ndarray, similarities: np.ndarray, temperature: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the label map and the confidence, pixel by pixel."""
    out, sure = np.zeros(masks.shape[1:], dtype=np.uint8), np.zeros(masks.shape[1:], dtype=np.uint8)
    for y, x in np.ndindex(*out.shape):
        votes: dict[int, int] = {}
        for mask, row, near in zip(masks, labels, similarities, strict=True):
            voters = [(int(a), float(s)) for a, s in zip(row, near, strict=True) if a >= 0]
            if not mask[y, x] or not voters:
                continue
            top = max(s for _, s in voters)
            weights = [1.0 if temperature is None else math.exp((s - top) / temperature) for _, s in voters]
            parts: dict[int, float] = {}
            for (label, _), weight in zip(voters, weights, strict=True):
                parts[label] = parts.get(label, 0.0) + weight / sum(weights)
            for label, part in parts.items():
                votes[label] = votes.get(label, 0) + round(part * UNIT / math.sqrt(mask.sum()))
        if votes:
            out[y, x] = max(votes, key=lambda label: (votes[label], -label))
            sure[y, x] = round(255 * votes[int(out[y, x])] / sum(votes.values()))
    return out, sure


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("count", [0, 1, 9, 120])
def test_as_pixel_by_pixel(
    count: int, temperature: float | None, device: torch.device, rng: np.random.Generator
) -> None:
    masks = rng.random((count, 7, 11)) < 0.4
    labels = rng.integers(-1, 5, (count, 3)) * 8
    labels[labels < 0] = -1
    similarities = rng.random((count, 3)).astype(np.float32)
    on_device = torch.from_numpy(masks).to(device)
    votes = divide_votes(
        on_device.flatten(1).sum(1),
        torch.from_numpy(labels).to(device),
        torch.from_numpy(similarities).to(device),
        temperature,
    )
    label_map = assemble_shares(on_device, votes)
    expected, sure = by_loops(masks, labels, similarities, temperature)
    assert label_map.device.type == device.type
    assert np.array_equal(label_map.cpu().numpy(), expected)
    confidence = measure_share_confidence(on_device, votes, label_map).astype(int)
    assert np.abs(confidence - sure).max(initial=0) <= 1


def test_a_small_mask_outvotes_the_large_ones_around_it() -> None:
    """Two masks of 100 pixels have a fifth of a vote together, one of 9 pixels has a third."""
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[:2], masks[2, :3, :3] = True, True
    labels = torch.tensor([[1], [1], [2]])
    votes = divide_votes(masks.flatten(1).sum(1), labels, torch.ones(3, 1))
    assert (assemble_shares(masks, votes) == 2).sum() == 9


def test_a_mask_that_is_not_sure_leaves_the_choice_to_another() -> None:
    masks = torch.ones(2, 1, 1, dtype=torch.bool)
    labels = torch.tensor([[1, 2], [2, 2]])
    votes = divide_votes(torch.ones(2), labels, torch.tensor([[0.9, 0.89], [0.5, 0.5]]), 0.1)
    assert assemble_shares(masks, votes).tolist() == [[2]]


def test_equal_votes_go_to_the_smaller_label() -> None:
    masks = torch.ones(2, 1, 1, dtype=torch.bool)
    votes = divide_votes(torch.ones(2), torch.tensor([[3], [0]]), torch.ones(2, 1))
    assert assemble_shares(masks, votes).tolist() == [[0]]


def test_cells_give_the_same(rng: np.random.Generator) -> None:
    masks = torch.from_numpy(rng.random((12, 9, 9)) < 0.5)
    labels = torch.from_numpy(rng.integers(0, 4, (12, 2)))
    votes = divide_votes(masks.flatten(1).sum(1), labels, torch.from_numpy(rng.random((12, 2)).astype(np.float32)))
    places = np.array([7, 1, 4, 11, 2])
    cells = Cells.of(masks, torch.arange(81).view(9, 9))  # one cell a pixel
    rows = torch.from_numpy(places)
    whole = assemble_shares(masks[rows], votes.select(rows))
    assert np.array_equal(label_cells_by_shares(cells, places, votes), whole.flatten().numpy())
    assert not label_cells_by_shares(cells, places[:0], votes).any()


def test_a_tree_changes_nothing(rng: np.random.Generator) -> None:
    masks, parents = random_tree(rng, 15, (20, 24))
    labels = torch.from_numpy(rng.integers(0, 3, (len(masks), 2)))
    votes = divide_votes(masks.flatten(1).sum(1), labels, torch.rand(len(masks), 2))
    assert torch.equal(assemble_shares(masks, votes, parents), assemble_shares(masks, votes))


def test_disjoint_proposals_are_painted_as_ever(device: torch.device, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(rng.integers(0, 12, (6, 8))).to(device)
    masks = torch.arange(12, device=device)[:, None, None] == ids
    bank = F.normalize(torch.from_numpy(rng.normal(size=(20, 5)).astype(np.float32)).to(device), dim=1)
    settings = {"top_k": 3, "vote_temperature": 0.1}
    expected, *others = (
        make_retriever(bank, torch.arange(20, device=device) % 4, selection=rule, **settings)
        .predict(proposals, bank[:12] + 0.01)
        .label_map
        for rule in ("nms", "shares")
        for proposals in (Proposals(masks), Proposals.of_id_map(ids, 12))
    )
    assert all(np.array_equal(label_map, expected) for label_map in others)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        divide_votes(torch.ones(2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
