"""What every generator that compares a CLIP's patches with words shares: words, label filter, windows, softmax."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.clip import ClipEncoder
from moduseg.backbones.regions import region_grid
from moduseg.backbones.upsample import upsample
from moduseg.errors import ConfigError, DataError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.prompts import background_words_of, class_words_of, templates_of
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap

KEY = "pseudo_masks.generator.weights"
"""Where these generators' CLIP is named, for messages."""


class ClipWordsGenerator(PseudoMaskGenerator):
    """Every pixel's probability of each word, over the words of the present classes and of the background.

    Patch features and texts are compared by cosine; the similarities are brought to the pixels (bilinear), averaged
    over the windows, and scaled; words of classes outside the image-level labels are left out *before* the softmax over
    words. A class has the probability of its best word, and so has the background.

    Args:
        encoder: turns windows into patch features in the space of the texts.
        classes: class names, background first.
        templates, class_words, word_merge, background_words, filter_labels, logit_scale, window, stride, short_side,
            batch_size: see `moduseg.pseudo_masks.clip_dense.ClipDenseGenerator`.

    Raises:
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        classes: Sequence[str],
        templates: str | list[str],
        class_words: str | dict[str, Any] | None,
        word_merge: Literal["max", "mean"],
        background_words: str | list[str],
        filter_labels: bool,
        logit_scale: float,
        window: int | None,
        stride: int,
        short_side: int | None,
        batch_size: int,
    ) -> None:
        if not logit_scale > 0:
            raise ValueError(f"logit_scale: got {logit_scale}, expected a number above 0; the paper uses 40")
        if window is not None and not 1 <= stride <= window:
            raise ValueError(f"stride: got {stride}, expected 1 to the window's {window}; the paper uses 112 of 336")
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side: got {short_side}, expected 1 or more, or null for the image's own size")
        self._encoder, self._source = encoder, encoder.source
        self._templates = templates_of(templates)
        self._class_words = class_words_of(class_words, classes)
        self._background_words = background_words_of(background_words)
        self._merge_words = word_merge == "mean"
        self._filter, self._logit_scale = filter_labels, logit_scale
        self._window, self._stride, self._short_side = window, stride, short_side
        self._batch_size = batch_size

    @abstractmethod
    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        """Features of windows `[H, W, 3]`, whose `[H, W]` id maps `regions` are, where `_regions` gives any."""

    def _regions(self, sample: Sample, proposals: Proposals | None) -> Tensor | None:
        """`[H, W]` int64 ids of the image's pixels, -1 for no region; `None` where proposals do not matter."""
        return None

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Probabilities of the classes in `labels` and of the background, `[0, 1]`.

        Maps need not add up to 1: a class's or the background's other words keep their share.

        Raises:
            DataError: a label that is no class.
            ConfigError: neither a label nor a background word is left to score.
            MissingError, ArtefactError: the weights are not there, or of another model.
        """
        count = len(self._class_words)
        if wrong := [label for label in labels if not 1 <= label <= count]:
            raise DataError(f"{sample.id}: got labels {wrong}, expected 1..{count}; check the class list")
        ids = tuple(labels) if self._filter else tuple(range(1, count + 1))
        texts, owner = self._texts
        # Words of absent classes would be at minus infinity: leaving them out is the same, and less work.
        present = [position for position, label in enumerate(owner) if label == 0 or label in ids]
        if not present:
            raise ConfigError(
                "pseudo_masks.generator.background_words: got none, and the image has no label; name a background word"
            )
        with torch.inference_mode():
            cosines = self._similarities(sample.image, texts[present], self._regions(sample, proposals))
            probability = (self._logit_scale * cosines).softmax(0)
            of = [[row for row, position in enumerate(present) if owner[position] == label] for label in (0, *ids)]
            maps = [probability[rows].amax(0) for rows in of if rows]
        size = sample.size
        background = maps.pop(0).clone() if of[0] else None
        scores = torch.stack(maps).clone() if maps else torch.zeros((0, *size), device=probability.device)
        return ScoreMaps(ids, scores, background)

    @cached_property
    def _texts(self) -> tuple[Tensor, list[int]]:
        """Normalised features `[Q, D]` of all words, and whose word each is (0: the background's)."""
        rows: list[Tensor] = []
        owner: list[int] = []
        for label, words in enumerate((self._background_words, *self._class_words)):
            if not words:
                continue
            prompts = [template.format(word) for word in words for template in self._templates]
            features = self._source.text_features(prompts).unflatten(0, (len(words), -1))
            features = F.normalize(features.mean(1), dim=-1)
            if label and self._merge_words:
                features = F.normalize(features.mean(0, keepdim=True), dim=-1)
            rows.append(features)
            owner += [label] * len(features)
        return torch.cat(rows), owner

    def _similarities(self, image: np.ndarray, texts: Tensor, regions: Tensor | None = None) -> Tensor:
        """Cosines `[Q, H, W]` of every pixel of the image, averaged over the windows that hold it."""
        resized = resize_short_side(image, self._short_side)
        height, width = resized.shape[:2]
        if regions is not None:
            # A grid of patches of one pixel: the nearest pixel of the image.
            regions = region_grid(regions, (height, width), 1, (height, width))
        total = torch.zeros(len(texts), height, width, device=texts.device)
        seen = torch.zeros(height, width, device=texts.device)
        boxes = window_boxes(height, width, self._window, self._stride)
        for start in range(0, len(boxes), self._batch_size):
            batch = boxes[start : start + self._batch_size]
            crops = [resized[top:bottom, left:right] for top, bottom, left, right in batch]
            ids = None if regions is None else [regions[top:bottom, left:right] for top, bottom, left, right in batch]
            maps = self._encode(crops, ids)
            for (top, bottom, left, right), token_map in zip(batch, maps, strict=True):
                cosines = F.normalize(token_map.tokens, dim=-1) @ texts.T
                total[:, top:bottom, left:right] += upsample(cosines.permute(2, 0, 1), token_map)
                seen[top:bottom, left:right] += 1
        mean = total / seen
        if mean.shape[1:] != image.shape[:2]:
            mean = F.interpolate(mean[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0]
        return mean


def resize_short_side(image: np.ndarray, short_side: int | None) -> np.ndarray:
    """`[H, W, 3]` uint8 with `short_side` pixels on its short side; the image itself where left out."""
    if short_side is None or short_side == min(image.shape[:2]):
        return image
    scale = short_side / min(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def window_boxes(height: int, width: int, window: int | None, stride: int) -> list[tuple[int, int, int, int]]:
    """`(top, bottom, left, right)` of the windows that cover an image, row by row.

    A window reaches no further than the image: the last one of each row and column is moved back to end at the border.
    """
    if window is None:
        return [(0, height, 0, width)]

    def spans(side: int) -> list[tuple[int, int]]:
        starts = list(range(0, max(side - window, 0), stride)) + [max(side - window, 0)]
        return [(start, min(start + window, side)) for start in starts]

    return [(*rows, *columns) for rows in spans(height) for columns in spans(width)]
