"""The last block's variants: what each must be equal to, or add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moduseg.backbones.clip_attention import (
    AFFINITY_VARIANTS,
    VARIANTS,
    Affinity,
    compute_attention,
    compute_proxy_attention,
    cosine_similarity,
    encode_patches,
    make_gaussian_kernel,
    mix_values,
    run_blocks,
    run_last_block,
)

GRID = (5, 7)


def make_clip(device: torch.device, act: str = "quick_gelu") -> Any:
    """Two blocks of width 32, patch 4, pre-trained size 16."""
    from transformers import CLIPConfig, CLIPModel

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**width, "image_size": 16, "patch_size": 4, "hidden_act": act}
    text = {**width, "vocab_size": 64, "max_position_embeddings": 8}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        # Larger weights than the usual start, so that attention is far from even.
        for parameter in model.vision_model.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False).to(device)


@pytest.fixture
def clip(device: torch.device) -> Any:
    return make_clip(device)


@pytest.fixture
def pixels(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4 * GRID[0], 4 * GRID[1], generator=generator).to(device)


def layer_of(clip: Any) -> Any:
    return clip.vision_model.encoder.layers[-1]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_plain_is_the_models_own_forward(act: str, device: torch.device, pixels: torch.Tensor) -> None:
    clip = make_clip(device, act)
    output = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    states = run_blocks(clip, pixels)
    for ours, theirs in zip(states, output.hidden_states, strict=False):
        torch.testing.assert_close(ours, theirs)
    assert len(states) == 2
    expected = clip.visual_projection(clip.vision_model.post_layernorm(output.last_hidden_state[:, 1:]))
    torch.testing.assert_close(encode_patches(clip, pixels).flatten(1, 2), expected)
    unprojected = encode_patches(clip, pixels, project=False)
    assert unprojected.shape == (2, *GRID, 32)
    torch.testing.assert_close(
        clip.vision_model.post_layernorm(output.last_hidden_state[:, 1:]), unprojected.flatten(1, 2)
    )


def test_the_pretrained_size_needs_no_interpolation(clip: Any, device: torch.device) -> None:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    expected = clip.vision_model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(
        encode_patches(clip, pixels).flatten(1, 2), clip.visual_projection(clip.vision_model.post_layernorm(expected))
    )


def test_identity_attention_is_the_value_alone(clip: Any, pixels: torch.Tensor) -> None:
    hidden = run_blocks(clip, pixels)[-1]
    layer = layer_of(clip)
    value = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden[:, 1:]))).unflatten(1, GRID)
    torch.testing.assert_close(run_last_block(clip, hidden, GRID, "maskclip"), value)
    identity = torch.eye(GRID[0] * GRID[1], device=hidden.device).expand(2, -1, -1)
    torch.testing.assert_close(mix_values(layer, hidden, GRID, identity), value)


@pytest.mark.parametrize(("variant", "total"), [("sclip", 2.0), ("clearclip", 1.0), ("naclip", 1.0)])
def test_rows_of_attention(variant: str, total: float, clip: Any, pixels: torch.Tensor) -> None:
    weights = compute_attention(layer_of(clip), run_blocks(clip, pixels)[-1], GRID, variant)
    assert weights.shape == (2, 4, 36, 36)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], total))
    assert weights.std() > 1e-3


def test_attention_by_plain_loops(clip: Any, pixels: torch.Tensor) -> None:
    """Each variant's weights for one head and one query, written out."""
    hidden = run_blocks(clip, pixels)[-1]
    layer = layer_of(clip)
    normed = layer.layer_norm1(hidden)[0]
    query, key = (proj(normed)[:, 8:16] for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    row = 12
    qq, kk = (torch.stack([(x[row] * other).sum() for other in x]) * 8**-0.5 for x in (query, key))
    kernel = torch.zeros(36, device=hidden.device)
    for other in range(35):
        down, across = other // 7 - (row - 1) // 7, other % 7 - (row - 1) % 7
        kernel[other + 1] = torch.exp(torch.tensor(-(down**2 + across**2) / (2 * 3.0**2)))
    for variant, expected in (
        ("clearclip", qq.softmax(0)),
        ("sclip", qq.softmax(0) + kk.softmax(0)),
        ("naclip", (kk + kernel).softmax(0)),
    ):
        ours = compute_attention(layer, hidden, GRID, variant, gaussian_std=3.0)[0, 1, row]
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_sclip_keeps_residual_and_mlp(clip: Any, pixels: torch.Tensor) -> None:
    hidden = run_blocks(clip, pixels)[-1]
    layer = layer_of(clip)
    weights = compute_attention(layer, hidden, GRID, "sclip")
    value = layer.self_attn.v_proj(layer.layer_norm1(hidden)).view(2, 36, 4, 8).permute(0, 2, 1, 3)
    mixed = layer.self_attn.out_proj((weights @ value).permute(0, 2, 1, 3).reshape(2, 36, 32)) + hidden
    expected = mixed + layer.mlp(layer.layer_norm2(mixed))
    torch.testing.assert_close(run_last_block(clip, hidden, GRID, "sclip").flatten(1, 2), expected[:, 1:])


def test_variants_differ(clip: Any, pixels: torch.Tensor) -> None:
    similarity = cosine_similarity(torch.randn(2, *GRID, 6, generator=torch.Generator().manual_seed(3)))
    regions = torch.arange(35, device=pixels.device).expand(2, -1) // 10
    affinity = Affinity(similarity.to(pixels.device), regions=regions)
    results = [encode_patches(clip, pixels, v, affinity if v in AFFINITY_VARIANTS else None) for v in VARIANTS]
    for i, first in enumerate(results):
        assert first.shape == (2, *GRID, 24)
        assert first.isfinite().all()
        for second in results[:i]:
            assert (first - second).abs().max() > 1e-3


def test_naclip_kernel(device: torch.device) -> None:
    kernel = make_gaussian_kernel((3, 5), 2.0, device)
    assert kernel.shape == (15, 15)
    torch.testing.assert_close(kernel, kernel.T)
    torch.testing.assert_close(kernel.diagonal(), torch.ones(15, device=device))
    assert kernel[0, 1].item() == pytest.approx(torch.exp(torch.tensor(-1 / 8)).item())
    assert kernel[0, 5].item() == pytest.approx(kernel[0, 1].item())
    assert kernel[0, 6] < kernel[0, 1]


class TestProxy:
    def test_rows_and_negatives(self, device: torch.device) -> None:
        similarity = cosine_similarity(torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))).to(device)
        weights = compute_proxy_attention(Affinity(similarity))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16, device=device))
        below = similarity < 1.2 * similarity.mean((1, 2), keepdim=True)
        assert below.any()
        assert (weights[below] == 0).all()
        assert (weights[~below] > 0).all()
        row = 3.0 * (similarity[0, 2] - 1.2 * similarity[0].mean())
        torch.testing.assert_close(weights[0, 2], row.masked_fill(row < 0, -torch.inf).softmax(0))

    def test_patches_that_all_look_alike_see_themselves(self) -> None:
        weights = compute_proxy_attention(Affinity(torch.ones(1, 6, 6)))
        torch.testing.assert_close(weights[0], torch.eye(6))

    def test_values_on_a_finer_grid(self, clip: Any, pixels: torch.Tensor) -> None:
        """Twice as fine: the affinity's grid decides the result's, and values are those of bilinear upsampling."""
        hidden = run_blocks(clip, pixels)[-1]
        layer = layer_of(clip)
        rows, columns = (doubled(side).to(pixels.device) for side in GRID)
        identity = torch.eye(4 * GRID[0] * GRID[1], device=pixels.device).expand(2, -1, -1)
        ours = mix_values(layer, hidden, GRID, identity, rows=rows, columns=columns)
        value = layer.self_attn.v_proj(layer.layer_norm1(hidden[:, 1:])).unflatten(1, GRID).permute(0, 3, 1, 2)
        finer = torch.nn.functional.interpolate(value, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, layer.self_attn.out_proj(finer.permute(0, 2, 3, 1)), atol=1e-5, rtol=1e-4)


def doubled(side: int) -> torch.Tensor:
    from moduseg.backbones.clip import make_resampling_weights

    return make_resampling_weights(2 * side, 2.0, side, 4.0, torch.device("cpu"))


def test_mistakes(clip: Any, pixels: torch.Tensor) -> None:
    hidden = run_blocks(clip, pixels)[-1]
    with pytest.raises(ValueError, match=r"variant: got 'dense', expected one of plain, maskclip"):
        encode_patches(clip, pixels, "dense")
    with pytest.raises(ValueError, match=r"proxyclip and corrclip need an affinity"):
        encode_patches(clip, pixels, "proxyclip")
    with pytest.raises(ValueError, match=r"take none"):
        encode_patches(clip, pixels, "naclip", Affinity(torch.ones(2, 35, 35)))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\), expected \[B, n, n\] for 5 x 7 patches"):
        run_last_block(clip, hidden, GRID, "proxyclip", Affinity(torch.ones(2, 4, 4)))
    with pytest.raises(ValueError, match=r"expected sclip, clearclip or naclip"):
        compute_attention(layer_of(clip), hidden, GRID, "plain")
