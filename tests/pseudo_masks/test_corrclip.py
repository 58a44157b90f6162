"""CorrCLIP as a generator: regions from proposals, windows, affinity models, on random two-block models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moduseg.backbones.base import Backbone
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.corrclip import CorrClipGenerator, CorrClipOptions
from moduseg.structures import Proposals, TokenMap
from tests.backbones.test_clip import tiny_config
from tests.pseudo_masks.contract import CLASSES, NAMES, GeneratorContract, halves, sample
from tests.support.devices import CPU

TINY_VIT = {"img_size": 24, "patch_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
AFFINITY = {"name": "timm", "model": "vit_tiny_patch16_224", "model_kwargs": TINY_VIT, "facet": "qk"}
Make = Callable[..., CorrClipGenerator]


def no_backbone() -> Backbone:
    raise LookupError("the run's backbone was asked for")


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    """A generator on a random two-block CLIP, patch 4, with affinities of a random ViT, patch 3."""

    def inner(device: torch.device = CPU.torch_device, **options: Any) -> CorrClipGenerator:
        classes, backbone = options.pop("classes", NAMES), options.pop("backbone", no_backbone)
        settings: dict[str, Any] = {
            "weights": "random",
            "config": tiny_config(words[1], words[2]),
            "tokenizer": str(words[0]),
            "affinity": AFFINITY,
            "templates": ["a {}"],
            "background_words": ["grass", "sky"],
            "window": None,
            "logit_scale": 5.0,
            **options,
        }
        return CorrClipGenerator(CorrClipOptions(**settings), Device(device), backbone, classes)

    return inner


def quarters(size: tuple[int, int]) -> Proposals:
    """What the pictures of `sample` show."""
    masks = torch.zeros(3, *size, dtype=torch.bool)
    quarter = size[1] // 4
    masks[0, :, :quarter] = masks[1, :, size[1] - quarter :] = masks[2, :, quarter : size[1] - quarter] = True
    return Proposals(masks)


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> CorrClipGenerator:
        """Random weights know no words: each is given the mean feature of what it stands for in the picture."""
        generator = make(device, classes=CLASSES, logit_scale=60.0, background_words=["grass"], merge_eps=0.0)
        item = sample(name="24-2")
        assert item.semantic is not None
        # The contract's halves hold two labels each; the truth's regions are what a proposer would give.
        regions = generator._find_regions
        monkeypatch.setattr(generator, "_find_regions", lambda s, p: regions(s, quarters(s.size)))
        ids = [generator._find_regions(item, None)]
        tokens = generator._encode([item.image], ids)[0].tokens  # type: ignore[arg-type]
        truth = torch.from_numpy(item.semantic)[1::3, 1::3].to(device)
        tokens = tokens[: truth.shape[0], : truth.shape[1]]
        means = [tokens[truth == label].mean(0) if label in (0, 2, 4) else -tokens.mean((0, 1)) for label in range(6)]
        generator.__dict__["_texts"] = F.normalize(torch.stack(means), dim=1), list(range(6))
        return generator


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (19, 33), (5, 3), (1, 1), (1, 40)])
@pytest.mark.parametrize("window", [None, 16])
def test_every_size_and_every_kind_of_proposals(make: Make, size: tuple[int, int], window: int | None) -> None:
    generator = make(window=window, stride=8)
    item = sample(size)
    pixel = torch.zeros(1, *size, dtype=torch.bool)
    pixel[0, -1, -1] = True
    none, whole = torch.zeros(0, *size, dtype=torch.bool), torch.ones(1, *size, dtype=torch.bool)
    scores = []
    for proposals in (None, Proposals(none), Proposals(whole), Proposals(pixel), halves(size)):
        maps = generator.generate(item, (2, 4), proposals)
        assert maps.scores.shape == (2, *size)
        assert maps.background is not None
        everything = torch.cat([maps.scores, maps.background[None]])
        assert everything.isfinite().all()
        assert not everything.is_inference()
        assert ((everything.sum(0) > 0.5) & (everything.sum(0) < 1)).all()
        scores.append(maps.scores)
    assert torch.equal(scores[0], scores[1])
    if min(size) > 16:
        assert not torch.allclose(scores[1], scores[2], atol=1e-4)


def test_one_window_is_the_whole_image(make: Make) -> None:
    item, proposals = sample((19, 33)), halves((19, 33))
    whole = make().generate(item, (2, 4), proposals).scores
    assert torch.equal(make(window=40, stride=8).generate(item, (2, 4), proposals).scores, whole)
    assert not torch.equal(make(window=16, stride=8).generate(item, (2, 4), proposals).scores, whole)


def test_windows_are_averaged_and_see_their_own_regions(make: Make) -> None:
    generator = make(window=16, stride=8)
    texts, image = generator._texts[0], sample((16, 24)).image
    ids = torch.arange(24).expand(16, -1) // 6
    ours = generator._compare(image, texts, ids)
    left, right = (make()._compare(image[:, a : a + 16], texts, ids[:, a : a + 16]) for a in (0, 8))
    torch.testing.assert_close(ours[:, :, :8], left[:, :, :8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, :, 8:16], (left[:, :, 8:] + right[:, :, :8]) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, :, 16:], right[:, :, 8:], atol=1e-5, rtol=1e-4)


def test_average_of_a_constant_is_that_constant(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make(window=14, stride=5)
    direction = F.normalize(torch.arange(1.0, 25.0), dim=0)

    def constant(images: list[np.ndarray], proxies: list[TokenMap], regions: list[torch.Tensor]) -> list[TokenMap]:
        assert [r.shape for r in regions] == [i.shape[:2] for i in images]
        return [TokenMap(direction.expand(*p.tokens.shape[:2], -1), 3, p.image_size, p.input_size) for p in proxies]

    monkeypatch.setattr(generator._encoder, "encode", constant)
    texts = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = (texts @ direction)[:, None, None].expand(3, 19, 33)
    ids = torch.full((19, 33), -1)
    torch.testing.assert_close(generator._compare(sample((19, 33)).image, texts, ids), expected)


def test_short_side_resizes_image_and_regions(make: Make) -> None:
    item, size = sample((40, 60)), (40, 60)
    maps = make(short_side=20, window=16, stride=8).generate(item, (2, 4), halves(size))
    assert maps.scores.shape == (2, *size)


def test_only_good_and_large_proposals_are_regions(make: Make) -> None:
    item = sample()
    masks = halves(item.size).masks.clone()
    masks[1, :, 21:] = False
    scored = Proposals(masks, torch.tensor([0.4, 0.9]))
    assert make()._find_regions(item, scored).unique().tolist() == [-1, 0]  # type: ignore[union-attr]
    assert (make()._find_regions(item, scored) == 0).sum() == 24  # type: ignore[union-attr]
    assert make(min_score=0.0)._find_regions(item, scored).unique().tolist() == [-1, 0, 1]  # type: ignore[union-attr]
    large = make(min_score=0.0, min_area=100)._find_regions(item, scored)
    assert (large == 0).sum() == 24 * 20  # type: ignore[union-attr]


def test_branches_and_merging_change_the_scores(make: Make) -> None:
    item, proposals = sample(), quarters((24, 40))
    changes: list[dict[str, Any]] = [
        {},
        {"spatial": 0.0},
        {"semantic": 0.0},
        {"temperature": 1.0},
        {"merge_eps": 2.0},
        {"affinity": {**AFFINITY, "facet": "tokens"}},
    ]
    scores = [make(**c).generate(item, (2, 4), proposals).scores for c in changes]
    for i, first in enumerate(scores):
        for second in scores[:i]:
            # With two blocks the spatial branch repeats the main one: 2 main + semantic against main + semantic.
            assert (first - second).abs().max() > 1e-6


def test_the_runs_backbone_serves_where_no_affinity_is_named(make: Make) -> None:
    calls = []

    def backbone() -> Backbone:
        calls.append(1)
        return build_affinity()

    item, proposals = sample(), halves((24, 40))
    default = make(affinity=None, backbone=backbone)
    named = make()
    assert torch.equal(default.generate(item, (2, 4), proposals).scores, named.generate(item, (2, 4), proposals).scores)
    assert len(calls) == 1
    assert default.digest == named.digest
    assert default.digest.endswith("+random-0")


def test_half_precision_is_close(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    item, proposals = sample(), halves((24, 40))
    full = make().generate(item, (2, 4), proposals).scores
    generator = make()
    half = Device(torch.device("cpu"), "bfloat16")
    monkeypatch.setattr(generator._source, "device", half)
    scores = generator.generate(item, (2, 4), proposals).scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, full)
    torch.testing.assert_close(scores, full, atol=0.02, rtol=0.05)


def build_affinity() -> Backbone:
    from moduseg.backbones import build as build_backbone

    return build_backbone(AFFINITY, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": {"name": "vit"}}, r"pseudo_masks\.generator\.affinity\.name: got 'vit', expected one of"),
        ({"affinity": {**AFFINITY, "face": "qk"}}, r"affinity\.face: unknown key.*did you mean .*facet"),
        ({"affinity": {**AFFINITY, "facet": "keys"}}, r"affinity\.facet: got 'keys'"),
        ({"temperature": 0.0}, r"temperature: got 0\.0"),
        ({"semantic": -1.0}, r"semantic: got -1\.0"),
        ({"spatial_blocks": [3, 1]}, r"spatial_blocks: got \[3, 1\], expected \[first, last\]"),
        ({"merge_eps": -0.1}, r"merge_eps: got -0\.1"),
        ({"min_score": 2.0}, r"min_score: got 2\.0"),
        ({"min_area": -1}, r"min_area: got -1"),
        ({"region_order": "size"}, r"region_order: got 'size'"),
        ({"stride": 400}, r"stride: got 400"),
        ({"variant": "plain"}, r"variant: unknown key"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "corrclip", "affinity": AFFINITY, **options}, CPU, no_backbone, NAMES)


def test_missing_weights_name_the_key() -> None:
    generator = CorrClipGenerator(CorrClipOptions(weights="./nowhere", affinity=AFFINITY), CPU, no_backbone, NAMES)
    with pytest.raises(MissingError, match=r"^pseudo_masks\.generator\.weights: got '\./nowhere'"):
        generator.generate(sample(), (2, 4), None)
