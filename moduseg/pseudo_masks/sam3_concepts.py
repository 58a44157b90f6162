"""Pseudo masks from SAM 3's concepts: objects, semantic map and presence of each word (docs/siblings.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moduseg.devices import Device, Precision
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.base import PseudoMaskGenerator, check_labels
from moduseg.pseudo_masks.prompts import resolve_class_words
from moduseg.pseudo_masks.sam3_model import (
    TOKENIZER_FILES,
    ConceptModel,
    EncodedWords,
    Sightings,
    merge_objects,
    weigh_semantic,
)
from moduseg.structures import Proposals, Sample, ScoreMaps
from moduseg.weights.pretrained import Pretrained

Heads = Literal["both", "instance", "semantic"]
KEY = "pseudo_masks.generator"
"""Where this generator is configured, for messages."""


@dataclass(frozen=True, kw_only=True)
class Sam3ConceptsOptions:
    """Settings of `Sam3ConceptsGenerator`.

    Attributes:
        weights: a directory as `save_pretrained` writes it with the tokenizer, or a hub id.
        revision: branch, tag or commit of a hub id.
        precision: of the forward passes on a CUDA device; the run's if omitted.
        class_words: preset of renamed classes (`names`, `voc`, `coco`, ...), or a mapping from a class to its word or
            words; a class has the score of its best word.
        min_object_score: objects of the instance head count above it, in [0, 1].
        heads: whose maps count; of `both`, a pixel takes the larger.
        max_classes: if more compete in an image, those with the highest presence in a preview stay; `None` keeps all.
        preview_side: of the square of the preview, in pixels.
        batch_size: words that share a pass.

    Raises:
        ValueError: a value out of range.
    """

    weights: str = "facebook/sam3"
    revision: str | None = None
    precision: Precision | None = None
    class_words: str | dict[str, Any] | None = None
    min_object_score: float = 0.5
    heads: Heads = "both"
    max_classes: int | None = 40
    preview_side: int = 672
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.min_object_score <= 1:
            raise ValueError(f"min_object_score: got {self.min_object_score}, expected 0 to 1; SegEarth-OV3 has 0.5")
        if self.heads not in get_args(Heads):
            raise ValueError(f"heads: got {self.heads!r}, expected one of {', '.join(get_args(Heads))}")
        if self.max_classes is not None and self.max_classes < 1:
            raise ValueError(f"max_classes: got {self.max_classes}, expected 1 or more, or null; ActiveSAM has 40")
        if self.preview_side < 1:
            raise ValueError(f"preview_side: got {self.preview_side}, expected 1 or more; ActiveSAM has 672")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected 1 or more")


class Sam3ConceptsGenerator(PseudoMaskGenerator):
    """Every pixel's score of each class by SAM 3, which is asked for one word after the other; no background.

    A word's score is the larger of its best object and its semantic map, times its presence, as SegEarth-OV3 combines
    the heads; with many classes, a preview drops those that are probably absent, as ActiveSAM does. Proposals are not
    used.

    Args:
        options: model, words and heads.
        device: where everything runs.
        classes: class names, background first.

    Raises:
        ValueError: an unknown preset, or words that do not fit the classes.
    """

    def __init__(self, options: Sam3ConceptsOptions, device: Device, classes: Sequence[str]) -> None:
        self._options = options
        self._source = Pretrained(options.weights, options.revision, f"{KEY}.weights", "SAM 3", TOKENIZER_FILES)
        self._class_words = resolve_class_words(options.class_words, classes)
        self._model = ConceptModel(self._source, device.with_precision(options.precision))

    @property
    def digest(self) -> str:
        """The sha256 over the model's files.

        Raises:
            MissingError: they are not there and cannot be fetched.
        """
        return self._source.digest

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return the scores of the classes in `labels`, `[0, 1]`; of at most `max_classes` of them.

        Raises:
            DataError: a label that is no class.
            ConfigError: a `preview_side` that is no whole number of patches.
            MissingError, ArtefactError: the weights are not there, or of another model.
        """
        num_classes = len(self._class_words)
        check_labels(sample.id, labels, num_classes)
        words, label_of_word = self._words
        limit = self._options.max_classes
        with torch.inference_mode():
            if limit is not None and len(labels) > limit:
                labels = self._keep_present(sample.image, labels, limit)
            best = words.features.new_zeros(len(labels), *sample.size)
            rows = [row for row, label in enumerate(label_of_word) if label in labels]
            for batch, sightings in self._look(sample.image, self._model.side, rows):
                for row, scores in zip(batch, self._score(sightings, sample.size), strict=True):
                    index = labels.index(label_of_word[row])
                    best[index] = torch.maximum(best[index], scores)
        # Cloned outside inference mode: an ordinary tensor.
        return ScoreMaps(labels, best.clone())

    def _score(self, sightings: Sightings, size: tuple[int, int]) -> Tensor:
        """Return the scores `[Q, H, W]` of words from the heads that count."""
        heads, min_score = self._options.heads, self._options.min_object_score
        maps = [merge_objects(sightings, min_score, size)] if heads != "semantic" else []
        maps += [weigh_semantic(sightings, size)] if heads != "instance" else []
        return torch.stack(maps).amax(0)

    def _keep_present(self, image: np.ndarray, labels: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """Return the `limit` labels with the highest presence in a preview, ascending; of equal ones the smaller."""
        side = self._options.preview_side
        if side % self._model.stride:
            raise ConfigError(
                f"{KEY}.preview_side: got {side}, expected a multiple of the model's patches of {self._model.stride} "
                f"pixels; try {max(1, round(side / self._model.stride)) * self._model.stride}"
            )
        _, label_of_word = self._words
        rows = [row for row, label in enumerate(label_of_word) if label in labels]
        presence = torch.cat([sightings.presence for _, sightings in self._look(image, side, rows)]).tolist()
        best = dict.fromkeys(labels, 0.0)
        for row, value in zip(rows, presence, strict=True):
            best[label_of_word[row]] = max(best[label_of_word[row]], value)
        return tuple(sorted(sorted(labels, key=lambda label: (-best[label], label))[:limit]))

    def _look(self, image: np.ndarray, side: int, rows: list[int]) -> Iterator[tuple[list[int], Sightings]]:
        """Yield the rows of words that shared a pass, and what the model sees of them in a square of `side` pixels."""
        words, size = self._words[0], self._options.batch_size
        if not rows:
            return
        encoded_image = self._model.encode_image(image, side)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch, self._model.look(encoded_image, words.select(batch))

    @cached_property
    def _words(self) -> tuple[EncodedWords, list[int]]:
        """All words as the model takes them, and the class id of each."""
        pairs = [(word, label) for label, words in enumerate(self._class_words, 1) for word in words]
        return self._model.encode_words([word for word, _ in pairs]), [label for _, label in pairs]
