"""Two implementations, the same random weights, the same tokens; and where they do not agree, why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moduseg.backbones.clip import ClipBackbone, ClipOptions
from moduseg.backbones.positions import resample_positions
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.errors import ConfigError
from tests.support.agree_clip import CPU, write_clip
from tests.support.agree_vit import DEPTH, HEADS, WIDTH, backbone_with, dinov2, dinov2_state
from tests.support.agreement import (
    COMPARISONS,
    TOLERANCE,
    Row,
    encode_tokens,
    find_comparison,
    make_padded_input,
    measure_relative_error,
    picture,
    to_markdown,
)

OURS = [name for name in COMPARISONS if "agree_sam" not in name]
KWARGS = {"img_size": 84, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


@pytest.mark.parametrize("name", OURS, ids=[name.split("_")[-1] for name in OURS])
def test_implementations_agree(name: str, tmp_path: Path) -> None:
    rows = find_comparison(name)(tmp_path)
    assert len({row.size for row in rows}) >= 3  # the trained size, a larger one, and one that is no multiple
    assert not [row for row in rows if not row.error < TOLERANCE], to_markdown(rows)


def test_the_table_shows_its_rows() -> None:
    table = to_markdown([Row("CLIP", "ours, theirs", "tokens", "8 x 9", 0.00012)])
    assert table.splitlines()[-1] == "| CLIP | ours, theirs | tokens | 8 x 9 | 1.2e-04 |"


def dinov2_error(folder: Path, size: tuple[int, int], change: str = "", **options: bool) -> float:
    """Of a tiny DINOv2 without registers, ours against transformers'; `change` names a tensor that ours has altered."""
    model = dinov2()
    state = dinov2_state(model)
    if change:
        state[change] = 1.1 * state[change] + 0.01
    backbone = backbone_with(state, "vit_small_patch14_dinov2", folder, model_kwargs=KWARGS, **options)
    with torch.no_grad():
        theirs = model(make_padded_input(picture(*size), 14)).last_hidden_state[0, 1:]
    return measure_relative_error(encode_tokens(backbone, picture(*size)), theirs)


@pytest.mark.parametrize(
    "change", ["pos_embed", "blocks.0.ls2.gamma", "blocks.2.mlp.fc1.bias", "blocks.1.attn.qkv.weight", "norm.weight"]
)
def test_another_weight_is_seen(change: str, tmp_path: Path) -> None:
    assert dinov2_error(tmp_path, (98, 84), change, antialias=False) > 10 * TOLERANCE


@pytest.mark.parametrize("size", [(98, 140), (40, 61), (84, 57)])
def test_antialiased_positions_are_others(size: tuple[int, int], tmp_path: Path) -> None:
    """The whole difference between timm's DINOv2 and transformers' is how positions are resampled."""
    assert dinov2_error(tmp_path, size) > 100 * TOLERANCE
    assert dinov2_error(tmp_path, size, antialias=False) < TOLERANCE


def test_antialiasing_is_no_matter_at_the_trained_size(tmp_path: Path) -> None:
    for options in ({}, {"antialias": True}, {"antialias": False}):
        assert dinov2_error(tmp_path, (84, 79), **options) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_antialiased_positions_are_timms(name: str) -> None:
    """Asked for by name they are what timm does; and the model is left as it was."""
    backbones = [
        TimmBackbone(TimmOptions(name, model_kwargs=KWARGS, antialias=antialias), CPU)
        for antialias in (None, True, False)
    ]
    timm, ours, other = (encode_tokens(backbone, picture(60, 150)) for backbone in backbones)
    torch.testing.assert_close(ours, timm, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-3)
    model = backbones[2]._model
    assert tuple(model.patch_embed.grid_size) == (6, 6)
    assert model.pos_embed.shape[1] == 36 + (name == "vit_small_patch14_dinov2")


def test_resampled_positions_stay_in_place() -> None:
    """A table that holds its own coordinates holds those of the new patches' centres."""
    model = TimmBackbone(TimmOptions("vit_small_patch14_dinov2", model_kwargs=KWARGS), CPU)._model
    table = torch.zeros(1, 37, WIDTH)
    centres = (torch.arange(6.0) + 0.5) / 6
    table[0, 1:, 0], table[0, 1:, 1] = centres.repeat_interleave(6), centres.repeat(6)
    model.pos_embed.copy_(table)
    with resample_positions(model, (9, 12), False):
        moved = model.pos_embed[0, 1:, :2].unflatten(0, (9, 12))
    rows, columns = ((torch.arange(n) + 0.5) / n for n in (9.0, 12.0))
    # Inside, where the kernel does not reach the border, cubic interpolation keeps a ramp to a hundredth of a patch.
    torch.testing.assert_close(moved[3:6, 0, 0], rows[3:6], atol=0.01, rtol=0)
    torch.testing.assert_close(moved[0, 4:8, 1], columns[4:8], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 1, "num_heads": 2}),
        ("naflexvit_base_patch16_gap", {"embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("mobilenetv2_035", {}),
    ],
)
def test_antialias_wants_a_table(model: str, kwargs: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.antialias: got a value for .* try backbone\.antialias=null"):
        TimmBackbone(TimmOptions(model, model_kwargs=kwargs, antialias=False), CPU).tokens([picture(16, 16)])


# Activations of CLIP --------------------------------------------------------------------------------------------------


def test_activation_goes_before_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that says gelu, run with quick-GELU, is the directory that says so."""
    for activation in ("gelu", "quick_gelu"):
        write_clip(tmp_path / activation, activation)
    image, texts = picture(24, 30), ["a red disc"]
    wrong, right = (ClipBackbone(ClipOptions(weights=str(tmp_path / name)), CPU) for name in ("gelu", "quick_gelu"))
    mended = ClipBackbone(ClipOptions(weights=str(tmp_path / "gelu"), activation="quick_gelu"), CPU)
    assert not torch.allclose(encode_tokens(wrong, image), encode_tokens(right, image), atol=1e-3)
    assert not caplog.records
    assert torch.equal(encode_tokens(mended, image), encode_tokens(right, image))
    assert torch.equal(mended.text_features(texts), right.text_features(texts))
    assert not torch.allclose(wrong.text_features(texts), right.text_features(texts), atol=1e-3)
    assert [r.getMessage() for r in caplog.records if r.name == "moduseg"] == [
        f"backbone.weights: the {part} has gelu in its configuration and runs with quick_gelu, as backbone.activation "
        "says"
        for part in ("clip_text_model", "clip_vision_model")
    ]


def test_quick_gelu_is_quick() -> None:
    """x * sigmoid(1.702 x), by hand."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(ACT2FN["quick_gelu"](x), x * torch.sigmoid(1.702 * x))
    assert not torch.allclose(ACT2FN["quick_gelu"](x), F.gelu(x), atol=1e-2)
