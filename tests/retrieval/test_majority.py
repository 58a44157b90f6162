"""Every pixel takes the label of most proposals that hold it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.masks.cells import Cells
from moduseg.retrieval.majority import assemble_majority, label_cells_by_majority
from moduseg.structures import Proposals
from tests.support.retrieval import make_retriever


def by_loops(masks: np.ndarray, labels: list[int], scores: list[float]) -> np.ndarray:
    out = np.zeros(masks.shape[1:], dtype=np.uint8)
    for y, x in np.ndindex(*out.shape):
        votes: dict[int, tuple[int, int]] = {}
        for mask, label, score in zip(masks, labels, scores, strict=True):
            if mask[y, x]:
                count, worth = votes.get(label, (0, 0))
                votes[label] = count + 1, worth + round((score + 1) * 2**20)
        if votes:
            out[y, x] = max(votes, key=lambda label: (*votes[label], -label))
    return out


@pytest.mark.parametrize("distinct", [1, 2, 4, 30])
def test_as_pixel_by_pixel(distinct: int, device: torch.device, rng: np.random.Generator) -> None:
    for count in (0, 1, 2, 9, 40, 700):
        masks = rng.random((count, 7, 11)) < 0.4
        labels = (rng.integers(0, distinct, count) * 8).tolist()
        scores = (rng.integers(-4, 5, count) / 4).tolist()  # sums tie as well
        found = assemble_majority(
            torch.from_numpy(masks).to(device),
            torch.tensor(labels, dtype=torch.int64, device=device),
            torch.tensor(scores, dtype=torch.float32, device=device),
        )
        assert found.dtype == torch.uint8
        assert found.device.type == device.type
        assert np.array_equal(found.cpu().numpy(), by_loops(masks, labels, scores))


def test_by_hand(device: torch.device) -> None:
    """Two of three win; of one each, the higher score; of equal scores, the smaller label; background votes."""
    rows = [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    masks = torch.tensor(rows, dtype=torch.bool, device=device)[:, None]
    labels = torch.tensor([3, 2, 0, 1], device=device)
    scores = torch.tensor([0.5, 0.5, 0.75, 0.25], device=device)
    # pixel 0: 3, 2 and 0 once each, 0 scores highest; 1: 3 and 2 alike; 2: 3 before 1; 3: 0 before 3
    assert assemble_majority(masks, labels, scores).tolist() == [[0, 2, 3, 0, 0]]
    again = torch.cat((masks, masks[:1]))
    more = assemble_majority(again, torch.cat((labels, labels[:1])), torch.cat((scores, scores[:1] - 0.4)))
    assert more.tolist() == [[3, 3, 3, 3, 0]]


def test_cells_give_the_same(rng: np.random.Generator) -> None:
    masks = torch.from_numpy(rng.random((12, 9, 9)) < 0.5)
    labels, scores = rng.integers(0, 4, 12), rng.random(12).astype(np.float32)
    places = np.array([7, 1, 4, 11, 2])
    where = torch.arange(81).view(9, 9)
    cells = Cells.of(masks, where)  # one cell a pixel
    whole = assemble_majority(masks[places], torch.from_numpy(labels[places]), torch.from_numpy(scores[places]))
    assert np.array_equal(label_cells_by_majority(cells, places, labels, scores), whole.flatten().numpy())
    assert not label_cells_by_majority(cells, places[:0], labels, scores).any()


def test_disjoint_proposals_are_painted_as_ever(device: torch.device, rng: np.random.Generator) -> None:
    """As masks or as a map of ids, the label map is that of NMS, and nothing is dropped."""
    ids = torch.from_numpy(rng.integers(0, 12, (6, 8))).to(device)
    masks = torch.arange(12, device=device)[:, None, None] == ids
    bank = F.normalize(torch.from_numpy(rng.normal(size=(20, 5)).astype(np.float32)).to(device), dim=1)
    labels = torch.arange(20, device=device) % 4
    pooled = bank[:12] + 0.01
    maps = []
    for rule in ("nms", "majority"):
        retriever = make_retriever(bank, labels, top_k=1, selection=rule)
        for proposals in (Proposals(masks), Proposals.of_id_map(ids, 12)):
            prediction = retriever.predict(proposals, pooled)
            assert sorted(prediction.kept.tolist()) == list(range(12))
            assert bool((prediction.scores[prediction.kept].diff() <= 0).all())
            maps.append(prediction.label_map)
    assert all(np.array_equal(label_map, maps[0]) for label_map in maps)
    assert len(np.unique(maps[0])) > 1


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [([1], [0.5, 0.5], "expected"), ([1, 255], [0.5, 0.5], "255"), ([-1, 2], [0.5, 0.5], "-1")],
)
def test_bad_input(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble_majority(torch.ones(2, 2, 2, dtype=torch.bool), torch.tensor(labels), torch.tensor(scores))
