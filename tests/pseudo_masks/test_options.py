"""Settings of generators: shared ones are inherited, each generator takes its own and no other's."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from moduseg.backbones.clip_attention import Branches
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.clip_dense import ClipDenseOptions
from moduseg.pseudo_masks.clip_words import ClipWordsOptions
from moduseg.pseudo_masks.corrclip import CorrClipGenerator, CorrClipOptions
from tests.pseudo_masks.contract import CLASSES
from tests.pseudo_masks.test_given_masks import no_backbone
from tests.support.agree_clip import write_clip
from tests.support.devices import CPU


@pytest.mark.parametrize(("name", "key"), [
    pytest.param("cam", "neighbours", id="cam asks no neighbours"),
    pytest.param("cam_neighbours", "region_scores", id="neighbours always score regions"),
    pytest.param("cam_neighbours", "scale", id="neighbours have one scale"),
    pytest.param("clip_dense", "affinity", id="only corrclip has an affinity"),
    pytest.param("corrclip", "gaussian_std", id="only clip_dense has naclip"),
    pytest.param("fusion", "device", id="what the program supplies is no key"),
])  # fmt: skip
def test_keys_of_other_generators_are_unknown(name: str, key: str) -> None:
    cfg: dict[str, Any] = {"name": name, key: 1}
    with pytest.raises(ConfigError, match=rf"pseudo_masks\.generator\.{key}: unknown key"):
        build(cfg, CPU, no_backbone, CLASSES)


@pytest.mark.parametrize("options", [ClipDenseOptions, CorrClipOptions])
def test_generators_that_compare_words_share_their_settings(options: type[ClipWordsOptions]) -> None:
    shared = {f.name: f.default for f in fields(ClipWordsOptions) if f.name != "batch_size"}
    assert shared.items() <= {f.name: f.default for f in fields(options)}.items()


def test_corrclip_checks_all_it_inherits() -> None:
    assert issubclass(CorrClipOptions, Branches)
    for wrong in ({"temperature": 0.0}, {"logit_scale": 0.0}, {"weights": ""}, {"min_area": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            CorrClipOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("preset", "has_affinity"), [
    pytest.param("corrclip", True, id="corrclip"),
    pytest.param("corrclip_moduseg", True, id="corrclip as ModuSeg uses it"),
    pytest.param("corrclip_paper", True, id="corrclip as its paper has it"),
    pytest.param("corrclip_coco", True, id="corrclip for COCO"),
    pytest.param("corrclip_ade20k", True, id="corrclip for ADE20K"),
    pytest.param("corrclip_cityscapes", True, id="corrclip for Cityscapes"),
    pytest.param("clip_dense_vit_b16", False, id="dense CLIP"),
])  # fmt: skip
def test_presets_run_published_models_as_published(preset: str, has_affinity: bool) -> None:
    """CLIP with quick GELU; CorrCLIP in half precision, its DINO without antialiasing of positions."""
    generator = compose([f"pseudo_masks={preset}"]).pseudo_masks.generator
    assert generator["activation"] == "quick_gelu"
    if has_affinity:
        assert generator["affinity"]["antialias"] is False
        assert generator["precision"] == generator["affinity"]["precision"] == "float16"


@pytest.mark.parametrize("name", ["clip_dense", "corrclip"])
def test_activation_reaches_the_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that says gelu is run with quick GELU if the option says so, and that is said."""
    write_clip(tmp_path, "gelu")
    generator = build({"name": name, "weights": str(tmp_path), "activation": "quick_gelu"}, CPU, no_backbone, CLASSES)
    config = generator._source.model.config  # type: ignore[attr-defined]
    assert [config.text_config.hidden_act, config.vision_config.hidden_act] == ["quick_gelu"] * 2
    assert "has gelu in its configuration and runs with quick_gelu, as pseudo_masks.generator.activation" in caplog.text


@pytest.mark.parametrize("weights", ["openai/clip-vit-base-patch16", "facebook/metaclip-b16-fullcc2.5b"])
@pytest.mark.parametrize("name", ["clip_dense", "corrclip"])
def test_weights_that_need_quick_gelu_get_no_other(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"activation: got gelu, expected quick_gelu, with which {weights}"):
        build({"name": name, "weights": weights, "activation": "gelu"}, CPU, no_backbone, CLASSES)
    # A conversion whose config.json names plain GELU, under the hub id that is known.
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path))
    write_clip(tmp_path / "huggingface.co" / weights / "main", "gelu")
    generator = build({"name": name, "weights": weights}, CPU, no_backbone, CLASSES)
    with pytest.raises(ConfigError, match=r"has gelu in its config\.json, .*set pseudo_masks\.generator\.activation="):
        _ = generator._source.model  # type: ignore[attr-defined]


@pytest.mark.parametrize(("device", "own", "expected"), [
    pytest.param("cuda", "float16", "float16", id="a preset's precision holds on CUDA"),
    pytest.param("cuda", None, "bfloat16", id="the run's without one"),
    pytest.param("cpu", "float16", "bfloat16", id="a CPU runs as the run says"),
])  # fmt: skip
def test_precision_of_a_preset_is_for_its_model(device: str, own: Any, expected: str) -> None:
    affinity = {"name": "timm", "model": "vit_tiny_patch16_224", "precision": own}
    options = CorrClipOptions(weights="miniature/clip", affinity=affinity, precision=own)
    generator = CorrClipGenerator(options, Device(torch.device(device), "bfloat16"), no_backbone, CLASSES)
    assert generator._source.device.precision == expected
    assert generator._affinity._device.precision == expected  # type: ignore[attr-defined]
