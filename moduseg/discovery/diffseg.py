"""DiffSeg: segments from the self-attention of a text-to-image model that is told nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.diffusion.attention import AttentionSource
from moduseg.diffusion.layers import MapRequest, list_layers
from moduseg.diffusion.model import DiffusionModelOptions
from moduseg.diffusion.prompts import Prompt
from moduseg.discovery.base import MAX_SEGMENTS, Discoverer
from moduseg.discovery.merging import aggregate_levels, choose_anchors, label_pixels, merge_maps
from moduseg.errors import ConfigError
from moduseg.structures import Sample, TokenMap

KEY = "discoverer"
"""Where these discoverers are configured, for messages."""


@dataclass(frozen=True, kw_only=True)
class DiffSegOptions(DiffusionModelOptions):
    """Settings of `DiffSegDiscoverer`.

    Attributes:
        steps: time steps; attention is averaged over them.
        noise_seeds: attention is averaged over the noise of each seed, which is the same for every image.
        sides: sides of the self-attention in cells; those of all layers if omitted.
        grid: anchors on a side of the largest map.
        tau: maps that are nearer to each other merge (half the symmetric Kullback-Leibler divergence).
        rounds: of merging.

    Raises:
        ValueError: a value out of range.
    """

    steps: tuple[int, ...] = (300,)
    noise_seeds: tuple[int, ...] = (0,)
    sides: tuple[int, ...] | None = None
    grid: int = 16
    tau: float = 1.1
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps: got {list(self.steps)}, expected one or more from 0 on; DiffSeg has [300]")
        if not self.noise_seeds or min(self.noise_seeds) < 0:
            raise ValueError(f"noise_seeds: got {list(self.noise_seeds)}, expected one or more from 0 on; try [0]")
        if self.sides is not None and not self.sides:
            raise ValueError("sides: got none, expected one or more, or null for all; DiffSeg has [8, 16, 32, 64]")
        if not 1 <= self.grid**2 <= MAX_SEGMENTS + 1:
            raise ValueError(f"grid: got {self.grid}, expected 1 to 16; DiffSeg has 16")
        if self.tau < 0:
            raise ValueError(f"tau: got {self.tau}, expected 0 or more; DiffSeg has 1.1 for COCO-Stuff")
        if self.rounds < 1:
            raise ValueError(f"rounds: got {self.rounds}, expected 1 or more; DiffSeg has 3")


class DiffSegDiscoverer(Discoverer):
    """Merges the maps of self-attention that resemble each other (Tian et al., 2024).

    The empty prompt and one pass of the UNet; self-attention of all layers, weighted by their sides, is brought to the
    largest of them. The backbone's tokens are not looked at.

    Args:
        options: model, noise and merging.
        device: where everything runs.
    """

    def __init__(self, options: DiffSegOptions, device: Device) -> None:
        self._options = options
        self._source = AttentionSource(options, device, f"{KEY}.weights")

    @property
    def digest(self) -> str:
        """Digest of the diffusion model.

        Raises:
            MissingError: the weights are not there.
        """
        return self._source.digest

    @torch.inference_mode()
    def find_segments(self, sample: Sample, tokens: TokenMap) -> Tensor:
        """Return the segment of every pixel; see `Discoverer.find_segments`."""
        maps, _ = self._find_maps(sample, [])
        return self._label(maps, sample.size)

    def _find_maps(self, sample: Sample, requests: list[MapRequest]) -> tuple[Tensor, list[Tensor]]:
        """Return the maps `[S, N]` of segments, and further attention `[M, M]` that is read in the same pass."""
        options, source = self._options, self._source
        # A sample of the latents, if one is asked for, is drawn from the first seed alone.
        latents = source.encode_images([sample.image], options.noise_seeds[0])
        layers = [x for x in list_layers(source.model.unet, latents.shape[-1]) if x.kind == "self"]
        sides = list(options.sides or sorted({layer.side for layer in layers}))
        # A layer counts as much as its map is wide; a level is the mean of its layers.
        weights = [float(side * sum(layer.side == side for layer in layers)) for side in sides]
        attention = source.collect(
            latents,
            source.encode_prompts([Prompt("")]).states,
            [*(MapRequest(kind="self", side=side) for side in sides), *requests],
            steps=options.steps,
            noise_seeds=options.noise_seeds,
            where=f"{KEY}.sides, self_places",
        )
        maps = [each[0] for each in attention.maps]
        merged = aggregate_levels(maps[: len(sides)], weights)
        anchors = choose_anchors(max(sides), options.grid).to(merged.device)
        return merge_maps(merged, anchors, options.tau, options.rounds), maps[len(sides) :]

    def _label(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the segment of every pixel from maps `[S, N]`.

        Raises:
            ConfigError: more segments than a label map holds.
        """
        labels = label_pixels(maps, size)
        if len(maps) > MAX_SEGMENTS:
            ids, labels = torch.unique(labels, return_inverse=True)
            if len(ids) > MAX_SEGMENTS:
                raise ConfigError(
                    f"{KEY}.tau: got {self._options.tau}, which leaves {len(ids)} segments, expected {MAX_SEGMENTS} at "
                    "most; set a larger one, or a smaller grid"
                )
        return labels
