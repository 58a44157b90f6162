"""CorrCLIP, the paper's pseudo-mask generator (docs/method.md, section CorrCLIP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from moduseg import backbones
from moduseg.backbones.base import Backbone
from moduseg.backbones.clip import ClipEncoder, EncoderOptions
from moduseg.backbones.clip_attention import Branches
from moduseg.backbones.clip_model import ClipSource
from moduseg.devices import Device
from moduseg.masks.id_maps import RegionOrder, make_id_map
from moduseg.pseudo_masks.clip_words import KEY, ClipWordsGenerator, ClipWordsOptions
from moduseg.structures import Proposals, Sample, TokenMap


@dataclass(frozen=True, kw_only=True)
class CorrClipOptions(ClipWordsOptions, Branches):
    """Settings of `CorrClipGenerator`: the model of the affinities, regions, branches, words and windows.

    Attributes:
        affinity: configuration of a backbone (`{name: timm, model: vit_base_patch8_224.dino, facet: qk, ...}`) whose
            tokens are compared; the run's own if omitted.
        merge_eps: distance up to which regions are merged; 0 merges none.
        min_score: proposals with a lower `predicted_iou` are no regions (the paper: 0.5).
        min_area: proposals with fewer pixels are no regions (the paper: no minimum).
        region_order: which of several proposals has a pixel: `score` the best one (the paper), `area` the smallest
            one, `largest` the largest one, as CorrCLIP has it with SAM 2.

    Raises:
        ValueError: a value out of range.
    """

    affinity: Mapping[str, Any] | None = None
    batch_size: int = 4
    merge_eps: float = 0.2
    min_score: float = 0.5
    min_area: int = 0
    region_order: RegionOrder = "score"

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score: got {self.min_score}, expected 0 to 1; the paper uses 0.5")
        if self.min_area < 0:
            raise ValueError(f"min_area: got {self.min_area}, expected 0 or more; the paper uses 0")
        if self.region_order not in get_args(RegionOrder):
            names = ", ".join(get_args(RegionOrder))
            raise ValueError(f"region_order: got {self.region_order!r}, expected one of {names}; the paper uses score")
        Branches.__post_init__(self)
        ClipWordsOptions.__post_init__(self)


class CorrClipGenerator(ClipWordsGenerator):
    """Every pixel's probability of each word, by a CLIP whose patches attend to what another model finds alike.

    The affinity of a second backbone, inside regions that the proposals give, replaces the last block's attention; a
    spatial branch of earlier blocks and a semantic branch of one class token for each region are added. Scores have the
    size of the image; the regions' vote is `pseudo_masks.refine=region_vote`.

    Args:
        options: models, regions, branches, words and windows.
        device: where everything runs.
        backbone: makes the run's backbone, whose affinities are used if `options.affinity` is omitted.
        classes: class names, background first.

    Raises:
        ConfigError: an `affinity` that is no backbone.
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    needs_proposals = True
    _options: CorrClipOptions

    def __init__(
        self,
        options: CorrClipOptions,
        device: Device,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
    ) -> None:
        self._options, self._device, self._make_backbone = options, device, backbone
        self._affinity_backbone = None
        if options.affinity is not None:
            self._affinity_backbone = backbones.build(options.affinity, device, "pseudo_masks.generator.affinity")
        encoder_options = EncoderOptions(
            variant="corrclip", batch_size=options.batch_size, branches=options, merge_eps=options.merge_eps
        )
        super().__init__(options, ClipEncoder(ClipSource(options, device, KEY), encoder_options), classes)

    @property
    def _host_digest(self) -> str:
        return f"{self._source.digest}+{self._affinity.digest}"

    @cached_property
    def _affinity(self) -> Backbone:
        return self._affinity_backbone or self._make_backbone()

    def _find_regions(self, sample: Sample, proposals: Proposals | None) -> Tensor | None:
        if proposals is None:
            return torch.full(sample.size, -1, dtype=torch.int64, device=self._device.torch_device)
        proposals = proposals.to(self._device.torch_device)
        options = self._options
        is_region = (proposals.predicted_iou >= options.min_score) & (proposals.areas >= options.min_area)
        return make_id_map(proposals.select(is_region), options.region_order)

    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        return self._encoder.encode(crops, self._affinity.tokens(crops), regions)
