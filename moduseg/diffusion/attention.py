"""Image + prompt + time steps -> means of a diffusion model's attention, from one pass a time step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.devices import Device, copy_arrays
from moduseg.diffusion.capture import RunningMean, capture
from moduseg.diffusion.layers import MapRequest, choose_heads, list_layers
from moduseg.diffusion.model import DiffusionModel, DiffusionModelOptions
from moduseg.diffusion.prompts import Prompt, TokenizedPrompt, tokenize
from moduseg.errors import ConfigError


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the UNet looks at them.

    Attributes:
        states: `[B, L, D]` float32 outputs of the text encoder.
        tokens: the tokens of each prompt.
    """

    states: Tensor
    tokens: tuple[TokenizedPrompt, ...]


@dataclass(frozen=True)
class Attention:
    """What a UNet looked at.

    Attributes:
        maps: for each request `[B, N, K]` float32, `N` cells of its map row by row (`N = side ** 2`), `K` tokens of the
            text or cells; each row sums to 1.
        prediction: `[B, C, S, S]` float32, what the UNet predicted at the last time step, for latents of side `S`.
    """

    maps: tuple[Tensor, ...]
    prediction: Tensor


class AttentionSource:
    """Reads a text-to-image model's attention for images of any size.

    Args:
        options: which model, and how it sees an image.
        device: where it runs.
        key: the configuration key of `weights`, for messages.
    """

    def __init__(self, options: DiffusionModelOptions, device: Device, key: str = "diffusion.weights") -> None:
        self.options = options
        self.model = DiffusionModel(options, device, key)

    @property
    def digest(self) -> str:
        """Digest of the model's files."""
        return self.model.digest

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[Prompt], gain: float = 1.0) -> EncodedPrompts:
        """Return prompts as the UNet looks at them.

        A token's weight `w` moves its state away from that of the empty prompt at the same position:
        `empty + (state - empty) * w`.

        Args:
            prompts: texts; all are padded or cut off to the length of the text encoder.
            gain: factor of the states of the tokens that stand for a name (iSeg's category enhancement).

        Raises:
            DataError: words of a class are cut off.
            MissingError, ArtefactError: the weights are not there, or damaged.
        """
        model, device = self.model, self.model.device.torch_device
        length = model.text_encoder.config.max_position_embeddings
        tokens = tuple(tokenize(prompt, model.tokenizer, length) for prompt in prompts)
        states = self._encode_ids([prompt.ids for prompt in tokens])
        if any(weight != 1 for prompt in tokens for weight in prompt.weights):
            empty = self._encode_ids([tokenize(Prompt(""), model.tokenizer, length).ids])
            weights = torch.tensor([prompt.weights for prompt in tokens], device=device)[..., None]
            states = torch.where(weights == 1, states, empty + (states - empty) * weights)
        if gain != 1:
            factors = torch.ones(len(tokens), length, 1)
            for row, prompt in zip(factors, tokens, strict=True):
                row[[position for span in prompt.spans for position in span]] = gain
            states = states * factors.to(device)
        return EncodedPrompts(states, tokens)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray], noise_seed: int = 0) -> Tensor:
        """Return the latents of images, `[B, C, S, S]` float32.

        Args:
            images: `[H, W, 3]` uint8 of any size; each is squashed to a square of `image_side` pixels (bilinear).
            noise_seed: of the noise of a `sample`, which is the same for every image; a `mean` has none.

        Raises:
            MissingError, ArtefactError: the weights are not there, or damaged.
        """
        device, side = self.model.device, self.options.image_side
        squares = torch.cat(
            [
                F.interpolate(pixels.permute(2, 0, 1)[None].float(), (side, side), mode="bilinear", align_corners=False)
                for pixels in copy_arrays(images, device.torch_device)
            ]
        )
        vae = self.model.vae
        with device.autocast():
            distribution = vae.encode(squares / 127.5 - 1).latent_dist
        latents = distribution.mean.float()
        if self.options.latent == "sample":
            latents = latents + distribution.std.float() * self._draw(latents, noise_seed, stream=1)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    @torch.inference_mode()
    def collect(
        self,
        latents: Tensor,
        states: Tensor,
        requests: Sequence[MapRequest],
        *,
        steps: Sequence[int] = (100,),
        noise_seeds: Sequence[int] = (0,),
        where: str = "requests",
    ) -> Attention:
        """Add noise to latents, run the UNet once for each time step and seed, and return means of its attention.

        Args:
            latents: `[B, C, S, S]` of images, or `[1, C, S, S]` of one image for all prompts.
            states: `[B, L, D]` of prompts, or `[1, L, D]` of one prompt for all images.
            requests: which heads of which layers the maps are the means of.
            steps: time steps, from 0 (hardly any noise).
            noise_seeds: the noise is drawn anew from each seed, the same for every image.
            where: the configuration key of the requests, for messages.

        Raises:
            ConfigError: a layer, side, head or time step that the model does not have.
        """
        unet, scheduler, device = self.model.unet, self.model.scheduler, self.model.device
        num_steps = scheduler.config.num_train_timesteps
        if wrong := [step for step in steps if not 0 <= step < num_steps]:
            raise ConfigError(f"{where}: got time step {wrong[0]}, expected 0 to {num_steps - 1}; try 100")
        layers = list_layers(unet, latents.shape[-1])
        means = [RunningMean(choose_heads(layers, request, where)) for request in requests]
        size = max(len(latents), len(states))
        latents = latents.expand(size, -1, -1, -1)
        prediction = latents
        with capture(unet, means):
            for step in steps:
                for seed in noise_seeds:
                    noise = self._draw(latents, seed)
                    time_step = torch.full((size,), step, dtype=torch.int64, device=latents.device)
                    noisy = scheduler.add_noise(latents, noise, time_step)
                    with device.autocast():
                        prediction = unet(
                            noisy, time_step, encoder_hidden_states=states.expand(size, -1, -1), return_dict=False
                        )[0]
        return Attention(tuple(mean.compute() for mean in means), prediction.float())

    def _encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the text encoder's outputs `[B, L, D]` float32 for `B` lists of `L` tokens."""
        device = self.model.device
        tokens = torch.tensor(ids, dtype=torch.int64, device=device.torch_device)
        with device.autocast():
            output = self.model.text_encoder(input_ids=tokens)
        return output.last_hidden_state.float()

    def _draw(self, latents: Tensor, seed: int, stream: int = 0) -> Tensor:
        """Return noise `[1, C, S, S]` for latents, drawn on the CPU so that it is the same on every device.

        Args:
            latents: `[B, C, S, S]`.
            seed: of the noise.
            stream: draws of several kinds from one seed differ by it; 0 or more.
        """
        # The first stream is the plain seed's, as the published code draws its noise.
        generator = torch.Generator().manual_seed(seed + (stream << 32))
        noise = torch.randn(1, *latents.shape[1:], generator=generator)
        return noise.to(latents.device)
