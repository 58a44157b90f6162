"""iSeg without words: DiffSeg's segments, spread along self-attention whose weak connections are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.diffusion.layers import MapRequest
from moduseg.discovery.diffseg import DiffSegDiscoverer, DiffSegOptions
from moduseg.pseudo_masks.diffusion_maps import resize_maps, side_of
from moduseg.pseudo_masks.iseg_maps import Logarithm, check_propagation, propagate, reduce_entropy
from moduseg.structures import Sample, TokenMap


@dataclass(frozen=True, kw_only=True)
class ISegPropagationOptions(DiffSegOptions):
    """Settings of `ISegPropagationDiscoverer`.

    Attributes:
        self_places: layers along whose self-attention maps spread (of one size).
        self_heads: their heads, counted through from 0; all if omitted.
        entropy: lambda of the entropy reduction (0 switches it off).
        logarithm: `log10`, as iSeg's code has it, or `natural`.
        iterations: how often the maps are spread; 0 leaves DiffSeg's.

    Raises:
        ValueError: a value out of range.
    """

    self_places: tuple[str, ...] = ("up3.1",)
    self_heads: tuple[int, ...] | None = None
    entropy: float = 0.015
    logarithm: Logarithm = "log10"
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_propagation(self.self_places, self.entropy, self.logarithm, self.iterations)


class ISegPropagationDiscoverer(DiffSegDiscoverer):
    """Refines DiffSeg's maps by iSeg's iterations (Sun et al., 2024), where they have no words.

    The published code has no such mode: that the merged maps take the place of the words' maps is our reading.

    Args:
        options: model, noise, merging and refinement.
        device: where everything runs.
    """

    _options: ISegPropagationOptions

    def __init__(self, options: ISegPropagationOptions, device: Device) -> None:
        super().__init__(options, device)

    @torch.inference_mode()
    def find_segments(self, sample: Sample, tokens: TokenMap) -> Tensor:
        """Return the segment of every pixel; see `Discoverer.find_segments`."""
        options = self._options
        request = MapRequest(kind="self", places=options.self_places, heads=options.self_heads)
        segments, (connections,) = self._find_maps(sample, [request])
        maps = resize_maps(segments.T, side_of(connections))
        kept = reduce_entropy(connections, options.entropy, options.logarithm)
        return self._label(propagate(maps, kept, options.iterations).T, sample.size)
