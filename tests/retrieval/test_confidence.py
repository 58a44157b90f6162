"""How sure each pixel of a label map is: the share of the votes that its label got."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.retrieval.confidence import measure_vote_shares, paint_confidence
from moduseg.structures import Proposals
from tests.support.retrieval import make_retriever


@pytest.mark.parametrize(
    ("label", "neighbours", "similarities", "temperature", "share"),
    [
        pytest.param(1, [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6], None, 1.0, id="all agree"),
        pytest.param(1, [1, 2, 1, 0], [0.9, 0.8, 0.7, 0.6], None, 0.5, id="half"),
        pytest.param(0, [0, 2, 1, 0], [0.9, 0.8, 0.7, 0.6], None, 0.5, id="background like any other"),
        pytest.param(0, [-1, -1], [0.0, 0.0], None, 0.0, id="not searched"),
        pytest.param(0, [], [], None, 0.0, id="an empty bank"),
        pytest.param(1, [1, 2], [0.5, 0.5 - 0.06 * np.log(3)], 0.06, 0.75, id="a near neighbour weighs more"),
    ],
)
def test_shares_by_hand(
    label: int,
    neighbours: list[int],
    similarities: list[float],
    temperature: float | None,
    share: float,
    device: torch.device,
) -> None:
    shares = measure_vote_shares(
        torch.tensor([label], device=device),
        torch.tensor([neighbours], dtype=torch.int64, device=device),
        torch.tensor([similarities], dtype=torch.float32, device=device),
        temperature,
    )
    assert shares.tolist() == [pytest.approx(share, abs=1e-6)]


ROWS = [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
LABELS, SCORES, SHARES = [2, 2, 0], [0.5, 0.9, 0.7], [1.0, 0.6, 0.2]


@pytest.mark.parametrize(
    ("label_map", "is_majority", "expected"),
    [
        # Of two proposals of label 2 the one with the higher score, though its share is smaller.
        pytest.param([2, 2, 2, 2, 0, 0], False, [1.0, 0.6, 0.6, 0.6, 0.2, 0.0], id="painted by score"),
        pytest.param([2, 2, 2, 0, 0, 0], False, [1.0, 0.6, 0.6, 0.2, 0.2, 0.0], id="background where it won"),
        pytest.param([2, 2, 2, 2, 2, 0], False, [1.0, 0.6, 0.6, 0.6, 0.0, 0.0], id="a pixel that was filled in"),
        pytest.param([2, 2, 2, 2, 0, 0], True, [1.0, 0.8, 0.8, 1.6 / 3, 0.2, 0.0], id="the mean of all that cover"),
        pytest.param([2, 2, 2, 0, 0, 0], True, [1.0, 0.8, 0.8, 0.2 / 3, 0.2, 0.0], id="others count as nothing"),
    ],
)
def test_pixels_by_hand(label_map: list[int], is_majority: bool, expected: list[float], device: torch.device) -> None:
    confidence = paint_confidence(
        torch.tensor(ROWS, dtype=torch.bool, device=device)[:, None],
        torch.tensor(LABELS, device=device),
        torch.tensor(SCORES, device=device),
        torch.tensor(SHARES, device=device),
        torch.tensor([label_map], dtype=torch.uint8, device=device),
        is_majority=is_majority,
    )
    assert confidence.dtype == np.uint8
    assert confidence[0].tolist() == [round(255 * share) for share in expected]


@pytest.mark.parametrize("selection", ["nms", "nms_quality", "margin", "similarity", "majority", "shares"])
def test_a_prediction_says_how_sure_it_is(selection: str, device: torch.device, rng: np.random.Generator) -> None:
    masks = torch.from_numpy(rng.random((9, 6, 8)) < 0.6).to(device)
    bank = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(20, 5)).astype(np.float32)), dim=1)
    bank, labels = bank.to(device), torch.arange(20, device=device) % 3
    settings = {"top_k": 4, "min_area": 0, "selection": selection}
    pooled = bank[:9] + 0.05
    plain = make_retriever(bank, labels, **settings).predict(Proposals(masks), pooled)
    assert plain.confidence is None
    prediction = make_retriever(bank, labels, **settings, confidence=True).predict(Proposals(masks), pooled)
    assert prediction.confidence is not None
    assert np.array_equal(prediction.label_map, plain.label_map)
    assert prediction.confidence.shape == (6, 8)
    # A foreground pixel got its label from a proposal, of whose four votes one at least was for it.
    least = 255 / 4 / 9 if selection in ("majority", "shares") else 255 / 4
    assert prediction.confidence[prediction.label_map > 0].min() >= int(least)
    empty = make_retriever(bank, labels, **settings, confidence=True).predict(Proposals(masks[:0]), pooled[:0])
    assert empty.confidence is not None
    assert not empty.confidence.any()
