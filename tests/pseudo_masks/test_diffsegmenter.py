"""DiffSegmenter as a generator, on a tiny diffusion model with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.diffusion.layers import MapRequest
from moduseg.diffusion.prompts import write_prompt
from moduseg.errors import ConfigError, DataError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.diffsegmenter import DiffSegmenterGenerator
from moduseg.pseudo_masks.diffsegmenter_maps import merge_sizes
from moduseg.pseudo_masks.diffusion_maps import select_columns, stretch, to_pixels
from moduseg.structures import Sample, ScoreMaps
from tests.pseudo_masks.contract import CLASSES, GeneratorContract, sample
from tests.pseudo_masks.test_given_masks import no_backbone
from tests.support.devices import CPU
from tests.support.scripted_attention import follow_truth
from tests.support.tiny_diffusion import share_model, tiny_diffusion

Make = Callable[..., DiffSegmenterGenerator]
SETTINGS: dict[str, Any] = {
    "name": "diffsegmenter",
    "cross": [{"weight": 0.3, "side": 2}, {"weight": 0.5, "side": 4}, {"weight": 0.2, "side": 16}],
    "completion": [16],
}


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    def inner(device: torch.device = CPU.torch_device, **options: Any) -> DiffSegmenterGenerator:
        cfg = {**tiny_diffusion(words), **SETTINGS, **options}
        generator = build(cfg, Device(device), no_backbone, CLASSES)
        assert isinstance(generator, DiffSegmenterGenerator)
        share_model(generator._source)
        return generator

    return inner


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, make: Make, device: torch.device, request: pytest.FixtureRequest) -> DiffSegmenterGenerator:
        generator = make(device)
        if request.node.originalname == "test_labels_come_out_right":
            follow_truth(generator._source, sample(name="24-2"))
        return generator


def score(generator: DiffSegmenterGenerator, labels: tuple[int, ...] = (2, 4), item: Sample | None = None) -> ScoreMaps:
    return generator.generate(item or sample(), labels)


def test_steps_of_the_method_one_by_one(make: Make) -> None:
    """One class at a time, against its own steps put together here."""
    generator = make(noise_seeds=[5], num_pluses=1)
    item, source = sample(), generator._source
    requests = [
        *(MapRequest(kind="cross", side=side) for side in (2, 4, 16)),
        MapRequest(kind="self", side=16),
    ]
    latents = source.encode_images([item.image], 5)
    expected = []
    for name in ("class 2", "class 4"):
        encoded = source.encode_prompts([write_prompt({name: name}, num_pluses=1)])
        maps = source.collect(latents, encoded.states, requests, noise_seeds=[5]).maps
        columns = [select_columns(level[0], encoded.tokens[0].spans) for level in maps[:3]]
        completed = maps[3][0] @ merge_sizes(columns, [0.3, 0.5, 0.2])
        expected.append(stretch(to_pixels(completed, item.size), (1, 2))[0])
    torch.testing.assert_close(score(generator).scores, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_classes_do_not_depend_on_each_other(make: Make) -> None:
    together = score(make(batch_size=2), (2, 4, 5)).scores
    for row, label in enumerate((2, 4, 5)):
        torch.testing.assert_close(together[row], score(make(), (label,)).scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [
    pytest.param({"num_pluses": 0}, id="weight of the words"),
    pytest.param({"column_tokens": "last"}, id="columns"),
    pytest.param({"head_words": "all"}, id="the last word alone"),
    pytest.param({"size_weights": False}, id="size weights"),
    pytest.param({"completion": []}, id="no completion"),
    pytest.param({"completion": [2, 4, 8, 16]}, id="completion of all sizes"),
    pytest.param({"one_pass": True}, id="one pass"),
    pytest.param({"renormalise": True}, id="content tokens"),
    pytest.param({"steps": [300]}, id="time step"),
    pytest.param({"latent": "mean"}, id="latent"),
    pytest.param({"noise_seeds": [9]}, id="noise"),
    pytest.param({"class_words": {"class 2": "disc"}}, id="words"),
    pytest.param({"template": "a drawing of {}"}, id="template"),
])  # fmt: skip
def test_every_setting_matters(options: dict[str, Any], make: Make) -> None:
    assert not torch.allclose(score(make(**options)).scores, score(make()).scores, atol=1e-4)


def test_no_batch_changes_the_scores(make: Make) -> None:
    first, second = (score(make(batch_size=size), (1, 2, 4)).scores for size in (1, 3))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_steps_and_seeds_are_averaged_before_they_are_stretched(make: Make) -> None:
    item = sample((16, 16))
    passes = []
    for seed in (1, 2):
        for step in (50, 300):
            generator = make(steps=[step], noise_seeds=[seed])
            ((latents, _, _),) = generator._draw_latents(item)
            prompt = generator._write(item, {"class 2": "class 2"})
            passes.append(generator._read(latents, [prompt], step, seed).completed)
    expected = stretch(to_pixels(torch.stack(passes).mean(0), (16, 16)), (1, 2))
    both = make(steps=[50, 300], noise_seeds=[1, 2])
    torch.testing.assert_close(score(both, (2,), item).scores, expected)


def test_captions_continue_the_prompt(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"a": {"class 2": "on grass", "class 4": ""}}))
    generator = make(captioner={"name": "file", "path": str(file)})
    assert generator._write(sample(), {"class 2": "class 2"}).text == "a photograph of class 2 on grass"
    with_captions, without = score(generator).scores, score(make()).scores
    assert not torch.allclose(with_captions[0], without[0], atol=1e-4)
    torch.testing.assert_close(with_captions[1], without[1], atol=1e-4, rtol=1e-4)
    assert generator.digest != make().digest
    with pytest.raises(DataError, match=r"^b: caption: got none for 'class 2'"):
        score(generator, (2,), sample(name="b"))


def test_a_caption_that_is_too_long_is_cut_off(make: Make, tmp_path: Path) -> None:
    scores = []
    for num_words in (40, 400):
        file = tmp_path / f"{num_words}.json"
        file.write_text(json.dumps({"a": {"class 2": "a " * num_words}}))
        scores.append(score(make(captioner={"name": "file", "path": str(file)}), (2,)).scores)
    assert torch.equal(*scores)


def test_cut_off_words_name_image_and_class(make: Make) -> None:
    with pytest.raises(DataError, match=r"^a: prompt: the words '.*' of 'class 1' are cut off"):
        score(make(class_words={"class 1": "a " * 40}), (1, 5))


def test_one_pass_names_all_classes(make: Make) -> None:
    generator = make(one_pass=True)
    words = {"class 2": "class 2", "class 4": "class 4"}
    assert generator._write(sample(), words).text == "a photograph of class 2 and class 4"
    assert score(generator).class_ids == (2, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 300)])
def test_any_size(size: tuple[int, int], make: Make) -> None:
    item = Sample("a", np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8), (2, 4))
    scores = score(make(), item=item).scores
    assert scores.shape == (2, *size)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"num_pluses": -1}, "num_pluses: got -1", id="pluses"),
    pytest.param({"column_tokens": "first"}, "column_tokens: got 'first'", id="columns"),
    pytest.param({"batch_size": 0}, "batch_size: got 0", id="batch"),
    pytest.param({"captioner": {"name": "file"}}, "captioner: path: got none", id="captions without a file"),
    pytest.param({"captioner": {"nme": "file"}}, "captioner.nme: unknown key", id="a key of the captioner"),
    pytest.param({"entropy": 0.1}, "entropy: unknown key", id="a key of iSeg"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=rf"^pseudo_masks\.generator.*{message}"):
        make(**options)


def test_what_the_model_lacks_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^pseudo_masks\.generator\.cross, completion: got side 64, expected one of"):
        score(make(completion=[64]))


@pytest.mark.parametrize(("preset", "head_words", "column_tokens"), [
    pytest.param("diffsegmenter_voc", (), "all", id="VOC"),
    pytest.param("diffsegmenter_coco", ("person", "potted plant"), "last", id="COCO"),
    pytest.param("diffsegmenter_context", ("person", "potted plant"), "last", id="Context"),
])  # fmt: skip
def test_presets_are_the_published_settings(preset: str, head_words: tuple[str, ...], column_tokens: str) -> None:
    cfg = compose([f"pseudo_masks={preset}"]).pseudo_masks
    generator = build(cfg.generator, CPU, no_backbone, ("background", "person", "potted plant"))
    assert isinstance(generator, DiffSegmenterGenerator)
    options = generator._options
    assert [level.weight for level in options.cross] == [0.3, 0.5, 0.1, 0.1]
    assert [level.side for level in options.cross] == [8, 16, 32, 64]
    assert (options.completion, options.num_pluses, options.latent) == ((64,), 2, "sample")
    assert (options.captioner.name, options.captioner.weights) == ("blip", "Salesforce/blip-image-captioning-large")
    assert (generator._head_words, options.column_tokens) == (head_words, column_tokens)
