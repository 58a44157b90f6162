from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.retrieval.vote import vote
from tests import reference


@pytest.mark.parametrize(
    ("labels", "similarities", "label", "score"),
    [
        pytest.param([3, 5, 5], [0.75, 0.5, 0.25], 5, 0.375, id="most neighbours"),
        pytest.param([0, 0, 5], [0.5, 0.5, 1.0], 0, 0.5, id="background is a label like any other"),
        pytest.param([4, 2, 2, 4], [0.75, 0.5, 0.5, 0.5], 4, 0.625, id="tie to the larger sum"),
        pytest.param([4, 2, 2, 4], [0.75, 0.5, 0.5, 0.125], 2, 0.5, id="a larger sum beats a better first neighbour"),
        pytest.param([9, 1, 1, 9], [0.75, 0.5, 0.5, 0.25], 9, 0.5, id="full tie to the first neighbour"),
        pytest.param([7, 2], [0.5, 0.5], 7, 0.5, id="full tie of single neighbours"),
        pytest.param([1, 2], [-0.5, -0.25], 2, -0.25, id="negative similarities"),
        pytest.param([8, 6, 6, 8, 0], [-0.5, -0.5, -0.5, -0.5, 1.0], 8, -0.5, id="negative tie, labels without votes"),
        pytest.param([6], [0.25], 6, 0.25, id="one neighbour"),
    ],
)
def test_by_hand(labels: list[int], similarities: list[float], label: int, score: float, device: torch.device) -> None:
    found, scores = vote(torch.tensor([labels], device=device), torch.tensor([similarities], device=device))
    assert found.tolist() == [label]
    assert scores.tolist() == [score]
    assert reference.vote(labels, similarities) == (label, score)


def test_sums_are_taken_in_float64(device: torch.device) -> None:
    # In float32 both sums are 1; in float64 label 2's is larger by 2^-26.
    similarities = torch.tensor([[1.0, 1.0, 2**-26, 0.0]], device=device)
    labels, _ = vote(torch.tensor([[1, 2, 2, 1]], device=device), similarities)
    assert labels.tolist() == [2]


def test_scores_that_are_equal_in_float32_alone_differ(device: torch.device) -> None:
    similarities = torch.tensor([[1.0, 0.0], [1.0, 2**-26]], device=device)
    _, scores = vote(torch.ones(2, 2, dtype=torch.int64, device=device), similarities)
    assert scores.tolist() == [0.5, 0.5 + 2**-27]
    assert scores.float().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("k", [1, 2, 9, 25])
def test_equals_loop(k: int, device: torch.device, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, (200, k))
    similarities = -np.sort(-rng.integers(-4, 8, (200, k)) / 8, axis=1).astype(np.float32)  # many exact ties
    found, scores = vote(torch.from_numpy(labels).to(device), torch.from_numpy(similarities).to(device))
    expected = [reference.vote(a.tolist(), b.tolist()) for a, b in zip(labels, similarities, strict=True)]
    assert found.tolist() == [label for label, _ in expected]
    np.testing.assert_allclose(scores.cpu().numpy(), [score for _, score in expected], atol=1e-7)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_weighted_equals_loop(temperature: float, device: torch.device, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, (100, 9))
    similarities = -np.sort(-rng.uniform(0, 1, (100, 9)), axis=1).astype(np.float32)
    found, scores = vote(
        torch.from_numpy(labels).to(device), torch.from_numpy(similarities).to(device), temperature=temperature
    )
    for row, (own, near) in enumerate(zip(labels, similarities.astype(np.float64), strict=True)):
        ballots = [sum(np.exp(s / temperature) for s, c in zip(near, own, strict=True) if c == k) for k in range(4)]
        winner = int(np.argmax(ballots))
        assert int(found[row]) == winner
        assert float(scores[row]) == pytest.approx(near[own == winner].mean(), abs=1e-6)


def test_temperature_by_hand(device: torch.device) -> None:
    """One near neighbour beats two far ones when it is cold, and no longer when it is warm."""
    labels, near = torch.tensor([[3, 5, 5]], device=device), torch.tensor([[0.75, 0.5, 0.5]], device=device)
    assert [int(vote(labels, near, temperature=t)[0]) for t in (0.1, 1.0)] == [3, 5]
    assert int(vote(labels, near)[0]) == 5
    with pytest.raises(ValueError, match="got temperature 0"):
        vote(labels, near, temperature=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_count(shape: tuple[int, int], device: torch.device) -> None:
    labels, scores = vote(torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device))
    assert labels.tolist() == [0] * shape[0]
    assert scores.tolist() == [0.0] * shape[0]
    assert labels.dtype == torch.int64
    assert scores.dtype == (torch.float32 if device.type == "mps" else torch.float64)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, k\] twice"):
        vote(torch.zeros((2, 3), dtype=torch.int64), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got label -1"):
        vote(torch.tensor([[0, -1]]), torch.zeros(1, 2))
