from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from moduseg.report import attribution, bank_map, packing
from moduseg.structures import Proposals
from tests.support.retrieval import make_retriever


def answer(
    rows: list[list[int]], labels: list[list[int]], near: list[list[float]], won: list[int]
) -> attribution.RetrievalResult:
    return attribution.RetrievalResult(
        np.array(won),
        np.ones(len(won), np.float32),
        np.arange(len(won)),
        np.array(rows),
        np.array(labels),
        np.array(near),
    )


def test_votes_list_the_winner_first_then_the_runner_up() -> None:
    said = answer([[0, 1, 2, 3], [-1] * 4], [[2, 1, 1, 0], [-1] * 4], [[0.9, 0.8, 0.7, 0.6], [0.0] * 4], [1, 0])
    first, none = attribution.tally_votes(said, None)
    assert first == [[1, 2, 0.5, 0.75], [2, 1, 0.25, 0.9], [0, 1, 0.25, 0.6]]
    assert none == []
    weighed = attribution.tally_votes(said, 0.01)[0]
    assert weighed[0][:2] == [1, 2]  # the winner of the vote, whatever the shares say
    assert weighed[1][2] > 0.99


@pytest.mark.parametrize("temperature", [None, 0.05])
def test_votes_agree_with_the_vote(temperature: float | None, rng: np.random.Generator) -> None:
    bank = torch.from_numpy(rng.normal(size=(60, 6))).float()
    bank_labels = torch.from_numpy(rng.integers(0, 5, 60))
    queries = torch.from_numpy(rng.normal(size=(30, 6))).float()
    retriever = make_retriever(bank, bank_labels, top_k=9, vote_temperature=temperature)
    prediction = retriever.predict(Proposals(torch.ones((30, 1, 1), dtype=torch.bool)), queries)
    tallies = attribution.tally_votes(attribution.RetrievalResult.of(prediction), temperature)
    for label, score, entries in zip(prediction.labels.tolist(), prediction.scores.tolist(), tallies, strict=True):
        assert entries[0][0] == label
        assert entries[0][3] == pytest.approx(score, abs=1e-4)
        assert entries[0][2] >= max(entry[2] for entry in entries) - 1e-4


def test_the_background_owns_only_what_nothing_paints() -> None:
    masks = np.zeros((4, 1, 6), dtype=bool)
    masks[0, 0, 0:4] = masks[1, 0, 2:6] = masks[2, 0, 3:5] = masks[3, 0, 0:6] = True
    # Scores fall with the index; 0 is background, 3 was suppressed.
    owner = attribution.find_owners(masks, np.array([0, 1, 2, 3]), np.array([0, 1, 2]))
    assert owner.tolist() == [[0, 0, 1, 1, 1, 1]]
    assert attribution.find_owners(masks[:0], np.zeros(0), np.zeros(0, int)).tolist() == [[-1] * 6]


def test_what_a_majority_decided_is_owned_by_the_best_of_its_label() -> None:
    masks = np.zeros((4, 1, 5), dtype=bool)
    masks[0, 0, 0:4] = masks[1, 0, 0:2] = masks[2, 0, 0:3] = masks[3, 0, 1:4] = True
    # Scores fall with the index. Pixel 0: two say 2; 1: two say 2; 2: a tie; 3: as painted; 4: nothing.
    owner = attribution.find_owners(masks, np.array([1, 2, 2, 0]), np.arange(4), np.array([[2, 2, 0, 1, 0]]))
    assert owner.tolist() == [[1, 1, 3, 0, -1]]
    assert attribution.find_owners(masks, np.array([1, 2, 2, 0]), np.arange(4)).tolist() == [[0, 0, 0, 0, -1]]
    assert attribution.find_owners(masks[:0], np.zeros(0), np.zeros(0, int), np.zeros((1, 5))).tolist() == [[-1] * 5]


def test_pixels_are_shared_among_the_neighbours_that_voted_so() -> None:
    said = answer([[10, 11, 12], [20, 21, 22]], [[1, 1, 2], [0, 0, 0]], [[0.9, 0.8, 0.7]] * 2, [1, 0])
    owner = np.array([[0, 0, 0, 0, 1, -1]])
    truth = np.array([[1, 2, 2, 255, 2, 2]], np.uint8)
    blame = attribution.ErrorAttribution()
    blame.add(7, said, owner, truth, 10.0)
    assert set(blame.regions) == {10, 11, 20, 21, 22}  # 12 voted for another label
    assert (blame.regions[10].right, blame.regions[10].wrong) == (5.0, 10.0)
    assert blame.regions[20].wrong == pytest.approx(10 / 3)
    assert blame.list_worst(3) == [
        {"row": 10, "right": 5, "wrong": 10, "truth": [[2, 10]], "images": [[7, 10]]},
        {"row": 11, "right": 5, "wrong": 10, "truth": [[2, 10]], "images": [[7, 10]]},
        {"row": 20, "right": 0, "wrong": 3, "truth": [[2, 3]], "images": [[7, 3]]},
    ]
    total = sum(region.right + region.wrong for region in blame.regions.values())
    assert total == pytest.approx(10.0 * ((owner >= 0) & (truth != 255)).sum())


def test_neighbours_are_packed_to_the_byte() -> None:
    packed = packing.pack_neighbours(np.array([[5, -1]]), np.array([[0.1234, -1.0]]))
    assert packed["k"] == 2
    rows = np.frombuffer(base64.b64decode(packed["rows"]), "<u4")
    near = np.frombuffer(base64.b64decode(packed["similarities"]), "<u2") / packing.SIMILARITY_STEPS - 1
    assert rows.tolist() == [5, 2**32 - 1]
    assert near.tolist() == pytest.approx([0.1234, -1.0])


@pytest.mark.parametrize(("count", "width"), [(50, 8), (8, 50), (2, 3), (1, 4), (0, 4), (30, 1)])
def test_the_plane_keeps_what_varies_most(count: int, width: int, rng: np.random.Generator) -> None:
    spread = rng.normal(size=(count, width)) * (10.0 ** -np.arange(width))
    points = bank_map.project_to_plane(torch.from_numpy(spread).float())
    assert points.shape == (count, 2)
    assert (points >= -1e-9).all()
    assert (points <= 1 + 1e-9).all()
    if count > 10 and width > 1:
        assert abs(np.corrcoef(points[:, 0], spread[:, 0])[0, 1]) > 0.99
        assert np.ptp(points[:, 0]) == pytest.approx(1)
    np.testing.assert_array_equal(points, bank_map.project_to_plane(torch.from_numpy(spread).float()))


def test_the_plane_is_found_from_a_sample_of_large_banks(rng: np.random.Generator) -> None:
    spread = torch.from_numpy(rng.normal(size=(500, 6)) * (3.0 ** -np.arange(6))).float()
    sampled, whole = (bank_map.project_to_plane(spread, most) for most in (120, 500))
    for axis in range(2):
        assert abs(np.corrcoef(sampled[:, axis], whole[:, axis])[0, 1]) > 0.9
