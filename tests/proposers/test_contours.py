"""Proposals from contours: the contract, nested trees, the order, limits, images of all shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from moduseg.config import compose
from moduseg.errors import ConfigError
from moduseg.masks.forest import are_nested
from moduseg.proposers import build
from moduseg.proposers.contours import ContourOptions, ContourProposer, flood, measure_gradient, order_diversely
from moduseg.proposers.hed import ContourDetector
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.support.real_weights import use_real_weights


class TestContours(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "contours", "max_proposals": 60}


def detect_plainly(_: ContourDetector, image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Return, in place of HED's contours, where colours of the smoothed image change: `[6, h, w]` in [0, 1]."""
    small = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA).astype(np.float32)
    step = np.stack(np.gradient(cv2.GaussianBlur(small, (0, 0), 1.0), axis=(0, 1)) if min(size) > 1 else [0 * small])
    edges = np.clip(np.sqrt((step**2).sum((0, -1))) / 40, 0, 1)
    return torch.from_numpy(np.broadcast_to(edges, (6, *size)).copy())


@pytest.fixture
def _plain_contours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights find nothing in particular."""
    monkeypatch.setattr(ContourDetector, "detect", detect_plainly)


def propose(image: np.ndarray, **options: Any) -> Proposals:
    return ContourProposer(ContourOptions(**options), CPU).propose(Sample("a", image))


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, list[np.ndarray]]:
    """A disc with a window in it and a bar that touches it, on noise: the image, and the mask of each."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:96, :128]
    disc, window = np.hypot(y - 45, x - 45) < 28, np.hypot(y - 45, x - 45) < 11
    bar = (abs(y - 50) < 12) & (x >= 73) & (x < 118)
    image = rng.normal([120, 130, 110], 6, (96, 128, 3))
    for mask, colour in ((disc, (200, 60, 50)), (window, (230, 220, 60)), (bar, (60, 70, 210))):
        image[mask] = rng.normal(colour, 6, (int(mask.sum()), 3))
    return np.clip(image, 0, 255).astype(np.uint8), [disc, window, bar]


def measure_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.usefixtures("_plain_contours")
def test_objects_and_their_parts_come_first(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    image, truths = scene
    masks = propose(image).masks[:30].numpy()
    for truth in truths:
        assert max(measure_iou(mask, truth) for mask in masks) > 0.85


@pytest.mark.usefixtures("_plain_contours")
@pytest.mark.parametrize("num_trees", [1, 2, 3])
def test_parents_are_the_smallest_masks_around(scene: tuple[np.ndarray, list[np.ndarray]], num_trees: int) -> None:
    proposals = propose(scene[0], num_trees=num_trees)
    masks, areas = proposals.masks.flatten(1), proposals.areas
    assert proposals.parents is not None
    parents = proposals.parents.numpy()
    assert (parents >= 0).sum() > 5
    for row, parent in enumerate(parents):
        if parent >= 0:
            assert (masks[row] <= masks[parent]).all()
            assert areas[row] < areas[parent]
    # Masks of one tree never cross, so that one pass can choose among them; several trees do cross.
    assert are_nested(masks.T.numpy(), parents) is (num_trees == 1)
    if num_trees == 1:
        is_inside = (masks.float() @ (~masks).float().T == 0).fill_diagonal_(False)
        smallest = torch.where(is_inside, areas, 1 << 40).min(1)
        assert parents.tolist() == torch.where(is_inside.any(1), smallest.indices, -1).tolist()


@pytest.mark.usefixtures("_plain_contours")
def test_a_cap_keeps_the_first(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    many, few = propose(scene[0], max_proposals=40), propose(scene[0], max_proposals=10)
    assert (len(many), len(few)) == (40, 10)
    assert torch.equal(few.masks, many.masks[:10])
    assert torch.equal(few.predicted_iou, many.predicted_iou[:10])


@pytest.mark.usefixtures("_plain_contours")
@pytest.mark.parametrize("limits", [{"max_iou": 0.5}, {"max_iou": 0.95}, {"min_area": 300}, {"max_area": 0.2}])
def test_limits_hold(scene: tuple[np.ndarray, list[np.ndarray]], limits: dict[str, float]) -> None:
    options = ContourOptions(**limits)  # type: ignore[arg-type]
    proposals = ContourProposer(options, CPU).propose(Sample("a", scene[0]))
    flat = proposals.masks.flatten(1).double()
    shared = flat @ flat.T
    overlaps = shared / (flat.sum(1)[:, None] + flat.sum(1)[None] - shared) - torch.eye(len(flat), dtype=torch.float64)
    assert len(proposals) > 2
    assert overlaps.max() <= options.max_iou + 1e-6
    assert proposals.areas.min() >= options.min_area
    assert proposals.areas.max() <= options.max_area * 96 * 128


@pytest.mark.usefixtures("_plain_contours")
def test_scores_are_estimates_in_the_unit_interval(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    scores = propose(scene[0], overlap_cost=0.0, max_iou=1.0).predicted_iou
    assert 0 < scores.min() < scores.max() < 1
    assert torch.equal(scores, scores.sort(descending=True).values)


@pytest.mark.parametrize(
    ("scores", "cost", "max_iou", "expected"),
    [
        pytest.param([0.9, 0.8, 0.5], 0.0, 1.0, [0, 1, 2], id="without cost by score"),
        # The second costs 0.8 * 0.8 for its overlap with the first: 0.16 is less than 0.5.
        pytest.param([0.9, 0.8, 0.5], 0.8, 1.0, [0, 2, 1], id="an overlap comes later"),
        pytest.param([0.9, 0.8, 0.5], 0.0, 0.7, [0, 2], id="a near-duplicate is dropped"),
        pytest.param([0.5, 0.5, 0.5], 0.0, 1.0, [0, 1, 2], id="equals keep their order"),
        pytest.param([], 0.5, 0.5, [], id="none"),
    ],
)
def test_order(scores: list[float], cost: float, max_iou: float, expected: list[int]) -> None:
    overlaps = np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]], np.float32)[: len(scores), : len(scores)]
    options = ContourOptions(overlap_cost=cost, max_iou=max_iou)
    assert order_diversely(np.array(scores), overlaps, options).tolist() == expected
    short = ContourOptions(overlap_cost=cost, max_iou=max_iou, max_proposals=1)
    assert order_diversely(np.array(scores), overlaps, short).tolist() == expected[:1]


@pytest.mark.parametrize("size", [(40, 2000), (2000, 40), (1, 700), (257, 129)])
def test_strips_and_odd_sizes(size: tuple[int, int]) -> None:
    proposals = propose(sample(*size).image, max_proposals=20)
    assert proposals.masks.shape[1:] == size
    assert len(proposals) > 0 or size[0] == 1
    assert (proposals.areas >= 60).all()


@pytest.mark.usefixtures("_plain_contours")
def test_a_flat_image_has_no_region() -> None:
    assert propose(np.full((50, 70, 3), 90, np.uint8)).masks.shape == (0, 50, 70)


@pytest.mark.usefixtures("_plain_contours")
def test_large_image_is_worked_on_small(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    image = np.kron(scene[0], np.ones((4, 4, 1), np.uint8))
    proposals = propose(image, max_side=128)
    assert proposals.masks.shape[1:] == (384, 512)
    assert proposals.parents is not None
    for truth in scene[1]:
        enlarged = np.kron(truth, np.ones((4, 4))) > 0
        assert max(measure_iou(mask, enlarged) for mask in proposals.masks.numpy()) > 0.8


def test_gradient_is_the_step_a_pixel() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None] * 0.02, (40, 30, 3))
    np.testing.assert_allclose(measure_gradient(ramp)[10:30, 10:20], 2 * 0.02 * 3**0.5, rtol=1e-5)


def test_basins_meet_on_the_ridge() -> None:
    y, x = np.mgrid[:40, :60]
    ridge = np.exp(-((x - 25.0) ** 2) / 20) + 0.01 * np.abs(np.where(x < 25, x - 10, x - 42)) / 60 + 1e-4 * abs(y - 20)
    labels = flood(ridge.astype(np.float32))
    assert labels.max() == 1
    assert (labels[:, :24] == labels[0, 0]).all()
    assert (labels[:, 27:] == labels[0, -1]).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", ""),
        ("edge_scale", 0.0),
        ("edge_scale", 1.5),
        ("max_side", 8),
        ("num_trees", 0),
        ("num_trees", 4),
        ("min_area", 0),
        ("max_area", 1.5),
        ("overlap_cost", -0.1),
        ("max_iou", 1.1),
        ("max_proposals", 0),
        ("max_proposals", "many"),
    ],
)
def test_wrong_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match="got"):
        build({"name": "contours", key: value}, CPU)


def test_digest_names_weights_and_ranking() -> None:
    first, second = (ContourProposer(ContourOptions(seed=seed), CPU).digest for seed in (0, 1))
    assert first.split("+")[0] == "random-0"
    assert first.split("+")[1] == second.split("+")[1]
    assert len(first.split("+")[1]) == 64
    assert first != second


def test_preset_with_real_weights(scene: tuple[np.ndarray, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_real_weights(monkeypatch)
    proposer = build(compose(["proposer=contours"]).proposer, CPU)
    masks = proposer.propose(Sample("a", scene[0])).masks[:30].numpy()
    for truth in scene[1]:
        assert max(measure_iou(mask, truth) for mask in masks) > 0.85
