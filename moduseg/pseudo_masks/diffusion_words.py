"""Base of the generators that read a diffusion model's attention for the words of the present classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.diffusion.attention import AttentionSource
from moduseg.diffusion.layers import MapRequest
from moduseg.diffusion.model import DiffusionModelOptions
from moduseg.diffusion.prompts import resolve_class_words, resolve_head_words
from moduseg.errors import DataError
from moduseg.pseudo_masks.base import PseudoMaskGenerator, check_labels
from moduseg.pseudo_masks.diffusion_maps import stretch, to_pixels
from moduseg.structures import Proposals, Sample, ScoreMaps

KEY = "pseudo_masks.generator"
"""Where these generators are configured, for messages."""


@dataclass(frozen=True, kw_only=True)
class CrossLevel:
    """Cross-attention of one size, and how much it counts.

    Attributes:
        weight: factor of its maps.
        side, places, heads: which heads of which layers, as `moduseg.diffusion.layers.MapRequest` has them.

    Raises:
        ValueError: a negative weight.
    """

    weight: float
    side: int | None = None
    places: tuple[str, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: got {self.weight}, expected 0 or more")

    @property
    def request(self) -> MapRequest:
        """What is asked of the attention source."""
        return MapRequest(kind="cross", side=self.side, places=self.places, heads=self.heads)


@dataclass(frozen=True, kw_only=True)
class DiffusionWordsOptions(DiffusionModelOptions):
    """Which diffusion model looks for which words, with how much noise.

    Attributes:
        template: the prompt, with one `{}` for the words of the classes.
        separator: between classes that share a prompt.
        class_words: preset of renamed classes (`names`, `iseg`, `diffsegmenter`), or a mapping from a class to its
            words.
        head_words: words of which the last one alone stands for the class: preset (`none`, `iseg`), `all`, or a list.
        cross: the sizes of cross-attention that count.
        renormalise: keep the text's own tokens and divide by their sum at each cell (no part of either paper).
        steps: time steps; maps are averaged over them.
        noise_seeds: maps are averaged over the noise of each seed, which is the same for every image.

    Raises:
        ValueError: a value out of range.
    """

    template: str = "a photograph of {}"
    separator: str = " and "
    class_words: str | dict[str, Any] | None = None
    head_words: str | list[str] = "none"
    cross: tuple[CrossLevel, ...] = ()
    renormalise: bool = False
    steps: tuple[int, ...] = (100,)
    noise_seeds: tuple[int, ...] = (1101,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.count("{}") != 1:
            raise ValueError(f"template: got {self.template!r}, expected one {{}}; try 'a photograph of {{}}'")
        if not self.cross:
            raise ValueError("cross: got no level, expected one or more of {side: 16, weight: 1.0}")
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps: got {list(self.steps)}, expected one or more from 0 on; try [100]")
        if not self.noise_seeds or min(self.noise_seeds) < 0:
            raise ValueError(f"noise_seeds: got {list(self.noise_seeds)}, expected one or more from 0 on; try [1101]")


@dataclass(frozen=True)
class WordMaps:
    """Where a model saw words in an image, on a square of cells.

    Attributes:
        seen: `[N, C]` float32, the cross-attention of `C` words, all sizes together.
        completed: `[N, C]` float32, the same after self-attention has completed it.
    """

    seen: Tensor
    completed: Tensor

    @staticmethod
    def mean(maps: Sequence[WordMaps]) -> WordMaps:
        """Return the mean of several passes over the same words."""
        return WordMaps(
            torch.stack([each.seen for each in maps]).mean(0), torch.stack([each.completed for each in maps]).mean(0)
        )


class DiffusionWordsGenerator(PseudoMaskGenerator):
    """Every pixel's score of the words of the present classes, from a diffusion model's attention; no background.

    Args:
        options: model, words and noise.
        device: where everything runs.
        classes: class names, background first.

    Raises:
        ValueError: an unknown preset, or words that do not fit the classes.
    """

    score_title = "attention"

    def __init__(self, options: DiffusionWordsOptions, device: Device, classes: Sequence[str]) -> None:
        self._options = options
        self._source = AttentionSource(options, device, f"{KEY}.weights")
        self._classes = tuple(classes)
        self._class_words = resolve_class_words(options.class_words, classes)
        self._head_words = resolve_head_words(options.head_words, self._class_words)

    @property
    def digest(self) -> str:
        """Digest of the diffusion model.

        Raises:
            MissingError: the weights are not there.
        """
        return self._source.digest

    @abstractmethod
    def read_words(self, sample: Sample, words: Mapping[str, str]) -> WordMaps:
        """Return where the model sees some words, averaged over time steps and seeds of the noise.

        Args:
            sample: an image.
            words: what is written for each class, by the class's name; one class or more.

        Raises:
            DataError, ConfigError, MissingError, ArtefactError: as `generate` does.
        """

    def to_scores(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return maps `[N, C]` at the size of an image, each stretched to [0, 1], `[C, H, W]`."""
        return stretch(to_pixels(maps, size), (1, 2))

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return the scores of the classes in `labels`, each map stretched to [0, 1].

        Raises:
            DataError: a label that is no class, or words that are cut off from the prompt.
            ConfigError: a layer, head or time step that the model does not have.
            MissingError, ArtefactError: the weights are not there, or damaged.
        """
        num_classes = len(self._class_words)
        check_labels(sample.id, labels, num_classes)
        if not labels:
            device = self._source.model.device.torch_device
            return ScoreMaps((), torch.zeros(0, *sample.size, device=device))
        words = {self._classes[label]: self._class_words[label - 1] for label in labels}
        try:
            with torch.inference_mode():
                scores = self.to_scores(self.read_words(sample, words).completed, sample.size)
        except DataError as error:
            raise DataError(f"{sample.id}: {error}") from error
        # Cloned outside inference mode: ordinary tensors.
        return ScoreMaps(tuple(labels), scores.clone())

    def _draw_latents(self, sample: Sample) -> Iterator[tuple[Tensor, int, int]]:
        """Yield the latents `[1, C, S, S]` of an image with each time step and seed of the noise."""
        options = self._options
        latents: Tensor | None = None
        for seed in options.noise_seeds:
            # A mean does not depend on the seed.
            if latents is None or options.latent == "sample":
                latents = self._source.encode_images([sample.image], seed)
            for step in options.steps:
                yield latents, step, seed
