"""Where a text-to-image model comes from: directories, the hub's layout, what is missing or damaged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moduseg.diffusion.attention import AttentionSource
from moduseg.diffusion.layers import MapRequest
from moduseg.diffusion.model import DiffusionModel, DiffusionModelOptions
from moduseg.diffusion.prompts import write_prompt
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.weights.pipelines import PARTS, find_pipeline_folder, pipeline_digest
from tests.support.devices import CPU
from tests.support.tiny_diffusion import LATENT_SIDE, save_tiny_diffusion, tiny_diffusion, tiny_source

Words = tuple[Path, int, int]
KEY = "pseudo_masks.generator.weights"


@pytest.fixture(scope="module")
def saved(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_diffusion(words, tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A directory of the tiny model that a test may change."""
    return shutil.copytree(saved, tmp_path / "tiny")


def load(folder: Path, part: str = "unet") -> Any:
    return getattr(DiffusionModel(DiffusionModelOptions(weights=str(folder)), CPU, KEY), part)


def read(source: AttentionSource) -> list[torch.Tensor]:
    latents = source.encode_images([np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)])
    states = source.encode_prompts([write_prompt({"a": "red disc"})]).states
    attention = source.collect(latents, states, [MapRequest(kind="cross", side=8)])
    return [latents, states, *attention.maps, attention.prediction]


def test_a_directory_holds_what_was_saved(words: Words, folder: Path) -> None:
    source = AttentionSource(DiffusionModelOptions(weights=str(folder), image_side=128), CPU)
    torch.testing.assert_close(read(source), read(tiny_source(words)))
    for part in (source.model.unet, source.model.vae, source.model.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_half_precision_files_are_read_as_float32(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.float32}


def test_seeds_make_other_weights(words: Words) -> None:
    first, again, other = (tiny_source(words, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.model.unet.conv_in.weight, again.model.unet.conv_in.weight)
    assert not torch.equal(first.model.unet.conv_in.weight, other.model.unet.conv_in.weight)
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/model.safetensors",
                                  "scheduler/scheduler_config.json", "tokenizer/vocab.json"])  # fmt: skip
def test_digest_covers_every_part(file: str, folder: Path) -> None:
    before = pipeline_digest(folder)
    path = folder / file
    path.write_bytes(path.read_bytes() + b" ")
    assert pipeline_digest(folder) != before
    (folder / "README.md").write_text("no part of the model")
    shutil.rmtree(folder / "README.md", ignore_errors=True)
    assert AttentionSource(DiffusionModelOptions(weights=str(folder)), CPU).digest == pipeline_digest(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part: str, folder: Path) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(MissingError, match=rf"^pseudo_masks\.generator\.weights: .* holds no {part} "):
        find_pipeline_folder(str(folder), KEY)


def test_hub_ids_are_looked_for_in_the_cache_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match=r"hub id 'owner/tiny' at revision v1.*its text-to-image model is not here"):
        find_pipeline_folder("owner/tiny", KEY, "v1")
    target = tmp_path / "home" / "huggingface.co" / "owner" / "tiny" / "v1"
    target.parent.mkdir(parents=True)
    folder.rename(target)
    assert find_pipeline_folder("owner/tiny", KEY, "v1") == target


def test_the_hubs_own_cache_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository, commit = tmp_path / "hf" / "models--owner--tiny", "89abcdef" * 5
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    assert find_pipeline_folder("owner/tiny", KEY) == repository / "snapshots" / commit


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("change", ["missing", "left over"])
def test_weights_are_taken_whole_or_not_at_all(part: str, change: str, folder: Path) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    if change == "missing":
        state.pop(sorted(state)[-1])
    else:
        state["another.weight"] = torch.zeros(3)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"not the weights of its config\.json .*check pseudo_masks\.gen") as raised:
        load(folder, part)
    assert "\n" not in str(raised.value)


def test_older_names_of_the_autoencoder_are_read(folder: Path) -> None:
    """Stable Diffusion 1.5's file names the layers of its attention as diffusers once did."""
    # Copies, since tensors may be mapped onto the file that is written anew below.
    expected = {name: tensor.clone() for name, tensor in load(folder, "vae").state_dict().items()}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in older.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in state.items()}
    assert len(set(state) - set(expected)) == 16
    save_file(state, file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder, "vae").state_dict().items())


@pytest.mark.parametrize(("file", "part"), [
    pytest.param("unet/config.json", "unet", id="UNet"),
    pytest.param("vae/diffusion_pytorch_model.safetensors", "vae", id="autoencoder"),
    pytest.param("scheduler/scheduler_config.json", "scheduler", id="scheduler"),
    pytest.param("tokenizer/tokenizer.json", "tokenizer", id="tokenizer"),
])  # fmt: skip
def test_damaged_files_end_in_one_line(file: str, part: str, folder: Path) -> None:
    (folder / file).write_bytes(b"\x00damaged")
    with pytest.raises(ArtefactError, match=r"^.*(not readable as a|check) .*") as raised:
        load(folder, part)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_of_another_model_is_refused(words: Words) -> None:
    options = tiny_diffusion(words)
    options["config"]["text_encoder"]["vocab_size"] = 100
    with pytest.raises(ArtefactError, match=r"the tokenizer has \d+ tokens, the text encoder 100"):
        _ = DiffusionModel(DiffusionModelOptions(**options), CPU, KEY).tokenizer


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"weights": ""}, "weights: got an empty text", id="no weights"),
    pytest.param({"config": {}}, "config: got one beside weights=", id="a configuration of published weights"),
    pytest.param({"weights": "random", "config": {"unte": {}}}, "config: got 'unte', expected some of unet", id="part"),
    pytest.param({"image_side": 4}, "image_side: got 4", id="image side"),
    pytest.param({"latent": "mode"}, "latent: got 'mode'", id="latent"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionModelOptions(**options)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_configuration_that_makes_no_model_is_named(part: str, words: Words) -> None:
    options = tiny_diffusion(words)
    options["config"][part] = {**options["config"][part], "norm_num_groups": 7, "hidden_size": "wide"}
    with pytest.raises(ConfigError, match=rf"^pseudo_masks\.generator\.config\.{part}: makes no {part} ") as raised:
        getattr(DiffusionModel(DiffusionModelOptions(**options), CPU, KEY), part)
    assert "\n" not in str(raised.value)


def test_random_weights_need_a_tokenizer(words: Words) -> None:
    options = DiffusionModelOptions(**{**tiny_diffusion(words), "tokenizer": None})
    with pytest.raises(MissingError, match=r"random weights have no tokenizer; name one: pseudo_masks\.generator\.tok"):
        _ = DiffusionModel(options, CPU, KEY).tokenizer


def test_a_machine_without_diffusers_is_told_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingError, match=r"needs diffusers, which is not installed; pip install 'moduseg\[diffusion"):
        load(folder)


def test_any_schedulers_file_is_read(folder: Path) -> None:
    """Stable Diffusion 1.5 is published with another scheduler; noise is added alike."""
    file = folder / "scheduler" / "scheduler_config.json"
    settings = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "beta_end": 0.012, "num_train_timesteps": 1000, "skip_prk_steps": True}  # fmt: skip
    file.write_text(json.dumps(settings))
    scheduler = load(folder, "scheduler")
    share = 1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, share.cumprod(0))


def test_latents_have_the_side_of_the_image_over_eight(words: Words) -> None:
    assert read(tiny_source(words))[0].shape == (1, 4, LATENT_SIDE, LATENT_SIDE)
