"""Background rules and the vote of proposals, on hand-sized arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.errors import ConfigError
from moduseg.pseudo_masks.labels import make_label_map, region_vote, spill_scores
from moduseg.structures import Proposals, ScoreMaps

SCORES = torch.tensor([[[0.9, 0.5, 0.2, 0.6]], [[0.1, 0.4, 0.3, 0.6]]])


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("constant", 0.45, [3, 3, 0, 3]),  # 0.6 and 0.6: the smaller id
        ("constant", 0.5, [3, 0, 0, 3]),  # 0.5 and 0.5: the background
        ("constant", 0.0, [3, 3, 7, 3]),
        ("constant", 1.0, [0, 0, 0, 0]),
        ("power", 1.0, [3, 0, 0, 3]),  # 1 - max: 0.1, 0.5 (a tie), 0.7, 0.4
        ("power", 4.0, [3, 3, 7, 3]),  # 0.7 ** 4 = 0.24
        ("power", 3.0, [3, 3, 0, 3]),  # 0.7 ** 3 = 0.34
    ],
)
def test_background_rules(rule: str, value: float, expected: list[int], device: torch.device) -> None:
    labels = make_label_map(ScoreMaps((3, 7), SCORES.to(device)), rule, value)
    assert labels.dtype == torch.uint8
    assert labels.device.type == device.type
    assert labels.tolist() == [expected]


def test_given_background_and_ignore(device: torch.device) -> None:
    background = torch.tensor([[0.95, 0.5, 0.1, 0.6]], device=device)
    ignore = torch.tensor([[False, False, True, False]], device=device)
    assert make_label_map(ScoreMaps((3, 7), SCORES.to(device), background, ignore), "given").tolist() == [
        [0, 0, 255, 0]
    ]


@pytest.mark.parametrize(("rule", "value"), [("constant", 0.0), ("constant", 0.5), ("power", 2.0)])
def test_no_class_is_all_background(rule: str, value: float, device: torch.device) -> None:
    assert make_label_map(ScoreMaps((), torch.zeros(0, 2, 3, device=device)), rule, value).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("constant", 1.5, "background.value: got 1.5"),
        ("constant", -0.1, "background.value: got -0.1"),
        ("power", 0.0, "background.value: got 0.0, expected a number above 0"),
        ("given", 0.5, "scores no background"),
        ("words", 0.5, "scores no background"),
        ("probability", -0.5, "background.value: got -0.5, expected a number in"),
        ("margin", 1.5, "background.value: got 1.5, expected a number in"),
        ("threshold", 1.5, "background.low: got 1.5 with value 1.5, expected 0 <= low <= value <= 1"),
        ("median", 0.5, "background.rule: got 'median', expected one of constant, power, threshold, given"),
    ],
)
def test_bad_rules(rule: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_label_map(ScoreMaps((3, 7), SCORES), rule, value)


@pytest.mark.parametrize(
    ("value", "low", "expected"),
    [
        (0.55, 0.35, [3, 255, 0, 3]),  # 0.5 lies between, 0.3 is below both, 0.6 beats both
        (0.55, None, [3, 0, 0, 3]),
        (0.5, 0.0, [3, 255, 255, 3]),
    ],
)
def test_two_thresholds(value: float, low: float | None, expected: list[int], device: torch.device) -> None:
    maps = ScoreMaps((3, 7), SCORES.to(device))
    assert make_label_map(maps, "threshold", value, low).tolist() == [expected]
    ignore = torch.tensor([[True, False, False, False]], device=device)
    maps = ScoreMaps((3, 7), SCORES.to(device), None, ignore)
    assert make_label_map(maps, "threshold", value, low).tolist() == [[255, *expected[1:]]]
    with pytest.raises(ConfigError, match=r"low: got 0\.9 with value"):
        make_label_map(maps, "threshold", value, 0.9)


@pytest.mark.parametrize(("scores", "value", "expected"), [
    pytest.param([[0.9], [0.1]], 0.8, 3, id="far ahead: .9 x .894 is more than .757"),
    pytest.param([[0.9], [0.4]], 0.8, 0, id="not far enough: .9 x .707 is less"),
    pytest.param([[0.4], [0.9]], 0.6, 7, id="a lower threshold: .528"),
    pytest.param([[0.5], [0.5]], 0.0, 3, id="no lead passes no threshold but 0"),
    pytest.param([[0.5], [0.5]], 0.01, 0, id="two alike are background"),
    pytest.param([[0.7]], 0.6, 3, id="a class alone leads the background: .7 x .837 is more than .528"),
    pytest.param([[0.7]], 0.7, 0, id="and has to lead it far enough: .640"),
])  # fmt: skip
def test_background_by_the_lead_of_the_best(
    scores: list[list[float]], value: float, expected: int, device: torch.device
) -> None:
    maps = ScoreMaps((3, 7)[: len(scores)], torch.tensor(scores, device=device)[:, None])
    assert make_label_map(maps, "margin", value).tolist() == [[expected]]
    assert make_label_map(ScoreMaps((), torch.zeros(0, 1, 1, device=device)), "margin", value).tolist() == [[0]]


def test_words_and_their_probability(device: torch.device) -> None:
    background = torch.tensor([[0.95, 0.1, 0.1, 0.1]], device=device)
    maps = ScoreMaps((3, 7), SCORES.to(device), background)
    assert make_label_map(maps, "words").tolist() == make_label_map(maps, "given").tolist() == [[0, 3, 7, 3]]
    assert make_label_map(maps, "probability", 0.4).tolist() == [[0, 3, 0, 3]]
    assert make_label_map(maps, "probability", 0.0).tolist() == [[0, 3, 7, 3]]
    assert make_label_map(ScoreMaps((3, 7), SCORES.to(device)), "probability", 0.55).tolist() == [[3, 0, 0, 3]]


def test_refining_comes_before_the_comparison(device: torch.device) -> None:
    seen = []

    def swap(stacked: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(stacked.shape))
        return stacked[[0, 2, 1]]

    maps = ScoreMaps((3, 7), SCORES.to(device))
    assert make_label_map(maps, "constant", 0.45, refine=swap).tolist() == [[7, 7, 0, 3]]
    assert make_label_map(maps, "threshold", 0.55, 0.35, refine=swap).tolist() == [[7, 255, 0, 3]]
    assert set(seen) == {(3, 1, 4)}


def proposals(device: torch.device, *masks: list[list[int]]) -> Proposals:
    return Proposals(torch.tensor(masks, device=device).bool())


@pytest.mark.parametrize(
    ("labels", "masks", "expected"),
    [
        # disjoint: each takes its majority, pixels of none keep theirs
        ([[1, 1, 0], [2, 2, 1], [0, 5, 0]], ([[1, 1, 1], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
         [[1, 1, 1], [2, 2, 2], [0, 5, 0]]),
        # a tie: the smallest id, background included
        ([[2, 1, 0]], ([[1, 1, 0]],), [[1, 1, 0]]),
        ([[2, 0, 1]], ([[1, 1, 0]],), [[0, 0, 1]]),
        # ignored pixels neither vote nor change; a region of nothing else changes nothing
        ([[255, 255, 3, 0]], ([[1, 1, 1, 0]],), [[255, 255, 3, 0]]),
        ([[255, 255, 3, 0]], ([[1, 1, 0, 0]],), [[255, 255, 3, 0]]),
        # nested: the small one decides inside itself
        ([[1, 1, 1, 2, 0]], ([[1, 1, 1, 1, 1]], [[0, 0, 0, 1, 1]]), [[1, 1, 1, 0, 0]]),
        ([[1, 1, 1, 2, 0]], ([[0, 0, 0, 1, 1]], [[1, 1, 1, 1, 1]]), [[1, 1, 1, 0, 0]]),
        # equal areas: the one listed first
        ([[1, 1, 2, 2, 2]], ([[1, 1, 1, 0, 0]], [[0, 0, 1, 1, 1]]), [[1, 1, 1, 2, 2]]),
        ([[1, 1, 2, 2, 2]], ([[0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0]]), [[1, 1, 2, 2, 2]]),
        # an empty mask
        ([[1, 2]], ([[0, 0]],), [[1, 2]]),
        # nothing but ignored pixels
        ([[255, 255]], ([[1, 1]],), [[255, 255]]),
    ],
)  # fmt: skip
def test_region_vote(
    labels: list[list[int]], masks: tuple[list[list[int]], ...], expected: list[list[int]], device: torch.device
) -> None:
    before = torch.tensor(labels, dtype=torch.uint8, device=device)
    after = region_vote(before, proposals(device, *masks))
    assert after.dtype == torch.uint8
    assert after.tolist() == expected
    assert before.tolist() == labels


@pytest.mark.parametrize(
    ("purity", "expected"),
    [
        (0.0, [[2, 2, 1, 1, 1, 1]]),  # the smallest decides: its tie goes to 1 on the right, to 2 on the left
        (0.6, [[2, 2, 1, 1, 1, 1]]),  # left is pure (1.0); right (0.5) is not, the whole (4 of 6) is
        (1.0, [[2, 2, 1, 1, 1, 1]]),
    ],
)
def test_purity_chooses_among_nested(purity: float, expected: list[list[int]]) -> None:
    labels = torch.tensor([[2, 2, 1, 1, 1, 1]], dtype=torch.uint8)
    nested = proposals(torch.device("cpu"), [[1] * 6], [[1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 1, 1]])
    assert region_vote(labels, nested, purity).tolist() == expected


def test_impure_regions_give_way_to_purer_larger_ones() -> None:
    labels = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1]], dtype=torch.uint8)
    nested = proposals(torch.device("cpu"), [[1] * 8], [[0, 0, 0, 0, 1, 1, 0, 0]])
    assert region_vote(labels, nested, 0.0).tolist() == [[1, 1, 1, 1, 0, 0, 1, 1]]
    assert region_vote(labels, nested, 0.8).tolist() == [[1] * 8]


def test_region_vote_equals_a_plain_loop(rng: np.random.Generator, device: torch.device) -> None:
    labels = rng.integers(0, 4, (30, 20)).astype(np.uint8)
    labels[rng.random((30, 20)) < 0.1] = 255
    ids = rng.integers(0, 12, (30, 20))
    masks = np.stack([ids == i for i in range(10)])  # two regions belong to no proposal
    expected = labels.copy()
    for mask in masks:
        counts = np.bincount(labels[mask & (labels != 255)], minlength=4)
        expected[mask & (labels != 255)] = counts.argmax()
    voted = region_vote(torch.from_numpy(labels).to(device), Proposals(torch.from_numpy(masks).to(device)))
    assert np.array_equal(voted.cpu().numpy(), expected)


def test_region_vote_without_proposals_and_with_others() -> None:
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    assert region_vote(labels, Proposals(torch.zeros(0, 2, 3, dtype=torch.bool))).tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"got \(3, 2\) masks, expected the map's \(2, 3\)"):
        region_vote(labels, Proposals(torch.zeros(1, 3, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="purity: got 2"):
        region_vote(labels, Proposals(torch.zeros(1, 2, 3, dtype=torch.bool)), 2)


def test_scores_spill_by_the_stated_distance() -> None:
    """Two classes of one pixel each; the background and what is ignored stay where they are."""
    scores = torch.zeros(2, 7, 12)
    scores[0, 3, 3], scores[1, 0, 11] = 0.9, 0.8
    ignore = torch.zeros(7, 12, dtype=torch.bool)
    ignore[6, 0] = True
    maps = ScoreMaps((1, 4), scores, torch.full((7, 12), 0.5), ignore)
    expected = torch.zeros(7, 12, dtype=torch.uint8)
    expected[1:6, 1:6], expected[0:3, 9:12], expected[6, 0] = 1, 4, 255
    assert make_label_map(spill_scores(maps, 2), "given").tolist() == expected.tolist()
    assert spill_scores(maps, 0) is maps
    empty = ScoreMaps((), torch.zeros(0, 7, 12), torch.full((7, 12), 0.5))
    assert len(spill_scores(empty, 2).scores) == 0


def test_classes_that_win_few_pixels_lose_them() -> None:
    """Of ten pixels of classes, class 2 has one: a tenth, which is no more than the share."""
    scores = torch.zeros(3, 1, 12)
    scores[0, 0, :9], scores[1, 0, 9] = 0.9, 0.8
    scores[2, 0, 9] = 0.6
    maps = ScoreMaps((1, 2, 5), scores, torch.full((1, 12), 0.5))
    assert make_label_map(maps, "given")[0].tolist() == [1] * 9 + [2, 0, 0]
    # The pixel goes to the next best: class 5 has none, so that the background gets it.
    assert make_label_map(maps, "given", min_class_share=0.1)[0].tolist() == [1] * 9 + [0, 0, 0]
    assert make_label_map(maps, "given", min_class_share=0.09)[0].tolist() == [1] * 9 + [2, 0, 0]
    # Below a threshold is background, after small classes are dropped.
    assert make_label_map(maps, "probability", 0.55, min_class_share=0.1)[0].tolist() == [1] * 9 + [0, 0, 0]
    empty = ScoreMaps((), torch.zeros(0, 1, 12), torch.full((1, 12), 0.5))
    assert not make_label_map(empty, "given", min_class_share=0.1).any()
