from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.retrieval.balance import (
    balance_neighbours,
    count_smallest_class,
    find_class_candidates,
    measure_class_spreads,
    rank_in_class,
)
from moduseg.retrieval.search import search
from tests.support.retrieval import make_retriever


def scene(rng: np.random.Generator, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, unit bank vectors with exact duplicates, and labels of very unequal frequency."""
    bank = rng.normal(size=(60, 6)).astype(np.float32)
    bank[10:14] = bank[0]
    labels = rng.choice(4, 60, p=[0.7, 0.2, 0.05, 0.05])
    queries = rng.normal(size=(15, 6)).astype(np.float32)
    return (
        torch.from_numpy(queries).to(device),
        F.normalize(torch.from_numpy(bank).to(device), dim=1),
        torch.from_numpy(labels).to(device),
    )


def loop(
    query: np.ndarray, bank: np.ndarray, labels: np.ndarray, top_k: int, limit: int, spread: np.ndarray
) -> list[int]:
    """Rows by distance in the spread of their class, walked through while no class is full."""
    near = bank.astype(np.float64) @ query / np.linalg.norm(query)
    taken: list[int] = []
    for row in sorted(range(len(bank)), key=lambda r: ((1 - near[r]) / spread[labels[r]], r)):
        if len(taken) < top_k and sum(labels[r] == labels[row] for r in taken) < limit:
            taken.append(row)
    return taken


@pytest.mark.parametrize("top_k", [1, 2, 5, 9, 100])
def test_without_a_rule_it_is_the_search(top_k: int, device: torch.device, rng: np.random.Generator) -> None:
    queries, bank, labels = scene(rng, device)
    near, rows = balance_neighbours(find_class_candidates(queries, bank, labels, top_k), top_k, "none")
    expected_near, expected_rows = search(queries, bank, top_k)
    assert torch.equal(near, expected_near)
    assert torch.equal(rows, expected_rows)


@pytest.mark.parametrize("top_k", [2, 5, 9])
@pytest.mark.parametrize("rule", ["cap", "distance"])
def test_equals_loop(rule: str, top_k: int, rng: np.random.Generator) -> None:
    queries, bank, labels = scene(rng, torch.device("cpu"))
    bank[10:14] = torch.from_numpy(rng.normal(size=(4, 6))).float()  # the loop rounds: no duplicates for it
    bank = F.normalize(bank, dim=1)
    spreads = measure_class_spreads(bank, labels)
    _, rows = balance_neighbours(find_class_candidates(queries, bank, labels, top_k), top_k, rule, spreads=spreads)  # type: ignore[arg-type]
    limit, spread = (top_k, spreads.numpy()) if rule == "distance" else (max(1, top_k // 2), np.ones(4))
    for query, found in zip(queries.numpy(), rows.tolist(), strict=True):
        assert found == loop(query, bank.numpy(), labels.numpy(), top_k, limit, spread)


def test_cap_by_hand(device: torch.device) -> None:
    """Four near vectors of class 0 leave two places to class 1, which is farther."""
    bank = F.normalize(torch.tensor([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [1, 2.0], [1, 3.0]], device=device), dim=1)
    labels, query = torch.tensor([0, 0, 0, 0, 1, 1], device=device), torch.tensor([[1.0, 0.0]], device=device)
    candidates = find_class_candidates(query, bank, labels, 4)
    assert balance_neighbours(candidates, 4, "none")[1].tolist() == [[0, 1, 2, 3]]
    assert balance_neighbours(candidates, 4, "cap")[1].tolist() == [[0, 1, 4, 5]]
    assert balance_neighbours(candidates, 1, "cap")[1].tolist() == [[0]]


def test_distance_by_hand(device: torch.device) -> None:
    """At equal similarity the wider class is the nearer one; the score stays the similarity."""
    tight = F.normalize(torch.tensor([[1, 1.0, 0], [1, 1.01, 0], [1, 0.99, 0]], device=device), dim=1)
    wide = F.normalize(torch.tensor([[1, 0, 1.0], [1, 0, 0.1], [1, 0, 9.0]], device=device), dim=1)
    bank, labels = torch.cat((tight, wide)), torch.tensor([1, 1, 1, 2, 2, 2], device=device)
    spreads = measure_class_spreads(bank, labels)
    assert float(spreads[2]) > float(spreads[1]) > 0
    query = torch.tensor([[0.0, 1.0, 0.9]], device=device)
    near, rows = balance_neighbours(find_class_candidates(query, bank, labels, 2), 2, "distance", spreads=spreads)
    assert labels[rows[0]].tolist() == [2, 2]
    assert labels[balance_neighbours(find_class_candidates(query, bank, labels, 2), 2, "none")[1][0, 1]] == 1
    votes = make_retriever(bank, labels, top_k=2, vote_balance="distance").vote(query)
    assert votes.labels.tolist() == [2]
    assert votes.neighbours.tolist() == rows.tolist()
    assert float(votes.scores) == pytest.approx(float(near.mean()))


def test_spreads_by_hand(device: torch.device) -> None:
    """Two vectors at right angles lie `1 - cos 45` from their mean; a class of one has what is usual."""
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 0]], device=device)
    within = 2 * (1 - 0.5**0.5)
    spreads = measure_class_spreads(vectors, torch.tensor([0, 0, 2], device=device))
    assert spreads.tolist() == pytest.approx([(within + within) / 2, within, within])
    assert measure_class_spreads(vectors[:1], torch.tensor([0], device=device)).tolist() == [1.0]  # nothing is known
    assert measure_class_spreads(vectors[:0], torch.zeros(0, dtype=torch.int64, device=device)).tolist() == []


def test_those_not_allowed_give_their_place_to_the_next(device: torch.device, rng: np.random.Generator) -> None:
    queries, bank, labels = scene(rng, device)
    candidates = find_class_candidates(queries, bank, labels, 60)
    image = torch.arange(60, device=device) % 7  # rows of one image are left out
    allowed = image[candidates.indices] != 3
    keep = (image != 3).nonzero()[:, 0]
    for rule in ("none", "cap"):
        near, rows = balance_neighbours(candidates, 5, rule, is_allowed=allowed)  # type: ignore[arg-type]
        alone = find_class_candidates(queries, bank[keep], labels[keep], 5)
        expected_near, expected = balance_neighbours(alone, 5, rule)  # type: ignore[arg-type]
        assert torch.equal(rows, keep[expected])
        assert torch.equal(near, expected_near)


def test_ranks_by_hand(device: torch.device) -> None:
    usable = torch.tensor([[True, False, True, True, True]], device=device)
    assert rank_in_class(usable, torch.tensor([0, 0, 0, 4, 4], device=device)).tolist() == [[0, 1, 1, 0, 1]]


@pytest.mark.parametrize(("labels", "expected"), [([0, 0, 2, 2, 2, 5, 5], 2), ([7], 1), ([], 1)])
def test_smallest_class_caps_k(labels: list[int], expected: int) -> None:
    bank = torch.ones(len(labels), 2)
    assert count_smallest_class(torch.tensor(labels, dtype=torch.int64)) == expected
    for cap, top_k in ((True, min(9, expected)), (False, 9)):
        retriever = make_retriever(bank, torch.tensor(labels, dtype=torch.int64), top_k=9, cap_top_k=cap)
        assert retriever.top_k == top_k


@pytest.mark.parametrize("rule", ["cap", "distance"])
def test_without_a_vector_or_a_bank(rule: str, device: torch.device) -> None:
    """As without the rule: label 0, score 0, no neighbour; the others are not touched."""
    bank, labels = torch.eye(2, device=device), torch.tensor([1, 2], device=device)
    centre, pooled = torch.tensor([0.5, 0.0], device=device), torch.tensor([[0.0, 0], [0.5, 1]], device=device)
    votes = make_retriever(bank, labels, centre, top_k=3, vote_balance=rule).vote(pooled)
    plain = make_retriever(bank, labels, centre, top_k=1).vote(pooled)
    assert votes.labels.tolist() == plain.labels.tolist() == [0, 2]
    assert votes.scores.tolist() == plain.scores.tolist() == [0, 1]
    assert votes.neighbours[0].unique().tolist() == [-1]
    assert not votes.similarities[0].any()
    empty = make_retriever(bank[:0], labels[:0], top_k=3, vote_balance=rule).vote(pooled)
    assert empty.labels.tolist() == empty.scores.tolist() == [0, 0]
    assert empty.neighbours.shape == (2, 0)


def test_bad_values() -> None:
    candidates = find_class_candidates(torch.ones(1, 2), torch.eye(2), torch.tensor([0, 1]), 1)
    with pytest.raises(ValueError, match="got 'fair', expected none, cap or distance"):
        balance_neighbours(candidates, 1, "fair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spreads: got none"):
        balance_neighbours(candidates, 1, "distance")
    with pytest.raises(ValueError, match="top_k: got 0"):
        balance_neighbours(candidates, 0, "none")
