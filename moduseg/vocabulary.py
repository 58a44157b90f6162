"""Segmentation from words alone in three lines of Python.

from moduseg import Vocabulary
vocabulary = Vocabulary(["a dog", "grass"], ["pseudo_masks=clip_dense_vit_b16"])
prediction = vocabulary.segment("photo.jpg")
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from moduseg import backbones, proposers, pseudo_masks, taggers
from moduseg.backbones.base import Backbone
from moduseg.config import compose
from moduseg.datasets.io import read_image
from moduseg.datasets.vocabulary import read_word_list
from moduseg.devices import resolve_device
from moduseg.errors import ConfigError
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.labelling import DIFFUSIONS, ScoredImage, fit_rule, to_label_map
from moduseg.structures import Sample, ScoreMaps


@dataclass(frozen=True)
class WordedPrediction:
    """The label map of one image from words.

    Attributes:
        label_map: `[H, W]` uint8, 0 background, then the words in their order.
        scores: of the classes that competed, on the device that computed them.
        class_ids: of the classes that competed: all, or those that the tagger named.
    """

    label_map: np.ndarray
    scores: ScoreMaps
    class_ids: tuple[int, ...]


class Vocabulary:
    """Words that label images, without training images; threads may share it, one image at a time.

    Args:
        words: one class an entry, several words of one separated by `,`, `background: sky, wall` for the words of label
            0; or a file (`moduseg.datasets.vocabulary.read_word_list`).
        overrides: of the configuration, such as `pseudo_masks=corrclip` or `tagger=tagclip`; the default is the
            miniature CLIP, which knows no photographs.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        ConfigError: no word, or a configuration that cannot work without training images.
    """

    def __init__(self, words: str | Sequence[str], overrides: Sequence[str] = (), device: str = "auto") -> None:
        word_list = read_word_list(words)
        if word_list is None:
            raise ConfigError("vocabulary: got no word, expected one or more; try ['a dog', 'grass']")
        self.words, self.cfg = word_list, compose(overrides)
        self.device = resolve_device(device, self.cfg.runtime.precision)
        self._lock = threading.Lock()
        generator = pseudo_masks.set_words(self.cfg.pseudo_masks.generator, word_list.as_settings())
        self._generator = pseudo_masks.build(generator, self.device, lambda: self._backbone, self.classes)
        self._settings = fit_rule(self.cfg.pseudo_masks, has_background_words=bool(word_list.background))
        self._tagger = taggers.build(self.cfg.tagger or {"name": "all"}, self.device, self.classes, word_list)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; the ids of a label map index it."""
        return self.words.classes

    @torch.inference_mode()
    def segment(self, image: str | Path | np.ndarray) -> WordedPrediction:
        """Label one image.

        Args:
            image: a file, or `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the image cannot be read, or nothing says what it shows (`tagger=given`).
            MissingError: weights are not there.
            ValueError: the array is not `[H, W, 3]` uint8.
        """
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image))
        sample = Sample("image" if isinstance(image, np.ndarray) else Path(image).stem, pixels)
        has_vote = self._settings.refine == "region_vote"
        with self._lock:
            class_ids = self._tagger.tag(sample).class_ids
            is_needed = has_vote or self._generator.needs_proposals
            proposals = self._proposer.propose(sample) if is_needed else None
            scores = self._generator.generate(sample, class_ids, proposals)
        voters = proposals if has_vote else None
        item = ScoredImage(sample.id, scores, pixels if self._settings.refine in DIFFUSIONS else None, voters)
        label_map = to_label_map(item, self._settings, self.device.torch_device)
        return WordedPrediction(label_map.cpu().numpy(), scores, scores.class_ids)

    @cached_property
    def _backbone(self) -> Backbone:
        return backbones.build(self.cfg.backbone, self.device)

    @cached_property
    def _proposer(self) -> Proposer:
        return proposers.build(self.cfg.proposer, self.device)
