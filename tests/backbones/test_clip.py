"""The CLIP backbone: tokens, texts, weights from a directory, the hub or nowhere."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moduseg.backbones import build
from moduseg.backbones.clip import ClipBackbone, ClipEncoder, ClipOptions, EncoderOptions, make_resampling_weights
from moduseg.backbones.clip_model import ClipModelOptions, ClipSource
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.miniature.models.clip import build_tokenizer
from moduseg.structures import TokenMap
from tests.backbones.contract import BackboneContract, picture
from tests.support.devices import CPU

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_config(tokens: int = 64, end: int = 63) -> dict[str, Any]:
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return {
        "text_config": {**WIDTH, **special, "vocab_size": tokens, "max_position_embeddings": 12},
        "vision_config": {**WIDTH, "image_size": 16, "patch_size": 4},
        "projection_dim": 24,
    }


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block CLIP with the miniature's tokenizer, as `save_pretrained` writes it."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig(**tiny_config(len(tokenizer), tokenizer.eos_token_id)))
    model.save_pretrained(folder)
    normalisation = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


class TestFromFolder(BackboneContract):
    @pytest.fixture
    def backbone(self, clip_folder: Path, device: torch.device) -> ClipBackbone:
        return ClipBackbone(ClipOptions(weights=str(clip_folder)), Device(device))


class TestRandomProjected(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> ClipBackbone:
        return ClipBackbone(
            ClipOptions(weights="random", config=tiny_config(), variant="naclip", project=True), Device(device)
        )


def test_tokens_are_the_models_own(clip_folder: Path) -> None:
    from transformers import CLIPModel

    image = picture(16, 24)
    (ours,) = ClipBackbone(ClipOptions(weights=str(clip_folder)), CPU).tokens([image])
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        output = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        expected = model.vision_model.post_layernorm(output).view(4, 6, 32)
    torch.testing.assert_close(ours.tokens, expected)


def test_dim_follows_the_projection(clip_folder: Path) -> None:
    for project, dim in ((False, 32), (True, 24)):
        backbone = ClipBackbone(ClipOptions(weights=str(clip_folder), project=project), CPU)
        assert backbone.dim == dim
        assert backbone.tokens([picture(8, 8)])[0].tokens.shape[2] == dim


def test_short_side(clip_folder: Path) -> None:
    (token_map,) = ClipBackbone(ClipOptions(weights=str(clip_folder), short_side=20), CPU).tokens([picture(40, 60)])
    assert (token_map.image_size, token_map.input_size) == ((40, 60), (20, 30))
    assert token_map.tokens.shape[:2] == (5, 8)


# Texts


def test_text_features(clip_folder: Path, device: torch.device) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    backbone = ClipBackbone(ClipOptions(weights=str(clip_folder)), Device(device))
    texts = ["a red disc", "grass", "a red disc", "several words that are no words of the world at all, cut off"]
    features = backbone.text_features(texts)
    assert features.shape == (4, 24)
    assert features.dtype == torch.float32
    assert not features.is_inference()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4, device=device))
    torch.testing.assert_close(features[0], features[2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    batch = CLIPTokenizer.from_pretrained(clip_folder)(texts[:1], return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        pooled = model.text_projection(model.text_model(**batch).pooler_output)
    torch.testing.assert_close(features[:1].cpu(), pooled / pooled.norm(), atol=1e-5, rtol=1e-4)
    assert backbone.text_features([]).shape == (0, 24)


def test_text_features_as_a_tensor_or_an_object(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 returns the features themselves."""
    source = ClipSource(ClipModelOptions(weights=str(clip_folder)), CPU)
    expected = source.text_features(["a red disc"])
    inner = source.model.get_text_features

    def as_before(**inputs: Any) -> torch.Tensor:
        output = inner(**inputs)
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    monkeypatch.setattr(source.model, "get_text_features", as_before)
    torch.testing.assert_close(source.text_features(["a red disc"]), expected)


def test_many_texts_are_batched(clip_folder: Path) -> None:
    source = ClipSource(ClipModelOptions(weights=str(clip_folder)), CPU)
    texts = [f"a red disc {n}" for n in range(130)]
    torch.testing.assert_close(source.text_features(texts)[-1:], source.text_features(texts[-1:]), atol=1e-5, rtol=1e-4)


# Proxies


def test_resampling_to_another_stride() -> None:
    weights = make_resampling_weights(3, 14.0, 5, 8.0, torch.device("cpu"))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    centres = weights @ (8.0 * torch.arange(5.0) + 4.0)
    torch.testing.assert_close(centres, torch.tensor([7.0, 21.0, 35.0]))


def test_proxies_decide_the_grid(clip_folder: Path, device: torch.device) -> None:
    encoder = ClipEncoder(
        ClipSource(ClipModelOptions(weights=str(clip_folder)), Device(device)), EncoderOptions(variant="proxyclip")
    )
    images = [picture(16, 21, 0), picture(16, 21, 1), picture(16, 23, 2)]
    generator = torch.Generator().manual_seed(0)
    proxies = [
        TokenMap(torch.randn(6, -(-i.shape[1] // 3), 5, generator=generator), 3, i.shape[:2], i.shape[:2])
        for i in images
    ]
    together = encoder.encode(images, proxies)
    for image, proxy, token_map in zip(images, proxies, together, strict=True):
        assert token_map.tokens.shape == (*proxy.tokens.shape[:2], 24)
        assert (token_map.stride, token_map.input_size) == (3, proxy.input_size)
        (alone,) = encoder.encode([image], [proxy])
        torch.testing.assert_close(token_map.tokens, alone.tokens, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="proxyclip and corrclip need them"):
        encoder.encode(images)
    with pytest.raises(ValueError, match="made from that image"):
        encoder.encode(images, proxies[::-1])


# Weights


def test_digest_covers_weights_and_words(clip_folder: Path, tmp_path: Path) -> None:
    first = ClipBackbone(ClipOptions(weights=str(clip_folder)), CPU).digest
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    assert ClipBackbone(ClipOptions(weights=str(copy)), CPU).digest == first
    state = load_file(copy / "model.safetensors")
    state["logit_scale"] += 1
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    second = ClipBackbone(ClipOptions(weights=str(copy)), CPU).digest
    (copy / "merges.txt").write_text("#version: 0.2\n")
    assert len({first, second, ClipBackbone(ClipOptions(weights=str(copy)), CPU).digest}) == 3


def test_random_weights_are_seeded() -> None:
    state = torch.random.get_rng_state()
    backbones = [
        ClipBackbone(ClipOptions(weights="random", config=tiny_config(), seed=seed), CPU) for seed in (0, 0, 1)
    ]
    maps = [backbone.tokens([picture(16, 16)])[0].tokens for backbone in backbones]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert backbones[0].digest != backbones[2].digest
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_weights_want_a_tokenizer(clip_folder: Path) -> None:
    with pytest.raises(MissingError, match=r"random weights have no tokenizer; name one: backbone\.tokenizer="):
        ClipBackbone(ClipOptions(weights="random", config=tiny_config()), CPU).text_features(["a"])
    with pytest.raises(ArtefactError, match=r"the tokenizer has \d+ tokens, the model 64"):
        ClipBackbone(
            ClipOptions(weights="random", config=tiny_config(), tokenizer=str(clip_folder)), CPU
        ).text_features(["a"])


def test_a_pytorch_file_serves_too(clip_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    # A buffer that older files hold.
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    maps = [
        ClipBackbone(ClipOptions(weights=str(f)), CPU).tokens([picture(16, 16)])[0].tokens for f in (clip_folder, copy)
    ]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("change", ["missing", "left over", "truncated"])
def test_damaged_weights(clip_folder: Path, tmp_path: Path, change: str) -> None:
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    file = copy / "model.safetensors"
    state = load_file(file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        if change == "missing":
            del state["visual_projection.weight"]
        else:
            state["visual_projection.extra"] = torch.zeros(1)
        save_file(state, file, metadata={"format": "pt"})
    message = "not readable as a CLIP" if change == "truncated" else r"first visual_projection\."
    with pytest.raises(ArtefactError, match=message) as caught:
        ClipBackbone(ClipOptions(weights=str(copy)), CPU).tokens([picture(16, 16)])
    assert "\n" not in str(caught.value)


def test_missing_weights(tmp_path: Path) -> None:
    for weights, message in (
        (str(tmp_path / "nowhere"), r"backbone\.weights: got .*no such file"),
        (str(tmp_path), r"holds no config\.json with model\.safetensors"),
        ("$MODUSEG_NO_SUCH_CLIP", r"environment variable MODUSEG_NO_SUCH_CLIP is not set"),
    ):
        with pytest.raises(MissingError, match=message):
            assert ClipBackbone(ClipOptions(weights=weights), CPU).digest


@pytest.mark.parametrize("revision", [None, "abc123"])
def test_hub_id_offline_is_one_line(revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    backbone = ClipBackbone(ClipOptions(weights="openai/clip-vit-base-patch16", revision=revision), CPU)
    with pytest.raises(MissingError, match=r"got hub id 'openai/clip-vit-base-patch16'") as caught:
        backbone.tokens([picture(16, 16)])
    message = str(caught.value)
    assert "https://huggingface.co/openai/clip-vit-base-patch16" in message
    assert "config.json" in message
    assert "backbone.weights=" in message
    assert (revision or "hf download") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ""}, "weights: got an empty text"),
        ({"variant": "proxyclip"}, "variant"),
        ({"variant": "dense"}, "variant: got 'dense'"),
        ({"short_side": 0}, "short_side: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"gaussian_std": 0.0}, "gaussian_std: got 0"),
        ({"config": {}}, "expected it with weights=random only"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "clip", **options}, CPU)


def test_a_configuration_that_makes_no_clip() -> None:
    config = {**tiny_config(), "vision_config": {**WIDTH, "num_attention_heads": 5}}
    with pytest.raises(
        ConfigError, match=r"backbone\.config: makes no CLIP \(.*see transformers\.CLIPConfig"
    ) as caught:
        ClipBackbone(ClipOptions(weights="random", config=config), CPU).tokens([picture(16, 16)])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_vit_b16_runs(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP ViT-B/16 from its published configuration, random weights, one photograph-sized image."""
    config = {
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        "vision_config": {"hidden_size": 768, "patch_size": 16, "image_size": 224},
        "projection_dim": 512,
    }
    backbone = ClipBackbone(
        ClipOptions(weights="random", config=config, variant="naclip", project=True), Device(device)
    )
    image = np.zeros((375, 500, 3), np.uint8)
    assert backbone.dim == 512
    started = time.perf_counter()
    (token_map,) = backbone.tokens([image])
    seconds = time.perf_counter() - started
    assert token_map.tokens.shape == (24, 32, 512)
    memory = (
        torch.cuda.max_memory_allocated(device) / 1e9
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    with capsys.disabled():
        parameters = sum(p.numel() for p in backbone._source.model.parameters())
        print(
            f"\nCLIP ViT-B/16, {parameters / 1e6:.1f} M parameters, {device}: tokens {tuple(token_map.tokens.shape)}, "
            f"{seconds:.1f} s, {memory:.2f} GB at most"
        )
