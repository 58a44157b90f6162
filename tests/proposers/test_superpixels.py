from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.errors import ConfigError
from moduseg.proposers import build
from moduseg.proposers.superpixels import SuperpixelOptions, SuperpixelProposer
from moduseg.structures import Sample
from tests.proposers.contract import CPU, ProposerContract, sample


class TestSuperpixels(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "superpixels", "max_proposals": 30}


def iou(masks: torch.Tensor) -> np.ndarray:
    flat = masks.flatten(1).numpy().astype(np.float64)
    shared = flat @ flat.T
    return shared / (flat.sum(1)[:, None] + flat.sum(1)[None] - shared)


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, list[np.ndarray]]:
    """Two striped discs that touch, on noise: `image`, and the mask of each disc."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:96, :128]
    image = rng.normal([120, 130, 110], 12, (96, 128, 3))
    discs = [np.hypot(y - 45, x - 40) < 22, np.hypot(y - 50, x - 84) < 23]
    for disc, colour in zip(discs, ([200, 60, 50], [60, 70, 210]), strict=True):
        stripes = np.where((x + y) // 5 % 2 == 0, 1.0, 0.75)[..., None]
        image[disc] = (np.array(colour) * stripes + rng.normal(0, 8, image.shape))[disc]
    return np.clip(image, 0, 255).astype(np.uint8), discs


def test_striped_objects_are_whole(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    image, discs = scene
    masks = SuperpixelProposer(SuperpixelOptions()).propose(Sample("a", image)).masks.numpy()
    for disc in discs:
        assert max((m & disc).sum() / (m | disc).sum() for m in masks) > 0.85


def test_nested_masks_are_kept(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    masks = SuperpixelProposer(SuperpixelOptions()).propose(Sample("a", scene[0])).masks.flatten(1).numpy()
    inside = (masks.astype(int) @ (~masks).T.astype(int)) == 0
    assert (inside.sum() - len(masks)) > 0


@pytest.mark.parametrize("limits", [{"max_iou": 0.5}, {"max_iou": 0.95}, {"min_area": 300}, {"max_area": 0.3}])
def test_limits_hold(scene: tuple[np.ndarray, list[np.ndarray]], limits: dict[str, float]) -> None:
    proposer = SuperpixelProposer(SuperpixelOptions(**limits))  # type: ignore[arg-type]
    proposals = proposer.propose(Sample("a", scene[0]))
    overlap = iou(proposals.masks)
    np.fill_diagonal(overlap, 0)
    assert len(proposals) > 2
    assert overlap.max() <= proposer.options.max_iou + 1e-6
    assert proposals.areas.min() >= proposer.options.min_area
    assert proposals.areas.max() <= proposer.options.max_area * 96 * 128


def test_cap_keeps_the_first(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    many = SuperpixelProposer(SuperpixelOptions(max_proposals=40)).propose(Sample("a", scene[0])).masks
    few = SuperpixelProposer(SuperpixelOptions(max_proposals=10)).propose(Sample("a", scene[0])).masks
    assert len(few) == 10
    assert torch.equal(few[:1], many[:1])


def test_large_image_is_segmented_small(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    image, discs = (
        np.kron(scene[0], np.ones((5, 5, 1), np.uint8)),
        [np.kron(d, np.ones((5, 5))) > 0 for d in scene[1]],
    )
    started = time.process_time()
    masks = SuperpixelProposer(SuperpixelOptions(max_side=160)).propose(Sample("a", image)).masks.numpy()
    assert masks.shape[1:] == (480, 640)
    for disc in discs:
        assert max((m & disc).sum() / (m | disc).sum() for m in masks) > 0.8
    assert time.process_time() - started < 10


def test_empty_result_has_the_image_size() -> None:
    proposals = SuperpixelProposer(SuperpixelOptions()).propose(sample(24, 31, constant=True))
    assert proposals.masks.shape == (0, 24, 31)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scales", []),
        ("scales", [0]),
        ("spaces", ["cmyk"]),
        ("spaces", []),
        ("merge_space", "xyz"),
        ("sigma", -1.0),
        ("min_size", 0),
        ("min_area", 0),
        ("max_area", 1.5),
        ("max_iou", -0.1),
        ("max_proposals", 0),
        ("max_side", 1),
        ("weights", [1, 1, 1]),
        ("weights", [0, 0, 0, 0, 1]),
        ("min_area", "large"),
    ],
)
def test_wrong_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match="got"):
        build({"name": "superpixels", key: value}, CPU)


def test_unmerged_superpixels_are_disjoint_and_largest_first(scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    proposer = SuperpixelProposer(
        SuperpixelOptions(scales=(50,), merge=False, min_area=1, max_area=1, max_proposals=10_000)
    )
    proposals = proposer.propose(Sample("a", scene[0]))
    assert len(proposals) > 3
    # Together they cover every pixel once.
    assert torch.equal(proposals.masks.sum(0), torch.ones(96, 128, dtype=torch.int64))
    assert proposals.areas.tolist() == sorted(proposals.areas.tolist(), reverse=True)
