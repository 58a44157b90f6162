"""iSeg: cross-attention of one prompt with all classes, refined by self-attention again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.devices import Device
from moduseg.diffusion.attention import EncodedPrompts
from moduseg.diffusion.layers import MapRequest
from moduseg.diffusion.prompts import resolve_background_words, write_prompt
from moduseg.pseudo_masks.diffusion_maps import renormalise_content, select_columns, side_of, stretch, to_pixels
from moduseg.pseudo_masks.diffusion_words import KEY, DiffusionWordsGenerator, DiffusionWordsOptions, WordMaps
from moduseg.pseudo_masks.iseg_maps import (
    Logarithm,
    average_clusters,
    check_propagation,
    cluster_cells,
    merge_levels,
    propagate,
    reduce_entropy,
    shift_to_zero,
)
from moduseg.structures import Sample


@dataclass(frozen=True, kw_only=True)
class ISegOptions(DiffusionWordsOptions):
    """Settings of `ISegGenerator`; defaults of `cross` and `self_places` have to fit the model.

    Attributes:
        closing: what follows the classes in the prompt.
        background_separator: between `closing` and the background words, if there are any.
        background_words: preset (`none`, `voc`, `coco`) or words for what is behind the classes; they draw attention
            from the classes and get no score.
        gain: factor of the states of the classes' tokens (category enhancement; iSeg: 1.6); 1 switches it off.
        cluster_stride: cells between the starts of clusters; cells of a cluster share their mean. `null` makes none.
        cluster_rounds: of k-means.
        self_places: layers whose self-attention refines (of one size).
        self_heads: their heads, counted through from 0; all if omitted.
        entropy: lambda of the entropy reduction (0 switches it off).
        logarithm: `log10`, as iSeg's code has it, or `natural`.
        iterations: how often the maps are refined; 0 leaves them as the cross-attention gives them.
        output_side: maps are brought to a square of so many pixels and stretched there, before they are brought to the
            image's size.

    Raises:
        ValueError: a value out of range.
    """

    closing: str = " and other object and background"
    background_separator: str = ", "
    background_words: str | list[str] = "voc"
    gain: float = 1.6
    cluster_stride: int | None = 11
    cluster_rounds: int = 20
    self_places: tuple[str, ...] = ()
    self_heads: tuple[int, ...] | None = None
    entropy: float = 0.015
    logarithm: Logarithm = "log10"
    iterations: int = 10
    output_side: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gain > 0:
            raise ValueError(f"gain: got {self.gain}, expected a number above 0; iSeg has 1.6, 1 switches it off")
        if self.cluster_stride is not None and self.cluster_stride < 1:
            raise ValueError(f"cluster_stride: got {self.cluster_stride}, expected 1 or more, or null; iSeg has 11")
        if self.cluster_rounds < 1:
            raise ValueError(f"cluster_rounds: got {self.cluster_rounds}, expected 1 or more; iSeg has 20")
        check_propagation(self.self_places, self.entropy, self.logarithm, self.iterations)
        if self.output_side < 1:
            raise ValueError(f"output_side: got {self.output_side}, expected 1 or more; iSeg has 512")


class ISegGenerator(DiffusionWordsGenerator):
    """Refines cross-attention by self-attention whose weak connections are cut (iSeg; Sun et al., 2024).

    One pass for all present classes. Proposals are not used.

    Args:
        options: model, words, layers and refinement.
        device: where everything runs.
        classes: class names, background first.

    Raises:
        ValueError: a value out of range, an unknown preset, or words that do not fit the classes.
    """

    _options: ISegOptions

    def __init__(self, options: ISegOptions, device: Device, classes: Sequence[str]) -> None:
        super().__init__(options, device, classes)
        background = ", ".join(resolve_background_words(options.background_words))
        self._suffix = options.closing + (options.background_separator + background if background else "")

    def read_words(self, sample: Sample, words: Mapping[str, str]) -> WordMaps:
        """Return where the model sees words, before and after the propagation (`DiffusionWordsGenerator`)."""
        options = self._options
        prompt = write_prompt(
            words,
            template=options.template,
            separator=options.separator,
            suffix=self._suffix,
            head_words=self._head_words,
        )
        with torch.inference_mode():
            encoded = self._source.encode_prompts([prompt], gain=options.gain)
            return WordMaps.mean(
                [self._refine(latents, encoded, step, seed) for latents, step, seed in self._draw_latents(sample)]
            )

    def to_scores(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return maps `[N, C]` stretched to [0, 1] on a square of `output_side` pixels, then at the image's size."""
        side = self._options.output_side
        square = stretch(to_pixels(maps, (side, side)), (1, 2))
        return F.interpolate(square[None], size, mode="bilinear", align_corners=False)[0]

    def _refine(self, latents: Tensor, encoded: EncodedPrompts, step: int, seed: int) -> WordMaps:
        """Return the maps of the classes, before and after the propagation, from one pass."""
        options, tokens = self._options, encoded.tokens[0]
        requests = [
            *(level.request for level in options.cross),
            MapRequest(kind="self", places=options.self_places, heads=options.self_heads),
        ]
        attention = self._source.collect(
            latents, encoded.states, requests, steps=[step], noise_seeds=[seed], where=f"{KEY}.cross, self_places"
        )
        *levels, connections = (maps[0] for maps in attention.maps)
        if options.renormalise:
            levels = [renormalise_content(level, tokens.content) for level in levels]

        # What each class's tokens see, smoothed over cells that see the text alike.
        seen = merge_levels(levels, [level.weight for level in options.cross], side_of(connections))
        if options.cluster_stride is not None:
            clusters = cluster_cells(seen, options.cluster_stride, options.cluster_rounds)
            num_starts = len(range(0, side_of(seen), options.cluster_stride)) ** 2
            seen = average_clusters(seen, clusters, num_starts)
        maps = shift_to_zero(select_columns(seen, tokens.spans))

        # Spread along the connections that are left.
        kept = reduce_entropy(connections, options.entropy, options.logarithm)
        return WordMaps(maps, propagate(maps, kept, options.iterations))
