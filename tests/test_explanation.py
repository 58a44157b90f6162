"""Why a region has its label: who voted, and how much each vote counted."""

from __future__ import annotations

import pytest
import torch

from moduseg.bank.store import Bank
from moduseg.explanation import NearestRows, explain


def make_bank() -> Bank:
    """Return one cat in an image, and two regions of background in another."""
    labels, images = torch.tensor([1, 0, 0]), torch.tensor([0, 1, 1])
    info = {"backbone_digest": "", "config": {}}
    return Bank(torch.eye(3), labels, images, torch.ones(3, dtype=torch.int64), ("a", "b"), ("background", "cat"), info)


@pytest.mark.parametrize(("temperature", "label", "text", "runner_up"), [
    pytest.param(None, "background", "background 2, cat 1", "cat", id="all votes count alike"),
    # exp(-0.2 / 0.1) + exp(-0.3 / 0.1) = 0.135 + 0.050 beside 1: 84 % of the votes are the cat's.
    pytest.param(0.1, "cat", "cat 1 (84 %), background 2 (16 %)", "background", id="near neighbours count more"),
])  # fmt: skip
def test_votes_say_how_much_they_count(temperature: float | None, label: str, text: str, runner_up: str) -> None:
    nearest = NearestRows([0, 1, 2], [0.9, 0.7, 0.6], [0, 1, 2], temperature)
    explanation = explain(make_bank(), nearest, proposal=0, label=label, score=0.9)
    assert explanation.runner_up == runner_up
    assert str(explanation).splitlines()[0] == f"{label}, score 0.900, votes: {text}"
    assert f"votes: {text}" in explanation._repr_html_()


def test_regions_that_had_no_vote_do_not_count() -> None:
    nearest = NearestRows([0, 1, 2], [0.9, 0.7, 0.6], [1], 0.1)
    explanation = explain(make_bank(), nearest, proposal=0, label="background", score=0.7)
    assert (explanation.votes, explanation.shares) == ({"background": 1}, {"background": 1})
    assert explanation.runner_up is None
