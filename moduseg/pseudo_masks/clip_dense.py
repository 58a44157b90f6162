"""Pseudo masks from a CLIP's patches compared with words (METHOD, CorrCLIP's relatives)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip import ClipEncoder
from moduseg.backbones.clip_model import ClipSource
from moduseg.devices import Device
from moduseg.pseudo_masks.clip_words import KEY, ClipWordsGenerator
from moduseg.structures import TokenMap


class ClipDenseGenerator(ClipWordsGenerator):
    """Every pixel's probability of each word, by a CLIP whose last block is run in one of several ways.

    Proposals are not looked at.

    Args:
        device: where everything runs.
        backbone: makes the run's backbone, whose affinities `proxyclip` uses.
        classes: class names, background first.
        weights: a directory, `miniature/clip`, a hub id, or `random`; see `moduseg.backbones.clip_model.ClipSource`.
        revision: branch, tag or commit of a hub id.
        config: `CLIPConfig`'s arguments, for `random`.
        tokenizer: directory of another tokenizer.
        variant: how the last block is run; see `moduseg.backbones.clip_attention.VARIANTS`, of which
            `corrclip` is a generator of its own.
        templates: preset (`imagenet`, `miniature`, `single`) or sentences with `{}`; a word's feature is the normalised
            mean over them.
        class_words: preset of renamed classes (`names`, `voc`, `coco`), or a mapping from a class to its word or words.
        word_merge: of a class's several words, `max` takes the best one's probability (each competes), `mean` makes one
            text of them before anything is compared. Background words always compete.
        background_words: preset (`voc`, `coco`, `miniature`) or words; with none, the background has no score and
            `background.rule` has to supply it.
        filter_labels: `False` lets all classes compete, and scores all of them (METHOD: without the label filter).
        logit_scale: factor of the cosines before the softmax (the paper: 40).
        window: side of the sliding window in pixels of the resized image; the whole image at once where left out. An
            image smaller than a window is one window.
        stride: step of the window, in pixels; the last window of a row or column ends at the border.
        short_side: the image is resized until its short side has this many pixels; native size where left out.
        batch_size: windows that share a forward pass.
        gaussian_std: of `naclip`, in patches.
        gamma, beta: of `proxyclip`.
        seed: of `random` weights.

    Raises:
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    def __init__(
        self,
        device: Device,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
        weights: str = "miniature/clip",
        revision: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        variant: Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "proxyclip"] = "naclip",
        templates: str | list[str] = "imagenet",
        class_words: str | dict[str, Any] | None = None,
        word_merge: Literal["max", "mean"] = "max",
        background_words: str | list[str] = "voc",
        filter_labels: bool = True,
        logit_scale: float = 40.0,
        window: int | None = 336,
        stride: int = 112,
        short_side: int | None = None,
        batch_size: int = 8,
        gaussian_std: float = 5.0,
        gamma: float = 3.0,
        beta: float = 1.2,
        seed: int = 0,
    ) -> None:
        self._make_backbone = backbone
        source = ClipSource(weights, device, revision, config, tokenizer, seed, KEY)
        super().__init__(
            ClipEncoder(source, variant, batch_size=batch_size, gaussian_std=gaussian_std, gamma=gamma, beta=beta),
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
        """Of the CLIP, and of the backbone where `proxyclip` uses it.

        Raises:
            MissingError: the weights are not there.
        """
        return self._source.digest + (f"+{self._proxy.digest}" if self._encoder.variant == "proxyclip" else "")

    @cached_property
    def _proxy(self) -> Backbone:
        return self._make_backbone()

    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        return self._encoder.encode(crops, self._proxy.tokens(crops) if self._encoder.variant == "proxyclip" else None)
