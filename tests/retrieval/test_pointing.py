"""Which proposal is meant by a pixel, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.retrieval.pointing import find_region_at
from moduseg.structures import Prediction, Proposals


@pytest.fixture
def prediction() -> Prediction:
    """On 6 x 8 pixels: a picture of background (0), objects of label 1 (1, 2) and 2 (3), label 1 suppressed (4)."""
    masks = torch.zeros((5, 6, 8), dtype=torch.bool)
    masks[0], masks[1, :4, :4], masks[2, 1:3, 1:3], masks[3, 1:3, 5:7], masks[4, :4, :3] = True, True, True, True, True
    label_map = np.zeros((6, 8), np.uint8)
    label_map[:4, :4], label_map[1:3, 5:7] = 1, 2
    labels, scores = torch.tensor([0, 1, 1, 2, 1]), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.85])
    none = torch.zeros(5, 0)
    kept = torch.tensor([0, 1, 2, 3])
    quality = torch.tensor([0.5, 0.9, 0.9, 0.4, 0.9])
    return Prediction(label_map, Proposals(masks, quality), labels, scores, kept, none.long(), none.long(), none)


@pytest.mark.parametrize(("point", "is_majority", "expected"), [
    pytest.param((2.9, 2.2), False, 1, id="the best kept one of the label"),
    pytest.param((2.9, 2.2), True, 1, id="the one that fits the visible region"),
    pytest.param((6, 1), False, 3, id="another label"),
    pytest.param((7, 5), False, 0, id="background that a proposal covers"),
    pytest.param((-0.1, 2), False, None, id="left of the picture"),
    pytest.param((8, 2), False, None, id="right of the picture"),
])  # fmt: skip
def test_a_pixel_means(
    prediction: Prediction, point: tuple[float, float], is_majority: bool, expected: int | None
) -> None:
    assert find_region_at(prediction, *point, is_majority=is_majority) == expected


def test_of_voting_masks_the_best_fit_is_meant_whatever_its_score(prediction: Prediction) -> None:
    prediction.label_map[:4, 3] = 0
    assert find_region_at(prediction, 1, 1, is_majority=True) == 4
    prediction.label_map[:] = 0
    prediction.label_map[1:3, 1:3] = 1
    assert find_region_at(prediction, 1, 1, is_majority=True) == 2


def test_of_background_the_most_trusted_outline_is_meant(prediction: Prediction) -> None:
    prediction.label_map[:] = 0
    prediction.labels[:] = 0
    # 1, 2 and 4 are trusted alike: the smallest of them.
    assert find_region_at(prediction, 1, 1) == 2


def test_where_no_proposal_is_none_is_meant(prediction: Prediction) -> None:
    prediction.proposals.masks[0] = False
    assert find_region_at(prediction, 7, 5) is None
