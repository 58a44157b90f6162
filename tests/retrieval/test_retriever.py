from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.config import RetrievalConfig
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Proposals, SearchBank
from tests import reference
from tests.support.retrieval import make_retriever


@pytest.mark.parametrize("index", range(4))
def test_golden(index: int, device: torch.device) -> None:
    golden = reference.load_golden(f"retrieval_{index}")
    arrays = reference.tensors(golden, device)
    settings = {name: golden[name].item() for name in ("top_k", "nms_iou", "min_area")}
    retriever = make_retriever(arrays["bank_vectors"], arrays["bank_labels"], **settings)
    prediction = retriever.predict(Proposals(arrays["masks"]), arrays["queries"])
    arrays = {name: array.cpu() for name, array in arrays.items()}
    large = (arrays["masks"].flatten(1).sum(1) >= settings["min_area"]).nonzero()[:, 0]
    kept = prediction.kept
    assert torch.equal(large[kept], arrays["kept_proposals"])
    assert torch.equal(prediction.labels[kept], arrays["kept_labels"])
    torch.testing.assert_close(prediction.scores[kept], arrays["kept_scores"], atol=1e-5, rtol=0)
    assert np.array_equal(prediction.label_map, arrays["label_map"].numpy())


@pytest.mark.parametrize("selection", ["nms", "nms_quality"])
def test_masks_are_ordered_by_float64_scores(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second mask's score is larger by 2^-27, which float32 does not hold.
    neighbours = torch.tensor([[1.0, 0.0], [1.0, 2**-26]]), torch.tensor([[0, 1], [2, 3]])
    retriever = make_retriever(torch.eye(4), torch.tensor([1, 1, 2, 2]), top_k=2, min_area=0, selection=selection)
    monkeypatch.setattr(retriever, "_search", lambda queries: neighbours)
    prediction = retriever.predict(Proposals(torch.ones(2, 4, 4, dtype=torch.bool)), torch.eye(4)[:2])
    assert (prediction.labels.tolist(), prediction.scores.tolist()) == ([1, 2], [0.5, 0.5])
    assert prediction.scores.dtype == torch.float32
    assert prediction.kept.tolist() == [1, 0]
    assert (prediction.label_map == 2).all()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 100])
def test_prediction_equals_the_plain_steps(
    centred: bool, top_k: int, device: torch.device, rng: np.random.Generator
) -> None:
    masks = reference.random_masks(rng, 20, 40, 50)
    pooled = rng.normal(size=(20, 8)).astype(np.float32) + 0.5
    pooled[3] = 0
    centre = rng.normal(size=8).astype(np.float32) if centred else np.zeros(8, np.float32)
    bank, bank_labels = rng.normal(size=(60, 8)).astype(np.float32), rng.integers(0, 5, 60)
    expected = [
        (0, 0.0) if not vector.any() else vote_of(vector - centre, bank, bank_labels, top_k) for vector in pooled
    ]
    expected_labels, expected_scores = (np.array(values) for values in zip(*expected, strict=True))
    kept = reference.suppress(masks, expected_labels, expected_scores, 0.4)

    retriever = make_retriever(
        F.normalize(torch.from_numpy(bank).to(device), dim=1),
        torch.from_numpy(bank_labels).to(device),
        torch.from_numpy(centre).to(device) if centred else None,
        top_k=top_k,
    )
    prediction = retriever.predict(Proposals(torch.from_numpy(masks).to(device)), torch.from_numpy(pooled).to(device))
    assert prediction.neighbours.shape == prediction.similarities.shape == (20, min(top_k, 60))
    assert prediction.neighbours[3].unique().tolist() == [-1]
    assert prediction.neighbour_labels[3].unique().tolist() == [-1]
    assert not prediction.similarities[3].any()
    searched = prediction.neighbours[torch.arange(20) != 3]
    assert prediction.neighbour_labels[torch.arange(20) != 3].tolist() == bank_labels[searched.numpy()].tolist()
    assert prediction.labels.tolist() == expected_labels.tolist()
    np.testing.assert_allclose(prediction.scores.numpy(), expected_scores, atol=1e-6)
    assert prediction.kept.tolist() == kept
    np.testing.assert_array_equal(
        prediction.label_map, reference.rasterize(masks[kept], expected_labels[kept], expected_scores[kept])
    )


def vote_of(query: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray, top_k: int) -> tuple[int, float]:
    similarities, ranked = reference.search(query, bank, top_k)
    return reference.vote(bank_labels[ranked].tolist(), similarities)


def test_small_and_doubtful_proposals_are_dropped(device: torch.device) -> None:
    """Whatever is dropped, the answers stay beside their proposals."""
    masks = torch.zeros((4, 2, 10), dtype=torch.bool)
    masks[0, 0, :3] = masks[1, 0, 3:] = masks[2, 1, :5] = masks[3, 1, 5:] = True
    proposals = Proposals(masks, torch.tensor([0.9, 0.8, 0.4, 0.7])).to(device)
    bank, labels = torch.eye(4, device=device), torch.tensor([1, 2, 3, 4], device=device)
    retriever = make_retriever(bank, labels, top_k=1, min_area=4, min_predicted_iou=0.5)
    prediction = retriever.predict(proposals, torch.eye(4))
    assert retriever.is_searched(proposals).tolist() == [False, True, False, True]
    assert torch.equal(prediction.proposals.masks.cpu(), masks[[1, 3]])
    assert prediction.labels.tolist() == [2, 4]
    assert prediction.label_map.tolist() == [[0] * 3 + [2] * 7, [0] * 5 + [4] * 5]


def test_neighbours_are_rows_of_the_stored_bank(device: torch.device) -> None:
    """The searched bank may have fewer vectors than the stored one, in another order."""
    bank = SearchBank(
        torch.eye(3, device=device), torch.tensor([5, 0, 6], device=device), torch.tensor([40, 2, 17], device=device)
    )
    retriever = Retriever(bank, RetrievalConfig(top_k=2, min_area=0))
    masks = torch.ones((2, 1, 1), dtype=torch.bool, device=device)
    queries = torch.tensor([[0.1, 0.0, 1.0], [0.0, 0.0, 0.0]], device=device)
    prediction = retriever.predict(Proposals(masks), queries)
    assert prediction.neighbours.tolist() == [[17, 40], [-1, -1]]
    assert prediction.neighbour_labels.tolist() == [[6, 5], [-1, -1]]
    rows, similarities = retriever.nearest(queries[:1], 3)
    assert rows.tolist() == [[17, 40, 2]]
    assert torch.equal(similarities[:, :2].cpu(), prediction.similarities[:1])


def test_answers_are_on_the_cpu_and_proposals_stay(device: torch.device) -> None:
    bank = torch.eye(2, device=device)
    proposals = Proposals(torch.ones((1, 3, 3), dtype=torch.bool, device=device))
    prediction = make_retriever(bank, torch.tensor([1, 2], device=device)).predict(proposals, bank[:1])
    assert prediction.proposals is proposals
    for name in ("labels", "scores", "kept", "neighbours", "neighbour_labels", "similarities"):
        assert getattr(prediction, name).device.type == "cpu", name


def test_without_a_vector_is_judged_before_centring(device: torch.device) -> None:
    pooled = torch.tensor([[0.0, 0.0], [2.0, 0.0]], device=device)  # no coverage; a vector equal to the centre
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    centre = torch.tensor([2.0, 0.0], device=device)
    votes = make_retriever(bank, torch.tensor([5, 6], device=device), centre, top_k=2).vote(pooled)
    assert votes.neighbours.tolist() == [[-1, -1], [0, 1]]
    assert votes.labels.tolist() == [0, 5]
    assert votes.scores.tolist() == [0, 0]
    assert votes.similarities.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("count", "bank_size"), [(3, 0), (0, 4), (0, 0)])
def test_nothing_to_search(count: int, bank_size: int, device: torch.device) -> None:
    retriever = make_retriever(
        torch.ones((bank_size, 2), device=device),
        torch.ones(bank_size, dtype=torch.int64, device=device),
        torch.ones(2, device=device),
    )
    masks = torch.ones((count, 4, 6), dtype=torch.bool, device=device)
    prediction = retriever.predict(Proposals(masks), torch.ones((count, 2), device=device))
    assert prediction.labels.tolist() == [0] * count
    assert prediction.scores.tolist() == [0.0] * count
    assert prediction.neighbours.shape == prediction.similarities.shape == (count, bank_size)
    assert prediction.label_map.shape == (4, 6)
    assert not prediction.label_map.any()


def test_bad_values() -> None:
    vectors, labels, rows = torch.ones(5, 3), torch.ones(5, dtype=torch.int64), torch.arange(5)
    retriever = Retriever(SearchBank(vectors, labels, rows), RetrievalConfig(top_k=2))
    for pooled, message in ((torch.ones(2, 4), "with the same C"), (torch.ones(2), "with the same C")):
        with pytest.raises(ValueError, match=message):
            retriever.vote(pooled)
    with pytest.raises(ValueError, match="got 2 vectors for 1 proposals"):
        retriever.predict(Proposals(torch.ones((1, 20, 20), dtype=torch.bool)), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"bank: got labels \(4,\), expected \(5,\)"):
        SearchBank(vectors, labels[:4], rows)
    with pytest.raises(ValueError, match=r"bank: got a centre \(2,\), expected \(3,\)"):
        SearchBank(vectors, labels, rows, torch.ones(2))
    with pytest.raises(ValueError, match="top_k: got 0"):
        RetrievalConfig(top_k=0)


def test_label_maps_are_tidied_last(device: torch.device) -> None:
    """A speck beside a ring: alone the one goes, then the ring is filled, and what retrieval says stays."""
    masks = torch.zeros(2, 9, 9, dtype=torch.bool, device=device)
    masks[0, 1:6, 1:6] = True
    masks[0, 3, 3] = False
    masks[1, 7, 7] = True
    bank, labels = torch.eye(2, device=device), torch.tensor([1, 2], device=device)
    plain = np.zeros((9, 9), dtype=np.uint8)
    plain[masks[0].cpu().numpy()] = 1
    plain[7, 7] = 2
    without_speck = np.where(plain == 2, 0, plain)
    filled = without_speck.copy()
    filled[3, 3] = 1
    for settings, expected in (
        ({}, plain),
        ({"min_object_area": 2}, without_speck),
        ({"min_object_area": 2, "max_hole_area": 1}, filled),
    ):
        prediction = make_retriever(bank, labels, top_k=1, min_area=0, **settings).predict(Proposals(masks), bank)
        assert np.array_equal(prediction.label_map, expected)
        assert prediction.labels.tolist() == [1, 2]
        assert prediction.kept.tolist() == [0, 1]
