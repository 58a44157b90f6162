"""The timm backbone: ViTs and CNNs, alignment, weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moduseg.backbones import build
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.backbones.timm_model import (
    _linearise,
    build_model,
    find_pretrained_id,
    measure_grid,
    resample_to_patches,
)
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, MissingError, ModusegError
from tests.backbones.contract import BackboneContract, picture
from tests.support.devices import CPU
from tests.support.tiny_vit import TINY, make_vit


class TestClassToken(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return make_vit(device)


class TestRegisters(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        kwargs = {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return TimmBackbone(TimmOptions("vit_small_patch14_reg4_dinov2", model_kwargs=kwargs), Device(device))


class TestNoPrefix(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return make_vit(device, model_kwargs={"class_token": False, "global_pool": "avg"})


class TestRotaryPositions(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        return TimmBackbone(TimmOptions("vit_small_patch16_dinov3", model_kwargs=kwargs), Device(device))


class TestNativeResolution(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        return TimmBackbone(TimmOptions("naflexvit_base_patch16_gap", model_kwargs=kwargs), Device(device))


_CNNS: dict[str, TimmBackbone] = {}


def cnn(device: torch.device) -> TimmBackbone:
    """One small CNN for each device, since measuring its grid costs more than using it."""
    if device.type not in _CNNS:
        _CNNS[device.type] = TimmBackbone(TimmOptions("mobilenetv2_035", output_stride=16), Device(device))
    return _CNNS[device.type]


class TestCnn(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return cnn(device)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_vit_tokens_are_the_final_patch_tokens() -> None:
    backbone = make_vit(seed=3)
    image = picture(32, 40)
    model = build_model("vit_tiny_patch16_224", TINY, None, 3).eval()
    inputs = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255.0 - 0.5) / 0.5
    with torch.no_grad():
        expected = model.forward_features(inputs)[0, 1:].view(4, 5, 16)
    torch.testing.assert_close(backbone.tokens([image])[0].tokens, expected, atol=1e-5, rtol=1e-5)


def test_final_norm_after_the_pooling_is_applied() -> None:
    tokens = make_vit(model_kwargs={"class_token": False, "global_pool": "avg"}).tokens([picture(32, 32)])[0].tokens
    # A fresh LayerNorm leaves mean 0 and variance 1.
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(4, 4), atol=1e-2, rtol=0)


def test_layers_are_counted_from_either_end() -> None:
    image = picture(32, 32)
    tokens = {layer: make_vit(layer=layer).tokens([image])[0].tokens for layer in (-3, -1, 0, 2)}
    assert torch.equal(tokens[-3], tokens[0])
    assert torch.equal(tokens[-1], tokens[2])
    assert not torch.allclose(tokens[0], tokens[2], atol=1e-4)


@pytest.mark.parametrize(("side", "expected"), [(16, (16, 24)), (64, (64, 96)), (33, (33, 50))])
def test_short_side(side: int, expected: tuple[int, int]) -> None:
    (token_map,) = make_vit(short_side=side).tokens([picture(32, 48)])
    assert token_map.input_size == expected
    assert token_map.image_size == (32, 48)
    assert token_map.tokens.shape[:2] == (-(-expected[0] // 8), -(-expected[1] // 8))


def test_mean_and_std_are_applied_after_padding() -> None:
    # With a mean of 0 black padding is 0; with another mean it is not, and the token of a padded patch moves with it.
    image = np.zeros((4, 8, 3), np.uint8)
    black, shifted = (make_vit(mean=m, std=(1.0, 1.0, 1.0)).tokens([image])[0].tokens for m in ((0.0,) * 3, (0.7,) * 3))
    full = make_vit(mean=(0.7,) * 3, std=(1.0, 1.0, 1.0)).tokens([np.zeros((8, 8, 3), np.uint8)])[0].tokens
    assert torch.allclose(shifted, full, atol=1e-6)
    assert not torch.allclose(black, shifted, atol=1e-3)


def test_low_precision_gives_float32(device: torch.device) -> None:
    backbone = TimmBackbone(TimmOptions("vit_tiny_patch16_224", model_kwargs=TINY), Device(device, "bfloat16"))
    tokens = backbone.tokens([picture(32, 32)])[0].tokens
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, make_vit(device).tokens([picture(32, 32)])[0].tokens, atol=0.1, rtol=0.1)


# Alignment ------------------------------------------------------------------------------------------------------------


def test_vit_impulse_lights_its_patch() -> None:
    """Without attention (zeroed), a changed pixel moves the token of its own patch and no other."""
    backbone = make_vit()
    for block in backbone._model.blocks:
        block.attn.proj.weight.zero_()
    image = np.zeros((29, 45, 3), np.uint8)
    quiet = backbone.tokens([image])[0].tokens
    for y, x in ((0, 0), (7, 8), (28, 44), (16, 31)):
        changed = image.copy()
        changed[y, x] = 255
        moved = (backbone.tokens([changed])[0].tokens - quiet).abs().sum(-1) > 1e-6
        assert moved.nonzero().tolist() == [[y // 8, x // 8]]


@pytest.mark.parametrize(
    ("name", "output_stride", "stride", "offset"),
    [
        ("mobilenetv2_100", 16, 16, 0.5),  # symmetric padding: cell i sees pixel 16 i
        ("convnext_atto", None, 32, 16.0),  # convolutions that do not overlap: cells are patches
        ("tf_efficientnet_lite0", None, 32, 31.5),  # TensorFlow's padding: each stride moves the centre on
        ("regnetx_002", None, 32, 0.5),
    ],
)
def test_cnn_grid(name: str, output_stride: int | None, stride: int, offset: float) -> None:
    assert measure_grid(build_model(name, {}, output_stride, 0), name) == (stride, offset)


class RoundToTf32(TorchFunctionMode):
    """Rounds what goes into convolutions and products in float32 to ten bits of mantissa, as TF32 does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, torch.conv2d, F.linear):
            args = tuple(
                (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
                if isinstance(x, torch.Tensor) and x.dtype == torch.float32
                else x
                for x in args
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "stride", "offset"), [
    ("mobilenetv2_035", 32, 0.5), ("resnet18", 32, 0.5), ("convnext_femto", 32, 16.0),
])  # fmt: skip
def test_cnn_grid_does_not_depend_on_tf32(name: str, stride: int, offset: float) -> None:
    """The probe's coordinates reach 2048, and TF32 has eleven significant bits."""
    model = build_model(name, {}, None, 0).eval()
    with RoundToTf32():
        rounded = F.conv2d(torch.full((1, 1, 1, 1), 2047.5), torch.ones(1, 1, 1, 1)).item()
        assert measure_grid(model, name) == (stride, offset)
    assert rounded == 2048.0
    assert next(model.parameters()).dtype == torch.float32


def test_cnn_grid_agrees_with_gradients() -> None:
    """What the model, non-linear as it is, sees from one cell is centred where `measure_grid` says."""
    model = build_model("mobilenetv2_035", {}, 16, 0).eval()
    stride, offset = measure_grid(model, "mobilenetv2_035")
    generator = torch.Generator().manual_seed(0)
    centroids = []
    for _ in range(2):
        inputs = torch.randn(1, 3, 240, 240, generator=generator).requires_grad_()
        model.forward_features(inputs)[0, :, 7, 7].square().sum().backward()
        assert inputs.grad is not None
        energy = inputs.grad.square().sum((0, 1))
        pixels = torch.arange(240) + 0.5
        centroids += [(energy.sum(dim) @ pixels / energy.sum()).item() for dim in (0, 1)]
    assert abs(np.mean(centroids) - (7 * stride + offset)) < 2.5
    assert abs(np.mean(centroids) - 7.5 * stride) > 4  # and clearly not at the patch's centre


def test_a_stage_of_a_cnn(device: torch.device) -> None:
    backbone = TimmBackbone(TimmOptions("mobilenetv2_035", output_stride=16, layer=4), Device(device))
    image = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    token_map = backbone.tokens([image])[0]
    model = build_model("mobilenetv2_035", {}, 16, 0).eval().to(device)
    # The last stage is what the head convolution takes in: both ways to it agree, but for the order of sums
    # (channels are innermost in one of them).
    mean, std = (torch.tensor(model.pretrained_cfg[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    batch = (torch.from_numpy(image).to(device).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        stage = model.blocks(model.bn1(model.conv_stem(batch)))
        expected = resample_to_patches(stage, *measure_grid(model, "mobilenetv2_035", (4,)))
    assert backbone.dim == token_map.tokens.shape[2] == stage.shape[1] < model.num_features
    torch.testing.assert_close(token_map.tokens, expected[0].permute(1, 2, 0), atol=1e-4, rtol=1e-3)
    coarse = build_model("mobilenetv2_035", {}, None, 0)
    assert [measure_grid(coarse, "mobilenetv2_035", (i,))[0] for i in range(5)] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("layers", [[5], [-2], [1, 4]])
def test_a_stage_that_the_cnn_has_not(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"expected -1, its last map, or one stage of 0..4 for the CNN"):
        _ = TimmBackbone(TimmOptions("mobilenetv2_035", weights="random", layers=layers), CPU).dim


@pytest.mark.parametrize("offset", [0.5, 5.0, 8.0, 15.5])
def test_resampling_puts_a_ramp_at_patch_centres(offset: float) -> None:
    """A map that holds its cells' own coordinates holds the patches' afterwards, up to the repeated border."""
    rows, columns = (offset + 16 * torch.arange(n).float() for n in (4, 6))
    ramp = torch.stack([rows[:, None].expand(4, 6), columns.expand(4, 6)])[None]
    moved = resample_to_patches(ramp, 16, offset)
    centres = [(torch.arange(n) + 0.5) * 16 for n in (4, 6)]
    torch.testing.assert_close(moved[0, 0, 1:-1, 0], centres[0][1:-1])
    torch.testing.assert_close(moved[0, 1, 0, 1:-1], centres[1][1:-1])


def test_cnn_impulse_is_centred_on_its_patches() -> None:
    """A square on the corner of four patches is seen centred there, through the whole path of an averaging network."""
    backbone = TimmBackbone(TimmOptions("mobilenetv2_035", output_stride=16, mean=(0.0,) * 3, std=(1.0,) * 3), CPU)
    stride, offset = backbone._grid
    assert (stride, offset) == (16, 0.5)
    _linearise(backbone._model)
    image = np.zeros((40 * stride, stride, 3), np.uint8)
    for corner in (18, 21):
        changed = image.copy()
        changed[(corner - 1) * stride : (corner + 1) * stride] = 255
        seen = backbone.tokens([changed])[0].tokens.sum((1, 2)).double()
        centre = float(seen @ (torch.arange(40).double() + 0.5) / seen.sum())
        # Without the correction it would be half a cell further.
        assert abs(centre - corner) < 0.1


# Weights --------------------------------------------------------------------------------------------------------------


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    same, again, other = (make_vit(seed=seed).tokens([picture(16, 16)])[0].tokens for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(same, again)
    assert not torch.allclose(same, other, atol=1e-3)
    assert (make_vit(seed=1).digest, make_vit(seed=2).digest) == ("random-1", "random-2")


def write_weights(path: Path, seed: int = 5, **kwargs: Any) -> dict[str, torch.Tensor]:
    state = build_model("vit_tiny_patch16_224", TINY | kwargs, None, seed).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return state


def test_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "vit.safetensors"
    write_weights(file)
    monkeypatch.setenv("SOME_WEIGHTS", str(file))
    image = picture(32, 32)
    expected = make_vit(seed=5).tokens([image])[0].tokens
    for weights in (str(file), "$SOME_WEIGHTS", "${SOME_WEIGHTS}"):
        backbone = make_vit(weights=weights)
        assert torch.equal(backbone.tokens([image])[0].tokens, expected)
        assert len(backbone.digest) == 64


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    state = write_weights(file)
    save_file({key: value.half().contiguous() for key, value in state.items()}, file)
    backbone = make_vit(weights=str(file))
    tokens = backbone.tokens([picture(32, 32)])[0].tokens
    assert {p.dtype for p in backbone._model.parameters()} == {torch.float32}
    torch.testing.assert_close(tokens, make_vit(seed=5).tokens([picture(32, 32)])[0].tokens, atol=0.02, rtol=0.02)


def test_positional_embedding_of_another_size_is_resized(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    write_weights(file, img_size=64)
    assert make_vit(weights=str(file)).tokens([picture(32, 32)])[0].tokens.shape == (4, 4, 16)


def test_classifier_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "classifier.safetensors"
    state = write_weights(file)
    save_file({**state, "head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}, file)
    assert make_vit(weights=str(file)).dim == 16


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "cnn.safetensors"
    state = build_model("resnet10t", {}, None, 0).state_dict()
    save_file({k: v.contiguous() for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
    backbone = TimmBackbone(TimmOptions("resnet10t", weights=str(file)), CPU)
    assert backbone.dim == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.weight"}, r"1 missing \(norm.weight\)"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"1 unexpected \(extra.weight\)"),
        (lambda s: {**s, "norm.weight": torch.zeros(9)}, r"norm.weight \(9,\) instead of \(16,\)"),
        (lambda s: {"a": torch.zeros(1)}, r"missing \(cls_token, pos_embed, .*, \.\.\.\); 1 unexpected \(a\)"),
    ],
    ids=["missing", "unexpected", "shape", "another model"],
)
def test_weights_of_another_model(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "wrong.safetensors"
    save_file(change(write_weights(file)), file)
    with pytest.raises(ArtefactError, match=message):
        make_vit(weights=str(file)).tokens([picture(16, 16)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "nowhere.safetensors"}, MissingError, "backbone.weights: got 'nowhere.safetensors'"),
        ({"weights": "$MODUSEG_UNSET_HERE"}, MissingError, "backbone.weights.*variable MODUSEG_UNSET_HERE is not set"),
        ({"model": "vit_tiny_patch16_225"}, ConfigError, "backbone.model: got 'vit_tiny_patch16_225'.*try vit_tiny"),
        ({"model": "swin_tiny_patch4_window7_224", "model_kwargs": {}}, ConfigError, "expected a ViT .* or a CNN"),
        ({"model_kwargs": {"bogus": 1}}, ConfigError, "backbone.model_kwargs: timm refuses.*bogus"),
        ({"layer": 3}, ConfigError, r"backbone.layer: got 3, expected -3..2"),
        ({"output_stride": 16}, ConfigError, "output_stride"),
    ],
)
def test_errors_on_first_use(arguments: dict[str, Any], error: type[ModusegError], message: str) -> None:
    cfg = {"name": "timm", "model": "vit_tiny_patch16_224", "model_kwargs": TINY} | arguments
    backbone = build(cfg, CPU)
    with pytest.raises(error, match=message) as raised:
        backbone.tokens([picture(16, 16)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"short_side": 0}, "short_side: got 0"),
        ({"std": [0.5, 0.0, 0.5]}, "std: got"),
        ({"weights": ""}, "weights: got an empty text"),
        ({"mean": [0.5]}, r"backbone.mean: got \[0.5\]"),
        ({"modle": "x"}, "did you mean backbone.model"),
        ({"name": "tim"}, "expected one of"),
    ],
)
def test_errors_while_building(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "timm", "model": "vit_tiny_patch16_224"} | arguments, CPU)


@pytest.mark.parametrize(
    ("model", "hub_id"),
    [
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("vit_small_patch14_dinov2.lvd142m", "timm/vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_published_weights_have_an_id(model: str, hub_id: str) -> None:
    """That they are found, fetched and named by their digest: tests/runtime/test_hub.py."""
    assert find_pretrained_id(model) == hub_id


@pytest.mark.parametrize(
    ("model", "message"), [("vit_tiny_patch16_224.nonsense", "nonsense"), ("test_vit4", "publishes no weights")]
)
def test_unpublished_weights(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = TimmBackbone(TimmOptions(model, weights="hub"), CPU).digest


def test_published_weights_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    # What HF_HUB_OFFLINE=1 and an empty HF_HOME set; the hub's client reads them when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = TimmBackbone(TimmOptions("test_vit", weights="hub"), CPU)
    with pytest.raises(MissingError) as raised:
        backbone.tokens([picture(16, 16)])
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(
        "backbone.weights: got 'hub', but model.safetensors of timm/test_vit.r160_in1k is not here"
    )
    assert f"{tmp_path}/home/huggingface.co/timm/test_vit.r160_in1k/main" in message
    assert "https://huggingface.co/timm/test_vit.r160_in1k" in message
    assert "backbone.weights=<path of the file>" in message


# Shipped configurations -----------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"


def shipped(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def test_the_miniature_is_what_is_trained() -> None:
    from moduseg.miniature.models.vit import VIT_ARGS, VIT_MEAN, VIT_NAME, VIT_STD

    cfg = shipped("miniature")
    assert cfg["model"] == VIT_NAME
    assert cfg["model_kwargs"] == {k: v for k, v in VIT_ARGS.items() if k not in ("num_classes", "dynamic_img_size")}
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (VIT_MEAN, VIT_STD)
    assert {k: v for k, v in shipped("miniature_random").items() if k not in ("weights", "seed")} == {
        k: v for k, v in cfg.items() if k != "weights"
    }


def test_the_random_miniature_runs() -> None:
    (token_map,) = build(shipped("miniature_random"), CPU).tokens([picture(96, 128)])
    assert token_map.tokens.shape == (12, 16, 128)


def test_mobilenetv2_names_key_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODUSEG_MOBILENETV2", raising=False)
    backbone = build(shipped("mobilenetv2"), CPU)
    for use in (lambda: backbone.digest, lambda: backbone.tokens([picture(16, 16)])):
        with pytest.raises(MissingError, match=r"backbone\.weights.*MODUSEG_MOBILENETV2 is not set") as raised:
            use()
        assert "backbone.weights=hub to fetch" in str(raised.value)
        assert "https://huggingface.co/timm/mobilenetv2_100.ra_in1k" in str(raised.value)


def test_mobilenetv2_loads() -> None:
    if not Path(os.environ.get("MODUSEG_MOBILENETV2", "")).is_file():
        pytest.skip("MODUSEG_MOBILENETV2 names no file; set it to mobilenetv2_100_trunk.safetensors to run this test")
    backbone = build(shipped("mobilenetv2"), CPU)
    (token_map,) = backbone.tokens([picture(50, 70)])
    assert token_map.tokens.shape == (4, 5, 1280)
    assert (backbone.stride, backbone._grid[1]) == (16, 0.5)
