"""Several layers, queries and keys, windows: what they hold, and that nothing shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Identity

from moduseg.backbones import build
from moduseg.backbones.facets import sum_query_and_key
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.backbones.timm_model import build_model
from moduseg.backbones.windows import encode_windows, list_window_starts
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError
from tests.backbones.contract import BackboneContract, picture
from tests.support.agreement import randomise
from tests.support.devices import CPU
from tests.support.tiny_vit import TINY, make_vit

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def tokens(backbone: Any, image: np.ndarray) -> Tensor:
    result: Tensor = backbone.tokens([image])[0].tokens
    return result


class TestWindows(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return make_vit(device, window=32, stride=24, batch_size=3)


class TestQueriesAndKeys(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return make_vit(device, facet="qk", layers=[0, -1])


class TestEva(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return TimmBackbone(TimmOptions("eva02_tiny_patch14_224", model_kwargs=SMALL), Device(device))


class TestSiglip(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        return TimmBackbone(
            TimmOptions("vit_base_patch16_siglip_224", model_kwargs={**SMALL, "img_size": 48}), Device(device)
        )


class TestRadio(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> TimmBackbone:
        kwargs = {**SMALL, "mlp_ratio": 4.0}
        return TimmBackbone(TimmOptions("naflexvit_so400m_patch16_radio_v4", model_kwargs=kwargs), Device(device))


# Layers ---------------------------------------------------------------------------------------------------------------


def test_layers_stand_side_by_side_at_length_one(device: torch.device) -> None:
    image = picture(32, 40)
    several = tokens(make_vit(device, layers=[2, -3]), image)
    single = [F.normalize(tokens(make_vit(device, layer=layer), image), dim=-1) for layer in (2, 0)]
    torch.testing.assert_close(several, torch.cat(single, dim=-1), atol=1e-6, rtol=1e-5)
    assert make_vit(device, layers=[2, -3]).dim == 32


def test_one_layer_in_a_list_is_that_layer() -> None:
    image = picture(32, 32)
    assert torch.equal(tokens(make_vit(layers=[1]), image), tokens(make_vit(layer=1), image))


def test_final_norm_after_the_pooling_is_applied_to_each_layer() -> None:
    """EVA-02 has its norm there; the output of a fresh norm has mean 0."""
    several = tokens(
        TimmBackbone(TimmOptions("eva02_tiny_patch14_224", model_kwargs=SMALL, layers=[0, 1]), CPU), picture(28, 28)
    )
    torch.testing.assert_close(several.unflatten(-1, (2, 32)).mean(-1), torch.zeros(2, 2, 2), atol=1e-6, rtol=0)


# Queries and keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_tiny_patch16_224", TINY | {"qk_norm": True, "qkv_bias": False}),
        ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28}),
        ("eva02_tiny_patch14_224", SMALL),  # rotary, queries and keys apart
        ("eva02_base_patch16_clip_224", SMALL),  # rotary, fused or not
        ("eva_giant_patch14_224", {**SMALL, "qkv_fused": True}),  # fused, with biases of their own
        ("vit_small_patch16_dinov3", SMALL),  # rotary, fused, without biases
        ("vit_small_patch16_dinov3_qkvb", SMALL),
        ("vit_small_patch16_rope_mixed_224", {**SMALL, "img_size": 32}),
        ("naflexvit_base_patch16_gap", SMALL),
    ],
)
@pytest.mark.parametrize("layer", [-1, 0])
def test_query_plus_key_is_what_enters_the_attention(model: str, kwargs: dict[str, Any], layer: int) -> None:
    """A hook after the norms of queries and keys, before rotary positions, sees the same."""
    backbone = TimmBackbone(TimmOptions(model, model_kwargs=kwargs, facet="qk", layer=layer), CPU)
    inner = randomise(backbone._model)
    attention = inner.blocks[layer].attn
    seen: list[Tensor] = []
    hooks = [
        getattr(attention, name).register_forward_hook(lambda *call: seen.append(call[2]))
        for name in ("q_norm", "k_norm")
    ]
    side = backbone.stride
    inputs = torch.randn(1, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = backbone._sum_queries_and_keys(inputs)
        seen.clear()
        inner.forward_intermediates(inputs, intermediates_only=True)
    for hook in hooks:
        hook.remove()
    query, key = (part.transpose(1, 2).flatten(2)[:, inner.num_prefix_tokens :] for part in seen)
    torch.testing.assert_close(ours.flatten(1, 2), query + key, atol=1e-5, rtol=1e-5)


def test_the_facet_has_length_one_and_the_models_width() -> None:
    backbone = make_vit(facet="qk")
    vectors = tokens(backbone, picture(20, 30))
    assert backbone.dim == vectors.shape[-1] == 16
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3, 4))


def test_hooks_are_taken_off() -> None:
    backbone = make_vit(facet="qk")
    tokens(backbone, picture(16, 16))
    assert not any(block.attn._forward_pre_hooks for block in backbone._model.blocks)


def test_queries_and_keys_of_the_biases_alone() -> None:
    """With no weights what is left of a fused projection is its first two biases."""
    attention = build_model("vit_tiny_patch16_224", TINY, None, 0).blocks[0].attn.requires_grad_(False)
    assert isinstance(attention.q_norm, Identity)
    attention.qkv.weight.zero_()
    attention.qkv.bias.copy_(torch.arange(48.0))
    expected = (torch.arange(16.0) + torch.arange(16.0, 32.0)).expand(1, 5, 16)
    assert torch.equal(sum_query_and_key(attention, torch.ones(1, 5, 16)), expected)


def test_facet_wants_queries_and_keys() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    parallel = make_vit(facet="qk", model_kwargs={"block_fn": ParallelScalingBlock})
    cnn = TimmBackbone(TimmOptions("mobilenetv2_035", facet="qk"), CPU)
    for backbone, what in ((parallel, "NoneType"), (cnn, "no")):
        with pytest.raises(ConfigError, match=rf"facet: got 'qk' .* has {what} attention, expected .* fused qkv"):
            tokens(backbone, picture(16, 16))


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "window", "step", "starts"),
    [
        (3, 4, 2, [0]),
        (4, 4, 2, [0]),
        (5, 4, 2, [0, 1]),
        (9, 4, 2, [0, 2, 4, 5]),
        (8, 4, 4, [0, 4]),
        (9, 4, 4, [0, 4, 5]),
    ],
)
def test_window_starts(cells: int, window: int, step: int, starts: list[int]) -> None:
    assert list_window_starts(cells, window, step) == starts
    assert {c for s in starts for c in range(s, min(s + window, cells))} == set(range(cells))


@pytest.mark.parametrize(("window", "step"), [(2, 1), (3, 2), (4, 4), (5, 3), (7, 7), (9, 1)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_shift_nothing(window: int, step: int, batch_size: int, device: torch.device) -> None:
    """Each patch's own mean comes back in its own place, whatever the windows."""
    images = torch.randn(2, 3, 7 * 4, 9 * 4, generator=torch.Generator().manual_seed(0)).to(device)

    def means(crops: Tensor) -> Tensor:
        assert len(crops) <= max(batch_size, 2)
        return F.avg_pool2d(crops, 4).permute(0, 2, 3, 1)

    ours = encode_windows(images, means, patch=4, window=window, step=step, batch_size=batch_size)
    torch.testing.assert_close(ours, means(images))


def test_overlaps_are_averaged() -> None:
    """A row of five patches in windows of three at a step of two: the third is in both."""
    numbers = iter((10.0, 20.0))
    result = encode_windows(
        torch.zeros(1, 3, 2, 10),
        lambda crops: torch.full((1, 1, crops.shape[3] // 2, 1), next(numbers)),
        patch=2,
        window=3,
        step=2,
        batch_size=1,
    )
    assert result.flatten().tolist() == [10, 10, 15, 20, 20]


def test_an_image_that_fits_is_seen_whole() -> None:
    image = picture(32, 27)
    assert torch.equal(tokens(make_vit(window=32), image), tokens(make_vit(), image))


def test_windows_are_images_of_their_own() -> None:
    image = picture(32, 48)
    left, right = (tokens(make_vit(), image[:, columns]) for columns in (slice(0, 32), slice(16, 48)))
    expected = torch.cat([left[:, :2], (left[:, 2:] + right[:, :2]) / 2, right[:, 2:]], dim=1)
    torch.testing.assert_close(tokens(make_vit(window=32, stride=16), image), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens(make_vit(window=32), image), expected, atol=1e-5, rtol=1e-5)  # half a window


def test_lengths_are_taken_after_the_average() -> None:
    vectors = tokens(make_vit(window=32, stride=8, layers=[0, 2]), picture(40, 56))
    torch.testing.assert_close(vectors.unflatten(-1, (2, 16)).norm(dim=-1), torch.ones(5, 7, 2))


@pytest.mark.parametrize("options", [{"window": 24, "stride": 16}, {"window": 16}, {"layers": [0, 2]}, {}])
def test_an_impulse_moves_its_own_patch(options: dict[str, Any], device: torch.device) -> None:
    """Without attention, a changed pixel moves the token of its patch and no other."""
    backbone = make_vit(device, **options)
    for block in backbone._model.blocks:
        block.attn.proj.weight.zero_()
    image = np.zeros((45, 70, 3), np.uint8)
    quiet = tokens(backbone, image)
    for y, x in ((0, 0), (7, 8), (44, 69), (23, 24), (24, 39)):
        changed = image.copy()
        changed[y, x] = 255
        moved = (tokens(backbone, changed) - quiet).abs().sum(-1) > 1e-6
        assert moved.nonzero().tolist() == [[y // 8, x // 8]]


@pytest.mark.parametrize("options", [{}, {"window": 24, "stride": 16}])
def test_an_impulse_moves_its_own_query_and_key(options: dict[str, Any]) -> None:
    """What enters the first block knows its own patch only."""
    backbone = make_vit(facet="qk", layer=0, **options)
    image = np.zeros((45, 70, 3), np.uint8)
    quiet = tokens(backbone, image)
    for y, x in ((0, 0), (7, 8), (44, 69), (24, 39)):
        changed = image.copy()
        changed[y, x] = 255
        moved = (tokens(backbone, changed) - quiet).abs().sum(-1) > 1e-6
        assert moved.nonzero().tolist() == [[y // 8, x // 8]]


@pytest.mark.parametrize("options", [{}, {"window": 24}])
def test_resizing_keeps_places(options: dict[str, Any]) -> None:
    """A square that is one patch of the resized input is seen there, and beyond by its neighbours alone."""
    backbone = make_vit(short_side=40, mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    for block in backbone._model.blocks:
        block.attn.proj.weight.zero_()
    backbone._model.pos_embed.zero_()
    image = np.zeros((80, 112, 3), np.uint8)
    quiet = tokens(backbone, image)
    changed = image.copy()
    changed[32:48, 64:80] = 255  # rows 16..24, columns 32..40 of the 40 x 56 input: patch (2, 4)
    moved = (tokens(backbone, changed) - quiet).abs().sum(-1)
    assert moved.flatten().argmax() == 2 * 7 + 4
    assert (moved > 1e-4).nonzero().amin(0).tolist() >= [1, 3]
    assert (moved > 1e-4).nonzero().amax(0).tolist() <= [3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 30}, r"backbone\.window: got 30, expected a multiple of the patch of 8 pixels.*try 32"),
        ({"window": 32, "stride": 12}, r"backbone\.stride: got 12, expected a multiple of the patch of 8.*try 16"),
        ({"layers": [0, -3]}, r"backbone\.layers: got \[0, -3\], which names a block .* twice"),
        ({"layers": [0, 3]}, r"backbone\.layer: got 3, expected -3\.\.2"),
    ],
)
def test_errors_on_first_use(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        tokens(make_vit(**options), picture(40, 40))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 8}, "stride: got 8, expected 1 to the window's None"),
        ({"window": 16, "stride": 24}, "stride: got 24, expected 1 to the window's 16"),
        ({"window": 0}, "window: got 0"),
        ({"layers": []}, r"layers: got \[\] .* expected one block or more"),
        ({"layers": [0], "layer": 1}, "layers: got .* beside layer=1"),
        ({"facet": "keys"}, r"facet: got 'keys'.*one of tokens, qk"),
        ({"antialias": "yes"}, "antialias: got 'yes'"),
    ],
)
def test_errors_while_building(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "timm", "model": "vit_tiny_patch16_224"} | options, CPU)


# Models ---------------------------------------------------------------------------------------------------------------


def test_radio_of_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resampled for one input size.*try naflexvit_so400m_patch16_radio_v4"):
        tokens(TimmBackbone(TimmOptions("vit_so400m_patch16_radio_v4", model_kwargs=SMALL), CPU), picture(16, 16))


def test_pooling_that_is_not_built_is_left_out(tmp_path: Path) -> None:
    """SigLIP's files hold an attention pool, which a model of tokens need not have."""
    kwargs = {**SMALL, "img_size": 48}
    state = build_model("vit_base_patch16_siglip_224", kwargs, None, 0).state_dict()
    assert any(name.startswith("attn_pool.") for name in state)
    file = tmp_path / "siglip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    backbone = TimmBackbone(TimmOptions("vit_base_patch16_siglip_gap_224", weights=str(file), model_kwargs=kwargs), CPU)
    full = TimmBackbone(TimmOptions("vit_base_patch16_siglip_224", weights=str(file), model_kwargs=kwargs), CPU)
    assert torch.equal(tokens(backbone, picture(48, 48)), tokens(full, picture(48, 48)))


def test_revision_of_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = TimmBackbone(TimmOptions("test_vit", weights="hub", revision="abc123"), CPU)
    with pytest.raises(MissingError, match=r"timm/test_vit\.r160_in1k.*abc123"):
        tokens(backbone, picture(16, 16))
