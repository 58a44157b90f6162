"""iSeg as a generator, on a tiny diffusion model with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError, DataError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.diffusion_maps import select_columns, stretch, to_pixels
from moduseg.pseudo_masks.iseg import ISegGenerator
from moduseg.pseudo_masks.iseg_maps import merge_levels, propagate, reduce_entropy, shift_to_zero
from moduseg.structures import Sample, ScoreMaps
from tests.pseudo_masks.contract import CLASSES, GeneratorContract, sample
from tests.pseudo_masks.test_given_masks import no_backbone
from tests.support.devices import CPU
from tests.support.scripted_attention import follow_truth
from tests.support.tiny_diffusion import share_model, tiny_diffusion

Make = Callable[..., ISegGenerator]
SETTINGS: dict[str, Any] = {
    "name": "iseg",
    "closing": " and background",
    "background_words": ["grass"],
    "cross": [{"weight": 0.7, "side": 4}, {"weight": 0.3, "places": ["down1.0", "up2.1"]}],
    "self_places": ["up3.1"],
    "self_heads": [1],
    "cluster_stride": 3,
    "cluster_rounds": 4,
    "iterations": 3,
    "output_side": 32,
}


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    def inner(device: torch.device = CPU.torch_device, **options: Any) -> ISegGenerator:
        cfg = {**tiny_diffusion(words), **SETTINGS, **options}
        generator = build(cfg, Device(device), no_backbone, CLASSES)
        assert isinstance(generator, ISegGenerator)
        share_model(generator._source)
        return generator

    return inner


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, make: Make, device: torch.device, request: pytest.FixtureRequest) -> ISegGenerator:
        generator = make(device, output_side=64)
        if request.node.originalname == "test_labels_come_out_right":
            follow_truth(generator._source, sample(name="24-2"))
        return generator


def score(generator: ISegGenerator, item: Sample | None = None, labels: tuple[int, ...] = (2, 4)) -> ScoreMaps:
    return generator.generate(item or sample(), labels)


def test_steps_of_the_method_one_by_one(make: Make) -> None:
    """The generator against its own steps put together here, without clusters."""
    generator = make(cluster_stride=None, gain=1.3)
    item, source = sample(), generator._source
    from moduseg.diffusion.layers import MapRequest
    from moduseg.diffusion.prompts import write_prompt

    prompt = write_prompt({"class 2": "class 2", "class 4": "class 4"}, suffix=" and background, grass")
    encoded = source.encode_prompts([prompt], gain=1.3)
    requests = [
        MapRequest(kind="cross", side=4),
        MapRequest(kind="cross", places=("down1.0", "up2.1")),
        MapRequest(kind="self", places=("up3.1",), heads=(1,)),
    ]
    latents = source.encode_images([item.image])
    small, large, connections = (
        m[0] for m in source.collect(latents, encoded.states, requests, noise_seeds=[1101]).maps
    )
    seen = select_columns(merge_levels([small, large], [0.7, 0.3], 16), encoded.tokens[0].spans)
    maps = propagate(shift_to_zero(seen), reduce_entropy(connections, 0.015), 3)
    square = stretch(to_pixels(maps, (32, 32)), (1, 2))
    expected = torch.nn.functional.interpolate(square[None], item.size, mode="bilinear")[0]
    torch.testing.assert_close(score(generator, item).scores, expected)


@pytest.mark.parametrize("options", [
    pytest.param({"gain": 1.0}, id="category enhancement"),
    pytest.param({"cluster_stride": None}, id="clusters"),
    pytest.param({"cluster_rounds": 1}, id="rounds"),
    pytest.param({"entropy": 0.0}, id="entropy"),
    pytest.param({"logarithm": "natural"}, id="logarithm"),
    pytest.param({"iterations": 0}, id="iterations"),
    pytest.param({"self_heads": None}, id="heads of the self-attention"),
    pytest.param({"self_places": ["up3.0"]}, id="self layer"),
    pytest.param({"cross": [{"weight": 1.0, "side": 4}]}, id="levels"),
    pytest.param({"cross": [{"weight": 1.0, "side": 4, "heads": [0, 3]}]}, id="heads of a level"),
    pytest.param({"background_words": "none"}, id="background words"),
    pytest.param({"background_separator": ""}, id="separator"),
    pytest.param({"class_words": {"class 2": "disc"}}, id="words"),
    pytest.param({"head_words": "all"}, id="the last word alone"),
    pytest.param({"steps": [300]}, id="time step"),
    pytest.param({"noise_seeds": [1]}, id="noise"),
    pytest.param({"renormalise": True}, id="content tokens"),
    pytest.param({"latent": "sample"}, id="latent"),
    pytest.param({"image_side": 64, "self_places": ["up3.0"]}, id="side"),
])  # fmt: skip
def test_every_setting_matters(options: dict[str, Any], make: Make) -> None:
    assert not torch.allclose(score(make(**options)).scores, score(make()).scores, atol=1e-4)


def test_several_steps_and_seeds_are_averaged(make: Make) -> None:
    settings = {"output_side": 16, "iterations": 1}
    both = make(steps=[50, 300], noise_seeds=[1, 2], **settings)
    singles = [make(steps=[step], noise_seeds=[seed], **settings) for seed in (1, 2) for step in (50, 300)]
    item = sample((16, 16))
    maps = []
    for generator in singles:
        ((latents, step, seed),) = generator._draw_latents(item)
        words = {"class 2": "class 2"}
        from moduseg.diffusion.prompts import write_prompt

        encoded = generator._source.encode_prompts([write_prompt(words, suffix=generator._suffix)], gain=1.6)
        maps.append(generator._refine(latents, encoded, step, seed).completed)
    expected = stretch(to_pixels(torch.stack(maps).mean(0), (16, 16)), (1, 2))
    torch.testing.assert_close(score(both, item, (2,)).scores, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 300)])
def test_any_size(size: tuple[int, int], make: Make) -> None:
    item = Sample("a", np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8), (2, 4))
    scores = score(make(), item).scores
    assert scores.shape == (2, *size)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_cut_off_words_name_image_and_class(make: Make) -> None:
    with pytest.raises(DataError, match=r"^a: prompt: the words '.*' of 'class 5' are cut off"):
        score(make(class_words={"class 1": "a " * 17}), labels=(1, 5))


def test_a_label_that_is_no_class_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match=r"^a: got labels \[9\], expected 1\.\.5"):
        score(make(), labels=(2, 9))


def test_what_the_model_lacks_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^pseudo_masks\.generator\.cross, self_places: got place 'up7\.0'"):
        score(make(self_places=["up7.0"]))


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"cross": []}, "cross: got no level", id="no level"),
    pytest.param({"cross": [{"weight": -1.0, "side": 4}]}, r"weight: got -1\.0", id="a negative weight"),
    pytest.param({"gain": 0.0}, r"gain: got 0\.0", id="gain"),
    pytest.param({"cluster_stride": 0}, "cluster_stride: got 0", id="stride"),
    pytest.param({"cluster_rounds": 0}, "cluster_rounds: got 0", id="rounds"),
    pytest.param({"self_places": []}, "self_places: got none", id="no layer"),
    pytest.param({"entropy": -0.1}, r"entropy: got -0\.1", id="entropy"),
    pytest.param({"logarithm": "log2"}, "logarithm: got 'log2'", id="logarithm"),
    pytest.param({"iterations": -1}, "iterations: got -1", id="iterations"),
    pytest.param({"output_side": 0}, "output_side: got 0", id="output side"),
    pytest.param({"steps": []}, r"steps: got \[\]", id="no step"),
    pytest.param({"noise_seeds": [-1]}, r"noise_seeds: got \[-1\]", id="a seed"),
    pytest.param({"template": "no place"}, "template: got 'no place'", id="template"),
    pytest.param({"background_words": "sea"}, "background_words: got 'sea'", id="background words"),
    pytest.param({"class_words": "nope"}, "class_words: got 'nope'", id="class words"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=rf"^pseudo_masks\.generator.*{message}"):
        make(**options)


def test_fusion_takes_it(make: Make, words: tuple[Path, int, int]) -> None:
    first = {**tiny_diffusion(words), **SETTINGS}
    cfg = {"name": "fusion", "first": first, "second": {"name": "ground_truth"}, "rule": "power", "value": 2.0}
    maps = build(cfg, CPU, no_backbone, CLASSES).generate(sample(), (2, 4), None)
    assert maps.background is not None
    torch.testing.assert_close(maps.scores.sum(0) + maps.background, torch.ones(24, 40))


@pytest.mark.parametrize(("preset", "entropy", "iterations", "rule", "num_background"), [
    pytest.param("iseg_voc", 0.015, 10, "power", 9, id="VOC"),
    pytest.param("iseg_coco", 0.1, 10, "constant", 12, id="COCO"),
    pytest.param("iseg_context", 0.002, 5, "power", 0, id="Context"),
    pytest.param("iseg_object", 0.2, 10, "constant", 12, id="Object"),
])  # fmt: skip
def test_presets_are_the_published_settings(
    preset: str, entropy: float, iterations: int, rule: str, num_background: int
) -> None:
    cfg = compose([f"pseudo_masks={preset}"]).pseudo_masks
    generator = build(cfg.generator, CPU, no_backbone, ("background", "person", "potted plant"))
    assert isinstance(generator, ISegGenerator)
    options = generator._options
    assert (options.entropy, options.iterations, cfg.background.rule) == (entropy, iterations, rule)
    assert (options.gain, options.latent, options.steps, options.noise_seeds) == (1.6, "mean", (100,), (1101,))
    assert len(generator._suffix.split(",")) - 1 == num_background
    assert generator._suffix.startswith(" and other object and background")
    assert generator._class_words == ("people", "potted plant")
