"""Pseudo masks from a CLIP's patches compared with words (docs/method.md, section CorrCLIP: its relatives)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip import ClipEncoder, EncoderOptions
from moduseg.backbones.clip_model import ClipSource
from moduseg.devices import Device
from moduseg.pseudo_masks.clip_words import KEY, ClipWordsGenerator, ClipWordsOptions
from moduseg.structures import TokenMap


@dataclass(frozen=True, kw_only=True)
class ClipDenseOptions(ClipWordsOptions):
    """Settings of `ClipDenseGenerator`: the variant of the last block, words and windows.

    Attributes:
        variant: how the last block is run, one of `moduseg.backbones.clip_attention.VARIANTS` but `corrclip`, which is
            a generator of its own.
        gaussian_std: of `naclip`, in patches.
        gamma, beta: of `proxyclip`.
    """

    variant: Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "proxyclip"] = "naclip"
    gaussian_std: float = 5.0
    gamma: float = 3.0
    beta: float = 1.2


class ClipDenseGenerator(ClipWordsGenerator):
    """Every pixel's probability of each word, by a CLIP whose last block is run in one of several ways.

    Proposals are not used.

    Args:
        options: model, variant, words and windows.
        device: where everything runs.
        backbone: makes the run's backbone, whose affinities `proxyclip` uses.
        classes: class names, background first.

    Raises:
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    def __init__(
        self,
        options: ClipDenseOptions,
        device: Device,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
    ) -> None:
        self._make_backbone = backbone
        encoder_options = EncoderOptions(
            variant=options.variant,
            batch_size=options.batch_size,
            gaussian_std=options.gaussian_std,
            gamma=options.gamma,
            beta=options.beta,
        )
        super().__init__(options, ClipEncoder(ClipSource(options, device, KEY), encoder_options), classes)

    @property
    def _host_digest(self) -> str:
        return self._source.digest + (f"+{self._proxy.digest}" if self._encoder.variant == "proxyclip" else "")

    @cached_property
    def _proxy(self) -> Backbone:
        return self._make_backbone()

    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        return self._encoder.encode(crops, self._proxy.tokens(crops) if self._encoder.variant == "proxyclip" else None)
