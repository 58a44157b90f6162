"""What every discoverer keeps, on a tiny diffusion model and a random backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg import backbones
from moduseg.config import compose, config_dir
from moduseg.devices import Device
from moduseg.discovery import DISCOVERERS, Discoverer, build
from moduseg.discovery.diffseg import DiffSegDiscoverer
from moduseg.errors import ConfigError
from moduseg.structures import Sample, TokenMap
from tests.support.devices import CPU
from tests.support.tiny_diffusion import share_model, tiny_diffusion

PROPAGATION = {"self_places": ["up3.1"], "self_heads": [1], "iterations": 2, "entropy": 0.1}
NAMES = ("diffseg", "iseg_propagation", "kmeans", "spectral")


def make(name: str, words: tuple[Path, int, int], device: Device = CPU, **options: Any) -> Discoverer:
    model = tiny_diffusion(words) if name in ("diffseg", "iseg_propagation") else {}
    more = PROPAGATION if name == "iseg_propagation" else {}
    merging = {"tau": 0.001, "grid": 8} if model else {}
    discoverer = build({"name": name, **model, **merging, **more, **options}, device)
    if isinstance(discoverer, DiffSegDiscoverer) and device is CPU:
        share_model(discoverer._source)
    return discoverer


def picture(height: int, width: int, seed: int = 0) -> Sample:
    """Two noisy halves of different colours."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (height, width, 3))
    image[:, width // 2 :, 0] += 180
    return Sample("a", image.astype(np.uint8))


def tokens_of(item: Sample, device: Device = CPU) -> TokenMap:
    settings = compose(["backbone=miniature_random"]).backbone
    return backbones.build(settings, device).tokens([item.image])[0]


def test_every_discoverer_is_tested() -> None:
    assert set(NAMES) == set(DISCOVERERS)


@pytest.mark.parametrize("size", [pytest.param((40, 56), id="40 x 56"), pytest.param((33, 17), id="odd")])
@pytest.mark.parametrize("name", NAMES)
def test_segments_cover_the_image(
    name: str, size: tuple[int, int], device: torch.device, words: tuple[Path, int, int]
) -> None:
    where = CPU if device.type == "cpu" else Device(device)
    item, discoverer = picture(*size), make(name, words, where)
    tokens = tokens_of(item, where)
    segments = discoverer.find_segments(item, tokens)
    assert (tuple(segments.shape), segments.dtype, segments.device.type) == (size, torch.int64, device.type)
    assert segments.min() >= 0
    assert 1 < len(segments.unique()) <= 255
    assert torch.equal(segments, make(name, words, where).find_segments(item, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_of_one_colour_is_segmented(name: str, words: tuple[Path, int, int]) -> None:
    item = Sample("a", np.full((24, 24, 3), 128, np.uint8))
    segments = make(name, words).find_segments(item, tokens_of(item))
    assert tuple(segments.shape) == (24, 24)
    tokens = tokens_of(item)
    flat = TokenMap(torch.ones_like(tokens.tokens), tokens.stride, tokens.image_size, tokens.input_size)
    if name in ("kmeans", "spectral"):
        assert len(make(name, words).find_segments(item, flat).unique()) <= (1 if name == "kmeans" else 12)


def test_clusters_follow_the_tokens(words: tuple[Path, int, int]) -> None:
    """Two kinds of tokens are two segments, for k-means with two clusters and for the largest gap."""
    grid = torch.zeros(4, 6, 8)
    grid[:, :3, 0], grid[:, 3:, 1] = 1, 1
    grid += 0.01 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
    tokens = TokenMap(grid, 8, (32, 48), (32, 48))
    halves = (torch.arange(48) >= 24).expand(32, 48)
    for discoverer in (make("kmeans", words, num_clusters=2), make("spectral", words)):
        segments = discoverer.find_segments(picture(32, 48), tokens)
        assert len(segments.unique()) == 2
        assert torch.equal(segments == segments[0, -1], halves)


def test_no_iteration_leaves_the_segments_of_diffseg(words: tuple[Path, int, int]) -> None:
    item = picture(40, 56)
    tokens = tokens_of(item)
    plain = make("diffseg", words).find_segments(item, tokens)
    assert torch.equal(make("iseg_propagation", words, iterations=0).find_segments(item, tokens), plain)
    assert not torch.equal(make("iseg_propagation", words, iterations=3).find_segments(item, tokens), plain)


@pytest.mark.parametrize(("name", "options", "message"), [
    pytest.param("kmeans", {"num_clusters": 0}, "num_clusters: got 0, expected 1 to 64", id="clusters"),
    pytest.param("spectral", {"max_clusters": 1}, "max_clusters: got 1, expected 2 to 64", id="at most"),
    pytest.param("spectral", {"temperature": 0}, "temperature: got 0.0, expected more than 0", id="temperature"),
    pytest.param("diffseg", {"grid": 17}, "grid: got 17, expected 1 to 16", id="grid"),
    pytest.param("diffseg", {"tau": -1}, "tau: got -1.0, expected 0 or more", id="tau"),
    pytest.param("diffseg", {"rounds": 0}, "rounds: got 0, expected 1 or more", id="rounds"),
    pytest.param("diffseg", {"sides": []}, "sides: got none, expected one or more", id="sides"),
    pytest.param("diffseg", {"steps": [-1]}, r"steps: got \[-1\], expected one or more from 0 on", id="steps"),
    pytest.param("iseg_propagation", {"iterations": -1}, "iterations: got -1, expected 0 or more", id="iterations"),
    pytest.param("iseg_propagation", {"logarithm": "two"}, "logarithm: got 'two' .*expected one of", id="logarithm"),
    pytest.param("iseg_propagation", {"self_places": []}, "self_places: got none, expected one layer", id="places"),
])  # fmt: skip
def test_bad_settings(name: str, options: dict[str, Any], message: str, words: tuple[Path, int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"^discoverer(: |\.){message}"):
        make(name, words, **options)


def test_layers_that_the_model_lacks_are_named(words: tuple[Path, int, int]) -> None:
    item = picture(16, 16)
    for options in ({"sides": [5]}, {"self_places": ["up9.0"]}):
        discoverer = make("iseg_propagation", words, **options)
        with pytest.raises(
            ConfigError, match=r"^discoverer\.sides, self_places: got (side 5|place 'up9\.0'), expected"
        ):
            discoverer.find_segments(item, tokens_of(item))


def test_every_preset_is_a_discoverer() -> None:
    for path in sorted((config_dir() / "discoverer").glob("*.yaml")):
        cfg = compose([f"discoverer={path.stem}"])
        assert cfg.discoverer is not None
        build(cfg.discoverer, CPU)
    published = compose(["discoverer=diffseg"]).discoverer
    assert published is not None
    assert (published["steps"], published["grid"], published["tau"], published["rounds"]) == ([300], 16, 1.1, 3)
