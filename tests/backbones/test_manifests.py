"""Every preset at full size: the names and shapes of the published checkpoint, and tokens of the right shape."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moduseg.backbones.clip import ClipBackbone, ClipOptions
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.config import compose, config_dir
from moduseg.errors import ArtefactError
from tests.support.agree_clip import CPU, write_clip
from tests.support.agree_vit import DEPTH, DINOV3, HEADS, SIGLIP, VIT, WIDTH, dinov2, dinov2_state
from tests.support.agreement import encode_tokens, picture, rename_tensors
from tests.support.key_names import CLIPS, FOLDER, META, TIMM, fold, model_of, preset, read, shapes_of, unfold, write

PRESETS = (*TIMM, *CLIPS)
CHANNELS = {
    "dinov2_vits14": 384, "dinov2_vitb14": 768, "dinov2_vitl14": 1024, "dinov2_vitg14": 1536,
    "dinov2_vits14_reg4": 384, "dinov2_vitb14_reg4": 768, "dinov2_vitl14_reg4": 1024, "dinov2_vitg14_reg4": 1536,
    "dinov3_vitb16": 768, "dinov3_vitl16": 1024, "cradio_v4_so400m": 1152, "siglip2_b16": 768, "siglip2_so400m": 1152,
    "dino_vitb8": 768, "eva02_vitl14": 1024, "clip_vit_b16": 768, "clip_vit_b32": 768, "clip_vit_l14": 1024,
    "metaclip_vit_b16": 768,
}  # fmt: skip
MILLIONS = {
    "dinov2_vits14": 22.1, "dinov2_vitb14": 86.6, "dinov2_vitl14": 304.4, "dinov2_vitg14": 1136.5,
    "dinov3_vitb16": 85.6, "dinov3_vitl16": 303.1, "dino_vitb8": 85.8, "clip_vit_b16": 149.6,
    "clip_vit_b32": 151.3, "clip_vit_l14": 427.6,
}  # fmt: skip
"""Parameters of the models whose size is known to a tenth of a million."""


@cache
def on_meta(name: str) -> Any:
    """A preset's backbone with its network built, on the meta device; made once for all tests."""
    backbone = preset(name)
    model_of(backbone)
    return backbone


def test_every_preset_of_a_published_model_has_a_manifest() -> None:
    others = {
        "miniature",
        "miniature_random",
        "miniature_both",
        "mobilenetv2",
        "mobilenetv2_scales",
        "mobilenetv2_context",
        "efficientnet_lite2",  # test_efficientnet.py
        "efficientnet_lite2_scales",
        "dinov2_vits14_reg4_photo",  # published models at another size of the input
        "dinov3_vitl16_photo",
        "clip_miniature",
    }
    assert {path.stem for path in (config_dir() / "backbone").glob("*.yaml")} - others == set(PRESETS)
    assert set(PRESETS) <= {path.stem for path in FOLDER.glob("*.json")}
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.stem in PRESETS) < 200_000


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    backbone = on_meta(name)
    ours, theirs = shapes_of(model_of(backbone).state_dict()), read(name)
    assert sorted(set(theirs) - set(ours)) == []
    assert sorted(set(ours) - set(theirs)) == []
    assert {key: shape for key, shape in ours.items() if theirs[key] != shape} == {}
    if name in MILLIONS:
        assert sum(np.prod(shape) for shape in theirs.values()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_at_full_size(name: str) -> None:
    """The whole way of an image of 75 x 100 pixels, on the meta device: shapes without numbers."""
    backbone = on_meta(name)
    (token_map,) = backbone.tokens([np.zeros((75, 100, 3), np.uint8)])
    stride = token_map.stride
    assert stride == {"8": 8, "4": 14, "6": 16, "2": 32, "m": 16}[name.removesuffix("_reg4")[-1]]
    assert token_map.tokens.shape == (-(-75 // stride), -(-100 // stride), CHANNELS[name])
    assert backbone.dim == CHANNELS[name]


# What transformers makes of the same models, under the names that their publishers use, through timm's own renaming.

VITS: dict[str, dict[str, Any]] = {
    "vits": {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12},
    "vitb": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "vitl": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
    "vitg": {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True},
}


def transformers_state(name: str) -> dict[str, torch.Tensor]:
    """The weights of a preset as transformers has them, on the meta device, under the publisher's names."""
    import transformers as t

    family, size = name.split("_")[:2]
    if family == "siglip2":
        width: dict[str, Any] = (
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
            if size == "b16"
            else {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        )
        config = t.SiglipVisionConfig(**width, image_size=512, patch_size=16, vision_use_head=False)
        state = rename_tensors(t.SiglipVisionModel(config).state_dict(), SIGLIP)
        return {key: tensor[None] if key == "pos_embed" else tensor for key, tensor in state.items()}
    width = VITS[size[:4]]
    if family == "dino":
        config = t.ViTConfig(**width, image_size=224, patch_size=8)
        return rename_tensors(t.ViTModel(config, add_pooling_layer=False).state_dict(), VIT)
    if family == "dinov3":
        more = {"num_register_tokens": 4, "query_bias": False, "value_bias": False, "patch_size": 16}
        config = t.DINOv3ViTConfig(**width, **more, intermediate_size=4 * width["hidden_size"])
        return rename_tensors(t.DINOv3ViTModel(config).state_dict(), DINOV3)
    if name.endswith("reg4"):
        config = t.Dinov2WithRegistersConfig(**width, image_size=518, patch_size=14, num_register_tokens=4)
        return dinov2_state(t.Dinov2WithRegistersModel(config))
    return dinov2_state(t.Dinov2Model(t.Dinov2Config(**width, image_size=518, patch_size=14)))


@pytest.mark.parametrize("name", [n for n in TIMM if n.startswith(("dino", "siglip"))])
def test_another_library_has_the_same_names_and_shapes(name: str) -> None:
    model = model_of(on_meta(name))
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    with META.torch_device:
        theirs = shapes_of(convert(transformers_state(name), model))
    # transformers has no attention pool of SigLIP here.
    assert theirs == {key: shape for key, shape in read(name).items() if not key.startswith("attn_pool.")}


# The form of the files ------------------------------------------------------------------------------------------------


def test_folded_lines_unfold() -> None:
    shapes = {
        "stem.weight": (3, 4),
        **{f"blocks.{i}.norm.weight": (4,) for i in range(12)},
        "odd.0.weight": (1,),
        "odd.2.weight": (1,),
        "mixed.0.weight": (2,),
        "mixed.1.weight": (3,),
        "scale": (),
    }
    lines = fold(shapes)
    assert lines["blocks.{0..11}.norm.weight"] == [4]
    assert len(lines) == 7
    assert unfold(lines) == shapes


def test_manifests_are_written_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.key_names.FOLDER", tmp_path)
    shapes = {"a.0.weight": (2, 3), "a.1.weight": (2, 3), "b": ()}
    write("tiny", "publisher/tiny", "timm", shapes)
    assert read("tiny") == shapes
    info = json.loads((tmp_path / "tiny.json").read_text())
    assert (info["checkpoint"], info["tensors"], info["values"]) == ("publisher/tiny", 3, 13)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.ls2.gamma"), r"1 missing \(blocks\.1\.ls2\.gamma\)"),
        (lambda s: s.update({"blocks.9.norm1.bias": torch.zeros(1)}), r"1 unexpected \(blocks\.9\.norm1\.bias\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(5)}), r"norm\.bias \(5,\) instead of \(24,\)"),
        (lambda s: s.pop("cls_token"), r"cls_token"),
    ],
)
@pytest.mark.parametrize("registers", [0, 4])
def test_a_publishers_file_is_taken_whole_or_not_at_all(
    change: Any, message: str, registers: int, tmp_path: Path
) -> None:
    """Meta's names: what is missing, left over or of another shape after renaming ends in one line."""
    state = {key: tensor.clone() for key, tensor in dinov2_state(dinov2(registers)).items()}
    kwargs = {"img_size": 84, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    for attempt in ("whole", "changed"):
        file = tmp_path / f"{attempt}.safetensors"
        save_file(state, file)
        backbone = TimmBackbone(TimmOptions(model, weights=str(file), model_kwargs=kwargs), CPU)
        if attempt == "whole":
            assert encode_tokens(backbone, picture(28, 28)).shape == (4, WIDTH)
            change(state)
            continue
        with pytest.raises(ArtefactError, match=message) as raised:
            encode_tokens(backbone, picture(28, 28))
        assert "\n" not in str(raised.value)


def test_a_clip_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path, "gelu")
    state = load_file(tmp_path / "model.safetensors")
    state["visual_projection.weight"] = torch.zeros(20, 33)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"check backbone\.weights") as raised:
        encode_tokens(ClipBackbone(ClipOptions(weights=str(tmp_path)), CPU), picture(24, 24))
    assert "\n" not in str(raised.value)


def test_presets_pin_the_activation_of_their_clip() -> None:
    for name in CLIPS:
        assert compose([f"backbone={name}"]).backbone["activation"] == "quick_gelu"
    assert compose(["backbone=clip_miniature"]).backbone["activation"] is None
