"""The miniature latent diffusion model: shipped weights, what words point at, and its trainings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moduseg.config.files import compose_hydra
from moduseg.errors import ConfigError, MissingError
from moduseg.miniature.models.clip import MAX_TOKENS
from moduseg.miniature.models.diffusion import (
    DiffusionParts,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
    load_diffusion,
)
from moduseg.miniature.models.weights import weights_path
from moduseg.miniature.training.captions import write_prompt
from moduseg.miniature.training.fit_autoencoder import fit_decoder, fit_encoder
from moduseg.miniature.training.loop import TrainingLoop
from moduseg.miniature.training.pointing import (
    PointingCheck,
    PointingQuestion,
    make_questions,
    measure_pointing,
)
from moduseg.miniature.training.quality import quality_scenes
from moduseg.miniature.training.train_autoencoder import AutoencoderTraining
from moduseg.miniature.training.train_diffusion import (
    DiffusionTraining,
    WordContrast,
    held_classes,
    train_diffusion,
)
from moduseg.miniature.training.train_words import TokenLabels, WordTraining, tokenize
from moduseg.miniature.world.scenes import CLASSES, HUES, QUALITY_SEED, render_scene

PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
POINTING_FLOOR = 70.0
"""Percent that the shipped weights reach on a few scenes."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_diffusion(weights_path("diffusion"))


@pytest.fixture(scope="module")
def parts(pipeline: Any) -> DiffusionParts:
    return DiffusionParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_text_encoder()[1]


# Shipped weights


@pytest.mark.parametrize("name", PARTS)
def test_shipped_folder_loads_as_a_pipeline(pipeline: Any, name: str) -> None:
    stored = load_file(weights_path("diffusion") / PARTS[name])
    module = getattr(pipeline, name)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    assert module.dtype == torch.float32
    loaded = module.state_dict()
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[key], tensor.to(loaded[key])) for key, tensor in stored.items())


def test_shipped_words_point_at_their_objects(pipeline: Any, parts: DiffusionParts) -> None:
    check = PointingCheck(quality_scenes("test", 16), parts)
    assert check(pipeline.unet) >= POINTING_FLOOR
    torch.manual_seed(0)
    assert check(build_unet()) < 30.0


def test_missing_diffusers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingError, match=r"got no diffusers, .*; try `pip install 'moduseg\[diffusion\]'`"):
        load_diffusion(weights_path("diffusion"))


# Pointing


def test_spans_hold_the_words_of_a_class(tokenizer: Any) -> None:
    scenes = quality_scenes("val", 5)
    for question, scene in zip(make_questions(scenes, tokenizer), scenes, strict=True):
        words = tokenizer.convert_ids_to_tokens(question.tokens.tolist())
        spelt = {number: " ".join(words[i] for i in span) for number, span in question.spans.items()}
        assert spelt == {number: CLASSES[number].replace(" ", "</w> ") + "</w>" for number in scene.labels}


@pytest.mark.parametrize(("peak", "expected"), [
    pytest.param((2, 2), 100.0, id="on an object of the class"),
    pytest.param((2, 13), 0.0, id="on an object of another class"),
    pytest.param((13, 2), 0.0, id="on the background"),
])  # fmt: skip
def test_a_map_points_where_its_maximum_is(peak: tuple[int, int], expected: float) -> None:
    semantic = np.zeros((128, 128), np.uint8)
    semantic[8:40, 8:40], semantic[8:40, 96:] = 4, 5
    question = PointingQuestion(np.zeros((128, 128, 3), np.uint8), semantic, torch.zeros(MAX_TOKENS), {4: [5, 6]})
    values = torch.zeros(16, 16)
    values[peak] = 1.0
    assert measure_pointing([{4: values}], [question]) == expected


# Trainings


def test_encoder_keeps_what_principal_components_keep() -> None:
    crops = np.stack([render_scene(QUALITY_SEED, "train", i).image[:96, :96] for i in range(60)])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    torch.manual_seed(0)
    model = build_autoencoder().eval()
    fit_encoder(model, pixels)
    fit_decoder(model, pixels)
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
        painted = model.decode(latents).sample
    cells = torch.nn.functional.pixel_unshuffle(pixels, 8).transpose(0, 1).flatten(1).T
    rows = torch.cat([latents.transpose(0, 1).flatten(1).T, torch.ones(len(cells), 1)], dim=1)
    restored = rows @ torch.linalg.lstsq(rows, cells).solution
    values = torch.linalg.svdvals(cells - cells.mean(0))
    best = (values[8:] ** 2).sum() / cells.numel()
    # Components level by level lose a little of what those of whole cells keep.
    assert best <= (restored - cells).square().mean() <= 1.2 * best
    assert (painted - pixels).square().mean() < 0.3 * pixels.var()


@pytest.mark.parametrize(("caption", "named"), [
    pytest.param("a red disc and two blue crosses", {"disc": 1, "crosses": 10}, id="shapes stand for their class"),
    pytest.param("a red ring", {}, id="hue and shape of no class"),
    pytest.param("disc on grass", {}, id="a shape without a hue"),
])  # fmt: skip
def test_objects_are_named_by_their_last_word(tokenizer: Any, caption: str, named: dict[str, int]) -> None:
    tokens = tokenize(tokenizer, [caption])
    labels, names_object = TokenLabels(tokenizer)(tokens)
    words = tokenizer.convert_ids_to_tokens(tokens[0].tolist())
    found = {
        word.removesuffix("</w>"): int(label) - len(tokenizer)
        for word, label, is_object in zip(words, labels[0], names_object[0], strict=True)
        if is_object
    }
    assert found == named
    assert torch.equal(labels[~names_object], tokens[~names_object])


def test_prompts_name_every_class_of_a_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = write_prompt(((1, 9, 9), ("grass",)), rng)
        assert all(hue in prompt for hue in (CLASSES[1].split()[0], CLASSES[9].split()[0])), prompt
        assert sum(hue in prompt for hue in HUES) == 2


def test_contrast_compares_words_with_the_cells_of_every_layer() -> None:
    torch.manual_seed(0)
    unet, phrases = build_unet().eval(), torch.randn(12, 128)
    contrast = WordContrast(unet, phrases)
    with torch.no_grad():
        unet(torch.randn(2, 8, 16, 16), torch.tensor([3, 700]), phrases.expand(2, -1, -1))
    answers = contrast.answer()
    assert answers.shape == (6 + 1, 2, 12)
    layer = unet.up_blocks[2].attentions[1].transformer_blocks[0].attn2
    number = contrast._layers.index(layer)
    query, key = (x.unflatten(-1, (4, 16)) for x in (contrast._queries[number], layer.to_k(phrases)))
    logits = torch.einsum("bnhd,phd->bhnp", query, key).mean(1) / 16**0.5
    torch.testing.assert_close(answers[number], logits.logsumexp(1) - np.log(256) + contrast.biases[number])


@pytest.mark.parametrize(("named", "weights", "is_low"), [
    pytest.param([[1, 3], [2]], [1.0, 1.0], True, id="the classes of both captions"),
    pytest.param([[1, 3], [5]], [1.0, 1.0], False, id="a wrong class"),
    pytest.param([[1, 3], [5]], [1.0, 0.0], True, id="a wrong class of weight 0"),
])  # fmt: skip
def test_contrast_asks_for_the_classes_of_the_caption(
    named: list[list[int]], weights: list[float], is_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = held_classes([((1, 3, 3), ("grass",)), ((2,), ())])
    answers = torch.full((5, 2, 12), -8.0)
    for row, numbers in enumerate(named):
        answers[:, row, [number - 1 for number in numbers]] = 8.0
    contrast = WordContrast(build_unet(), torch.zeros(12, 128))
    monkeypatch.setattr(contrast, "answer", lambda: answers)
    assert (float(contrast.loss(held, torch.tensor(weights))) < 0.01) == is_low


def test_interrupted_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DiffusionTraining(
        steps=4,
        batch=1,
        scenes=4,
        pictures=8,
        check_every=2,
        check_scenes=2,
        contrast_weight=0.3,
        first_share=0.5,
        autoencoder=AutoencoderTraining(steps=2, scenes=4, fit_scenes=8, batch=2, check_every=1, check_scenes=2),
        words=WordTraining(steps=2, batch=4, check_every=1),
    )
    train_diffusion(settings, tmp_path / "at_once")
    checks = []

    def interrupt(self: TrainingLoop, step: int) -> None:
        checks.append(step)
        if len(checks) in (2, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_check", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(settings, tmp_path / "in_parts")
    train_diffusion(settings, tmp_path / "in_parts")
    for name in PARTS.values():
        expected, got = (load_file(tmp_path / run / name) for run in ("at_once", "in_parts"))
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items()), name


def test_training_takes_no_weights_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"start: got 'x', but this training goes on from .*out_state"):
        train_diffusion(DiffusionTraining(start="x"), tmp_path / "out")


def test_configuration_holds_the_settings_of_the_training() -> None:
    model = compose_hydra(["model=diffusion"], "train_miniature").model
    assert set(model) - {"name"} == set(DiffusionTraining.__dataclass_fields__) - {"device"}
    assert set(model.autoencoder) <= set(AutoencoderTraining.__dataclass_fields__)
    assert set(model.words) <= set(WordTraining.__dataclass_fields__)


def test_scheduler_keeps_the_noise_of_stable_diffusion() -> None:
    kept = build_scheduler().alphas_cumprod
    assert float(kept[100]) == pytest.approx(0.893, abs=2e-3)
    assert float(kept[999]) == pytest.approx(0.0047, abs=2e-4)
