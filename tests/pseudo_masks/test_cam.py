"""Class activation maps in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.backbones.base import Backbone
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.cam import CamGenerator, CamOptions, paint_regions
from moduseg.pseudo_masks.labels import make_label_map
from moduseg.structures import Proposals, Sample, TokenMap
from tests.pseudo_masks.contract import CLASSES, NUM_CLASSES, GeneratorContract, halves, sample

CPU = torch.device("cpu")


class ColourBackbone(Backbone):
    """Tokens are mean colours of 4 x 4 patches and their squares; enough to tell the test's classes apart."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._device = device
        self.calls = 0

    @property
    def digest(self) -> str:
        return "colours"

    @property
    def dim(self) -> int:
        return 6

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        self.calls += len(images)
        maps = []
        for image in images:
            h, w = image.shape[:2]
            padded = np.zeros((-(-h // 4) * 4, -(-w // 4) * 4, 3), np.float32)
            padded[:h, :w] = image / 255
            means = torch.from_numpy(padded).view(padded.shape[0] // 4, 4, -1, 4, 3).mean((1, 3)).to(self._device)
            maps.append(TokenMap(torch.cat([means, means**2], -1), 4, (h, w), (h, w)))
        return maps


def world() -> list[Sample]:
    """Pictures with class 2, class 4, both or none."""
    kinds: list[tuple[int, ...]] = [(2,), (4,), (2, 4), ()]
    return [sample((24, 40), kinds[i % 4], "x" * (i + 1)) for i in range(16)]


def fitted(device: torch.device = CPU, **arguments: Any) -> CamGenerator:
    backbone = ColourBackbone(device)
    generator = CamGenerator(CamOptions(**{"ridge": 0.1} | arguments), lambda: backbone, CLASSES)
    generator.load_state(generator.fit(world, NUM_CLASSES))
    return generator


class TestTokens(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device) -> CamGenerator:
        return fitted(device)


class TestRefined(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device) -> CamGenerator:
        return fitted(device, rounds=2)


class TestStretched(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device) -> CamGenerator:
        return fitted(device, scale="minmax")


@pytest.mark.parametrize("arguments", [{}, {"rounds": 1}, {"rounds": 2, "top": 0.5}])
def test_fit_is_deterministic_float32_and_independent_of_the_batch(arguments: dict[str, Any]) -> None:
    states = [
        CamGenerator(CamOptions(fit_batch=batch, **arguments), ColourBackbone, CLASSES).fit(world, NUM_CLASSES)
        for batch in (8, 8, 3)
    ]
    for name, tensor in states[0].items():
        assert tensor.dtype == torch.float32
        assert all(torch.equal(tensor, state[name]) for state in states[1:])
    assert states[0]["weights"].shape == (NUM_CLASSES, 6)
    assert states[0]["mean"].shape == (6,)
    # A class that no image has keeps no weight.
    assert not states[0]["weights"][[0, 2, 4]].any()
    assert states[0]["weights"][[1, 3]].any(1).all()


def test_weights_equal_plain_ridge_regression() -> None:
    state = CamGenerator(CamOptions(ridge=0.5), ColourBackbone, CLASSES).fit(world, NUM_CLASSES)
    maps = ColourBackbone().tokens([item.image for item in world()])
    x = np.stack([m.tokens.flatten(0, 1).mean(0).double().numpy() for m in maps])
    y = np.array([[float(c in (item.labels or ())) for c in range(1, NUM_CLASSES + 1)] for item in world()])
    centred, targets = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred
    damping = 0.5 * np.trace(gram) / 6
    expected = np.linalg.solve(gram + damping * np.eye(6), centred.T @ targets).T
    np.testing.assert_allclose(state["weights"].numpy(), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state["mean"].numpy(), x.mean(0), rtol=1e-5)


def test_passes_over_the_images() -> None:
    backbone = ColourBackbone()
    calls = []

    def samples() -> Iterator[Sample]:
        calls.append(1)
        yield from world()

    CamGenerator(CamOptions(rounds=2), lambda: backbone, CLASSES).fit(samples, NUM_CLASSES)
    assert len(calls) == 3
    assert backbone.calls == 3 * len(world())


def test_one_image_and_equal_images_can_be_fitted() -> None:
    for items in ([sample()], [sample(), sample()]):
        state = CamGenerator(CamOptions(rounds=1), ColourBackbone, CLASSES).fit(lambda items=items: items, NUM_CLASSES)
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_region_scores_make_regions_flat(device: torch.device) -> None:
    # Stretched, so that nothing is cut off and what lies outside the proposals keeps its variety.
    generator = fitted(device, region_scores=True, scale="minmax")
    assert generator.needs_proposals
    item = sample()
    masks = torch.zeros(2, *item.size, dtype=torch.bool)
    masks[0, :, :20] = True
    masks[1, 4:20, :10] = True  # inside the first: the smaller one decides
    maps = generator.generate(item, (2, 4), Proposals(masks))
    for region in (masks[1], masks[0] & ~masks[1]):
        values = maps.scores[:, region]
        torch.testing.assert_close(values, values[:, :1].expand_as(values))
    assert maps.scores[0, 5, 5] > maps.scores[0, 0, 15]
    assert maps.scores[0][:, 20:].unique().numel() > 10
    labels = make_label_map(maps, "constant", 0.5)
    assert (labels[4:20, :10] == 2).all()
    with pytest.raises(DataError, match="no proposals"):
        generator.generate(item, (2,), None)


def test_scales() -> None:
    item = sample()
    best, stretched = (fitted(scale=scale).generate(item, (2, 4), None).scores for scale in ("max", "minmax"))
    for scores in (best, stretched):
        torch.testing.assert_close(scores.amax((1, 2)), torch.ones(2))
    assert (best == 0).float().mean() > 0.2
    assert (stretched == 0).flatten(1).sum(1).max() < 50


def test_alignment_is_that_of_the_patches() -> None:
    """A bright patch lifts the pixels of its own place most."""
    image = np.full((24, 40, 3), 30, np.uint8)
    image[8:12, 20:24, 2] = 240  # patch (2, 5)
    scores = fitted().generate(Sample("spot", image), (2,), halves((24, 40))).scores[0]
    weight = scores / scores.sum()
    centre = (weight.sum(1) @ (torch.arange(24) + 0.5), weight.sum(0) @ (torch.arange(40) + 0.5))
    assert abs(centre[0] - 10) < 0.5
    assert abs(centre[1] - 22) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridge": 0}, "ridge: got 0"),
        ({"rounds": -1}, "rounds: got -1"),
        ({"top": 1.5}, "top: got 1.5"),
        ({"fit_batch": 0}, "fit_batch: got 0"),
        ({"scale": "log"}, "pseudo_masks.generator.scale: got 'log'.*max, minmax"),
        ({"rigde": 1}, "did you mean pseudo_masks.generator.ridge"),
        ({"name": "camm"}, "pseudo_masks.generator.name: got 'camm', expected one of cam, "),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "cam"} | arguments, Device(CPU), ColourBackbone, CLASSES)


def test_bad_input() -> None:
    generator = fitted()
    with pytest.raises(DataError, match=r"labels \[6\], expected 1..5"):
        generator.generate(sample(), (2, 6), None)
    with pytest.raises(DataError, match="no image-level labels"):
        generator.fit(lambda: [Sample("bare", sample().image)], NUM_CLASSES)
    with pytest.raises(DataError, match=r"far: got labels \[7\], expected 1..5"):
        generator.fit(lambda: [Sample("far", sample().image, (7,))], NUM_CLASSES)
    with pytest.raises(DataError, match="no image to fit on"):
        generator.fit(list, NUM_CLASSES)


def test_bad_state() -> None:
    generator = CamGenerator(CamOptions(), ColourBackbone, CLASSES)
    with pytest.raises(ArtefactError, match="not fitted"):
        generator.generate(sample(), (2,), None)
    for state in ({}, {"weights": torch.zeros(3, 6), "mean": torch.zeros(6)}, {"weights": torch.zeros(5, 6)}):
        with pytest.raises(ArtefactError, match=r"expected weights \(5, C\)"):
            generator.load_state(state)
    generator.load_state({"weights": torch.zeros(5, 9), "mean": torch.zeros(9)})
    with pytest.raises(ArtefactError, match="fitted on 9 channels, but the backbone gives 6"):
        generator.generate(sample(), (2,), None)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_regions_are_painted_from_large_to_small(count: int, rng: np.random.Generator, device: torch.device) -> None:
    masks = torch.from_numpy(rng.random((count, 12, 20)) < rng.random((count, 1, 1)))
    masks[count // 2 :] &= torch.arange(240).view(12, 20) < 9  # many areas are equal
    scores, values = torch.rand(3, 12, 20), torch.rand(3, count)
    expected = scores.clone()
    for index in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        expected[:, masks[index]] = values[:, index, None]
    painted = paint_regions(scores.to(device), values.to(device), Proposals(masks).to(device))
    assert torch.equal(painted.cpu(), expected)


@pytest.mark.parametrize(
    ("settings", "num_passes"),
    [
        pytest.param({"name": "cam"}, 1, id="regression"),
        pytest.param({"name": "cam", "rounds": 2}, 3, id="refinement rounds"),
        pytest.param({"name": "cam_neighbours", "rounds": 1}, 3, id="regions of neighbours"),
        pytest.param(
            {"name": "fusion", "first": {"name": "cam"}, "second": {"name": "cam", "rounds": 1}}, 3, id="both"
        ),
        pytest.param({"name": "fusion", "first": {"name": "cam"}, "second": {"name": "ground_truth"}}, 1, id="one"),
    ],
)
def test_passes_of_a_fit_are_known_before(settings: dict[str, Any], num_passes: int) -> None:
    passes: list[int] = []

    def samples() -> Iterator[Sample]:
        passes.append(len(passes))
        return iter(world())

    generator = build(settings, device=Device(CPU), backbone=ColourBackbone, classes=CLASSES)
    generator.fit(samples, NUM_CLASSES, lambda item: halves(item.size))
    assert len(passes) == generator.num_fit_passes == num_passes
