"""Labels by words: against plain loops, and what a region or its neighbours without a feature do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.config import RetrievalConfig
from moduseg.retrieval.retriever import Retriever
from moduseg.retrieval.word_answer import answer_by_words
from moduseg.structures import SearchBank, WordFeatures
from tests import reference


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_answer_equals_plain_loops(share: float, device: torch.device, rng: np.random.Generator) -> None:
    values, neighbours, texts = unit_rows(rng, 12, 8), unit_rows(rng, 12, 5, 8), unit_rows(rng, 6, 8)
    values[2], neighbours[3] = 0, 0
    word_labels = (0, 0, 1, 2, 2, 3)
    expected = [
        reference.answer_by_words(value, list(near), texts, word_labels, scale=20.0, share=share)
        for value, near in zip(values, neighbours, strict=True)
    ]

    words = WordFeatures(torch.from_numpy(texts), word_labels, 20.0).to(device)
    labels, scores = answer_by_words(
        torch.from_numpy(values).to(device), torch.from_numpy(neighbours).to(device), words, share
    )

    assert labels.tolist() == [label for label, _ in expected]
    assert scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-5)


X, Y, NONE = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


@pytest.mark.parametrize(
    ("own", "neighbours", "share", "expected"),
    [
        pytest.param(X, [Y, Y], 0.4, 1, id="own feature wins with the larger share"),
        pytest.param(X, [Y, Y], 0.6, 2, id="neighbours win with the larger share"),
        pytest.param(X, [NONE, NONE], 1.0, 1, id="own feature alone without neighbours' features"),
        pytest.param(X, [], 1.0, 1, id="own feature alone without neighbours"),
        pytest.param(NONE, [Y, NONE], 0.0, 2, id="neighbours alone without an own feature"),
        pytest.param(X, [Y, Y], 0.5, 1, id="the smaller label wins a tie"),
    ],
)
def test_own_feature_and_neighbours_are_mixed(
    own: list[float], neighbours: list[list[float]], share: float, expected: int
) -> None:
    words = WordFeatures(torch.eye(2), (1, 2), 10.0)
    labels, _ = answer_by_words(torch.tensor([own]), torch.tensor(neighbours).reshape(1, -1, 2), words, share)
    assert labels.tolist() == [expected]


def test_labels_of_the_bank_have_no_part(rng: np.random.Generator) -> None:
    vectors, values = torch.from_numpy(unit_rows(rng, 20, 4)), torch.from_numpy(unit_rows(rng, 20, 6))
    words = WordFeatures(torch.from_numpy(unit_rows(rng, 3, 6)), (0, 1, 7), 40.0)
    own, results = torch.from_numpy(unit_rows(rng, 20, 6)), []
    for bank_labels in (torch.zeros(20, dtype=torch.int64), torch.arange(20) % 5):
        bank = SearchBank(vectors, bank_labels, torch.arange(20), None, values)
        settings = RetrievalConfig(top_k=3, answer="words")
        results.append(Retriever(bank, settings, words).vote(vectors, own).labels.tolist())
    assert results[0] == results[1]
    assert set(results[0]) <= {0, 1, 7}
    assert len(set(results[0])) > 1


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"vote_temperature": 0.1}, id="weighted votes"),
        pytest.param({"vote_balance": "cap"}, id="balanced votes"),
        pytest.param({"cap_top_k": True}, id="fewer votes"),
        pytest.param({"selection": "margin"}, id="margins between labels"),
        pytest.param({"confidence": True}, id="shares of votes"),
    ],
)
def test_settings_of_votes_are_refused_with_words(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: got .* with answer=words"):
        RetrievalConfig(answer="words", **setting)  # type: ignore[arg-type]


def test_share_is_in_the_key_with_words_alone() -> None:
    assert RetrievalConfig().key_parts() == RetrievalConfig(neighbour_share=0.2).key_parts()
    parts = RetrievalConfig(answer="words", neighbour_share=0.2).key_parts()
    assert (parts["answer"], parts["neighbour_share"]) == ("words", 0.2)
