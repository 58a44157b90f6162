"""Captured attention against an implementation that stores all of it; latents; prompts; noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moduseg.devices import Device
from moduseg.diffusion.attention import AttentionSource, EncodedPrompts
from moduseg.diffusion.layers import MapRequest, list_layers
from moduseg.diffusion.prompts import Prompt, write_prompt
from moduseg.errors import ConfigError
from tests.support.devices import CPU
from tests.support.pretend_cuda import CUDA, pretend_cuda
from tests.support.tiny_diffusion import HEADS, LATENT_SIDE, LENGTH, tiny_source

Words = tuple[Path, int, int]
ALL_CROSS = [MapRequest(kind="cross", side=side) for side in (2, 4, 8, 16)]
ALL_SELF = [MapRequest(kind="self", side=side) for side in (2, 4, 8, 16)]


def picture(height: int = 30, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def source(words: Words) -> AttentionSource:
    return tiny_source(words)


@pytest.fixture(scope="module")
def encoded(source: AttentionSource) -> EncodedPrompts:
    return source.encode_prompts([write_prompt({"a": "red disc", "b": "ring"}), write_prompt({"b": "ring"})])


class StoreEverything(nn.Module):
    """A plain processor: keeps `[B, heads, N, K]` of every layer, and computes the output from it."""

    def __init__(self, stored: list[Tensor]) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = [
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        ]
        scores = torch.einsum("bhnd,bhkd->bhnk", heads[0], heads[1]) / heads[0].shape[-1] ** 0.5
        self.stored.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
        mixed = torch.einsum("bhnk,bhkd->bhnd", self.stored[-1], heads[2])
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def store_everything(source: AttentionSource, latents: Tensor, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return `[B, heads, N, K]` of every layer by its name, and the prediction, at time step 100 with seed 0."""
    unet = source.model.unet
    layers = list_layers(unet, LATENT_SIDE)
    stored: list[Tensor] = []
    before = unet.attn_processors
    unet.set_attn_processor(StoreEverything(stored))
    size = max(len(latents), len(states))
    noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    noisy = source.model.scheduler.add_noise(latents, noise, torch.tensor([100]))
    with torch.inference_mode():
        prediction = unet(noisy.expand(size, -1, -1, -1), 100, states.expand(size, -1, -1)).sample
    unet.set_attn_processor(before)
    assert len(stored) == len(layers)
    return {layer.name: attention for layer, attention in zip(layers, stored, strict=True)}, prediction


@pytest.mark.parametrize("num_images", [1, 2])
def test_sums_are_those_of_stored_attention(
    num_images: int, source: AttentionSource, encoded: EncodedPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moduseg.diffusion.capture._BLOCK", 1000)  # several blocks of rows
    latents = source.encode_images([picture(seed=seed) for seed in range(num_images)])
    stored, prediction = store_everything(source, latents, encoded.states)
    requests = [*ALL_CROSS, *ALL_SELF]
    attention = source.collect(latents, encoded.states, requests)
    layers = list_layers(source.model.unet, LATENT_SIDE)
    for request, maps in zip(requests, attention.maps, strict=True):
        chosen = [stored[layer.name] for layer in layers if (layer.kind, layer.side) == (request.kind, request.side)]
        torch.testing.assert_close(maps, torch.cat(chosen, 1).mean(1))
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
        num_cells = (request.side or 0) ** 2
        assert maps.shape == (2, num_cells, LENGTH if request.kind == "cross" else num_cells)
    torch.testing.assert_close(attention.prediction, prediction)


def test_output_is_that_of_the_stock_processors(source: AttentionSource, encoded: EncodedPrompts) -> None:
    latents = source.encode_images([picture()])
    plain = source.collect(latents, encoded.states, [])
    captured = source.collect(latents, encoded.states, [*ALL_CROSS, *ALL_SELF])
    assert torch.equal(plain.prediction, captured.prediction)
    processors = {type(p).__name__ for p in source.model.unet.attn_processors.values()}
    assert processors == {"AttnProcessor2_0"}


@pytest.mark.parametrize(("request_", "expected"), [
    pytest.param(MapRequest(kind="cross", places=("up2.1", "down1.0")), [("down1.0", 0), ("down1.0", 1),
                 ("up2.1", 0), ("up2.1", 1)], id="places in the order of the pass"),
    pytest.param(MapRequest(kind="cross", side=4, heads=(1, 4, 5)), [("down2.0", 1), ("up1.1", 0), ("up1.1", 1)],
                 id="heads counted through"),
    pytest.param(MapRequest(kind="self", places=("up3.1",), heads=(1,)), [("up3.1", 1)], id="one head"),
    pytest.param(MapRequest(kind="self", places=("up3.0", "up2.0"), side=8), [("up2.0", 0), ("up2.0", 1)],
                 id="places of one side"),
])  # fmt: skip
def test_heads_of_a_request(
    request_: MapRequest, expected: list[tuple[str, int]], source: AttentionSource, encoded: EncodedPrompts
) -> None:
    latents = source.encode_images([picture()])
    stored, _ = store_everything(source, latents, encoded.states)
    names = {(layer.place, layer.kind): layer.name for layer in list_layers(source.model.unet, LATENT_SIDE)}
    heads = [stored[names[place, request_.kind]][:, head] for place, head in expected]
    (maps,) = source.collect(latents, encoded.states, [request_]).maps
    torch.testing.assert_close(maps, torch.stack(heads).mean(0))


@pytest.mark.parametrize(("request_", "message"), [
    pytest.param(MapRequest(kind="cross", places=("up9.0",)), r"got place 'up9\.0', expected some of down0\.0, .*mid",
                 id="a place"),
    pytest.param(MapRequest(kind="self", side=64), r"got side 64, expected one of 2, 4, 8, 16", id="a side"),
    pytest.param(MapRequest(kind="cross", side=2, heads=(HEADS,)), r"got heads \[2\], expected some of 0 to 1",
                 id="a head"),
    pytest.param(MapRequest(kind="cross"), r"got layers with sides 2, 4, 8, 16, expected one side", id="no side"),
])  # fmt: skip
def test_what_the_model_lacks_is_named(
    request_: MapRequest, message: str, source: AttentionSource, encoded: EncodedPrompts
) -> None:
    latents = torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE)
    with pytest.raises(ConfigError, match=rf"^here: {message}"):
        source.collect(latents, encoded.states, [request_], where="here")


def test_a_time_step_beyond_the_schedule_is_refused(source: AttentionSource, encoded: EncodedPrompts) -> None:
    with pytest.raises(ConfigError, match=r"got time step 1000, expected 0 to 999"):
        source.collect(torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE), encoded.states, [], steps=[1000])


def test_steps_and_seeds_are_averaged(source: AttentionSource, encoded: EncodedPrompts) -> None:
    latents = source.encode_images([picture()])
    single = [
        source.collect(latents, encoded.states, ALL_SELF, steps=[step], noise_seeds=[seed]).maps
        for step in (10, 200)
        for seed in (0, 7)
    ]
    together = source.collect(latents, encoded.states, ALL_SELF, steps=[10, 200], noise_seeds=[0, 7]).maps
    for number, maps in enumerate(together):
        torch.testing.assert_close(maps, torch.stack([maps_of_pass[number] for maps_of_pass in single]).mean(0))
    assert not torch.allclose(single[0][3], single[1][3], rtol=1e-4)
    assert not torch.allclose(single[0][3], single[2][3], rtol=1e-4)


def test_images_and_prompts_of_a_batch_do_not_mix(source: AttentionSource, encoded: EncodedPrompts) -> None:
    latents = source.encode_images([picture(seed=1), picture(9, 12, seed=2)])
    together = source.collect(latents, encoded.states, ALL_CROSS).maps
    for row in range(2):
        alone = source.collect(latents[row : row + 1], encoded.states[row : row + 1], ALL_CROSS).maps
        for maps, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(maps[row], expected[0])


@pytest.mark.parametrize("size", [(30, 50), (1, 1), (1, 77), (300, 1), (128, 128)])
def test_any_image_becomes_a_square(size: tuple[int, int], source: AttentionSource) -> None:
    latents = source.encode_images([picture(*size)])
    assert latents.shape == (1, 4, LATENT_SIDE, LATENT_SIDE)
    assert latents.isfinite().all()


def test_latents_are_scaled_means(source: AttentionSource) -> None:
    pixels = torch.from_numpy(picture(128, 128)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        mean = source.model.vae.encode(pixels * 2 - 1).latent_dist.mean
    torch.testing.assert_close(source.encode_images([picture(128, 128)]), mean * 0.18215)


def test_samples_follow_their_seed(words: Words, source: AttentionSource) -> None:
    sampling = tiny_source(words, latent="sample")
    first, again, other = (sampling.encode_images([picture(), picture()], seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, other)
    assert not torch.equal(first[:1], source.encode_images([picture()]))


def test_weights_move_states_away_from_the_empty_prompt(source: AttentionSource) -> None:
    prompt = write_prompt({"a": "red disc"}, num_pluses=2)
    assert prompt.weight == pytest.approx(1.21)
    plain = source.encode_prompts([Prompt(prompt.text, prompt.names, prompt.ranges)])
    weighted = source.encode_prompts([prompt])
    empty = source.encode_prompts([Prompt("")]).states
    span = list(weighted.tokens[0].spans[0])
    expected = plain.states.clone()
    expected[:, span] = empty[:, span] + (plain.states - empty)[:, span] * 1.21
    torch.testing.assert_close(weighted.states, expected)
    assert span == [4, 5]


def test_gain_multiplies_the_words_alone(source: AttentionSource) -> None:
    prompts = [write_prompt({"a": "red disc", "b": "ring"}), write_prompt({"b": "ring"})]
    plain, louder = source.encode_prompts(prompts), source.encode_prompts(prompts, gain=1.6)
    ratio = (louder.states / plain.states).median(-1).values
    for row, spans in zip(ratio, ([4, 5, 7], [4]), strict=True):
        expected = torch.ones(LENGTH)
        expected[spans] = 1.6
        torch.testing.assert_close(row, expected)
    assert torch.equal(source.encode_prompts(prompts, gain=1.0).states, plain.states)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precisions_on_a_pretended_gpu(precision: str, words: Words) -> None:
    def run(device: Device) -> list[Tensor]:
        source = tiny_source(words, device)
        states = source.encode_prompts([write_prompt({"a": "red disc"})]).states
        attention = source.collect(source.encode_images([picture()]), states, [*ALL_CROSS, *ALL_SELF])
        return [*attention.maps, attention.prediction]

    expected = run(CPU)
    with torch.inference_mode(), pretend_cuda():
        results = run(Device(CUDA, precision))
        assert {tensor.device for tensor in results} == {CUDA}
        results = [tensor.cpu() for tensor in results]
    tolerance = 1e-4 if precision == "float32" else 0.05
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert (result - reference).norm() <= tolerance * reference.norm()
