"""CorrCLIP, the paper's pseudo-mask generator (METHOD, CorrCLIP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones import BACKBONES
from moduseg.backbones.base import Backbone
from moduseg.backbones.clip import ClipEncoder
from moduseg.backbones.clip_attention import Branches
from moduseg.backbones.clip_model import ClipSource
from moduseg.backbones.regions import RegionOrder, id_map
from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.pseudo_masks.clip_words import KEY, ClipWordsGenerator
from moduseg.structures import Proposals, Sample, TokenMap


class CorrClipGenerator(ClipWordsGenerator):
    """Every pixel's probability of each word, by a CLIP whose patches see what another model says is one thing.

    The affinity of a second backbone, inside regions that the proposals give, takes the place of the last block's
    attention; a spatial branch of earlier blocks and a semantic branch of one class token for each region are added.
    Scores come out at the size of the image; the regions' vote is `pseudo_masks.refine=region_vote`.

    Args:
        device: where everything runs.
        backbone: makes the run's backbone, whose affinities are used where `affinity` is left out.
        classes: class names, background first.
        weights, revision, config, tokenizer, seed: of the CLIP; see `moduseg.backbones.clip_model.ClipSource`.
        affinity: configuration of a backbone (`{name: timm, model: vit_base_patch8_224.dino, facet: qk, ...}`) whose
            tokens are compared; the run's own where left out.
        templates, class_words, word_merge, background_words, filter_labels, logit_scale, window, stride, short_side:
            see `moduseg.pseudo_masks.clip_dense.ClipDenseGenerator`.
        batch_size: windows that share a forward pass.
        temperature, spatial, semantic, spatial_blocks: see `moduseg.backbones.clip_attention.Branches`.
        merge_eps: distance up to which regions are merged; 0 merges none.
        min_score: proposals with a lower `predicted_iou` are no regions (the paper: 0.5).
        min_area: proposals with fewer pixels are no regions (the paper: no minimum).
        region_order: which of several proposals has a pixel: `score` the best one (the paper), `area` the smallest one.

    Raises:
        ConfigError: an `affinity` that is no backbone.
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    needs_proposals = True

    def __init__(
        self,
        device: Device,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
        weights: str = "miniature/clip",
        revision: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        affinity: Mapping[str, Any] | None = None,
        templates: str | list[str] = "imagenet",
        class_words: str | dict[str, Any] | None = None,
        word_merge: Literal["max", "mean"] = "max",
        background_words: str | list[str] = "voc",
        filter_labels: bool = True,
        logit_scale: float = 40.0,
        window: int | None = 336,
        stride: int = 112,
        short_side: int | None = None,
        batch_size: int = 4,
        temperature: float = 4.0,
        spatial: float = 1.0,
        semantic: float = 0.5,
        spatial_blocks: tuple[int, int] | None = None,
        merge_eps: float = 0.2,
        min_score: float = 0.5,
        min_area: int = 0,
        region_order: RegionOrder = "score",
        seed: int = 0,
    ) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: got {min_score}, expected 0 to 1; the paper uses 0.5")
        if min_area < 0:
            raise ValueError(f"min_area: got {min_area}, expected 0 or more; the paper uses 0")
        if region_order not in ("score", "area"):
            raise ValueError(f"region_order: got {region_order!r}, expected score or area; the paper uses score")
        self._make_backbone, self._device = backbone, device
        self._own = None
        if affinity is not None:
            self._own = build_named("pseudo_masks.generator.affinity", BACKBONES, affinity, device=device)
        self._min_score, self._min_area, self._order = min_score, min_area, region_order
        branches = Branches(temperature, spatial, semantic, spatial_blocks)
        source = ClipSource(weights, device, revision, config, tokenizer, seed, KEY)
        super().__init__(
            ClipEncoder(source, "corrclip", batch_size=batch_size, branches=branches, merge_eps=merge_eps),
            classes,
            templates,
            class_words,
            word_merge,
            background_words,
            filter_labels,
            logit_scale,
            window,
            stride,
            short_side,
            batch_size,
        )

    @property
    def digest(self) -> str:
        """Of the CLIP and of the model that gives the affinities.

        Raises:
            MissingError: the weights are not there.
        """
        return f"{self._source.digest}+{self._affinity.digest}"

    @cached_property
    def _affinity(self) -> Backbone:
        return self._own or self._make_backbone()

    def _regions(self, sample: Sample, proposals: Proposals | None) -> Tensor | None:
        if proposals is None:
            return torch.full(sample.size, -1, dtype=torch.int64, device=self._device.torch_device)
        found = proposals.to(self._device.torch_device)
        return id_map(
            found.select((found.predicted_iou >= self._min_score) & (found.areas >= self._min_area)), self._order
        )

    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        return self._encoder.encode(crops, self._affinity.tokens(crops), regions)
