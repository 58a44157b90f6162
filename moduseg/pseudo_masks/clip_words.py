"""Base of the generators that compare a CLIP's patches with words: words, label filter, windows, softmax."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.arm import Arm
from moduseg.backbones.clip import ClipEncoder
from moduseg.backbones.clip_model import ClipModelOptions, ClipSource
from moduseg.backbones.regions import sample_regions
from moduseg.backbones.upsample import upsample
from moduseg.bank.aggregation import coverage
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.arm import ArmSource, refine_maps
from moduseg.pseudo_masks.base import PseudoMaskGenerator, check_labels
from moduseg.pseudo_masks.clip_windows import (
    Resampling,
    find_borders,
    list_windows,
    pad_masks,
    pad_regions,
    pad_window,
    resize_sides,
)
from moduseg.pseudo_masks.prompts import resolve_background_words, resolve_class_words, resolve_templates
from moduseg.pseudo_masks.word_features import encode_words
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap, WordFeatures

KEY = "pseudo_masks.generator.weights"
"""Where these generators' CLIP is named, for messages."""


@dataclass(frozen=True, kw_only=True)
class ClipWordsOptions(ClipModelOptions):
    """Which CLIP compares which words with which windows of an image.

    Attributes:
        templates: preset (`imagenet`, `miniature`, `single`) or sentences with `{}`; a word's feature is the normalised
            mean over them.
        class_words: preset of renamed classes (`names`, `voc`, `coco`, ...), or a mapping from a class to its word or
            words.
        word_merge: of a class's several words, `max` takes the best one's probability (each competes), `mean` makes one
            text of them before anything is compared. Background words always compete.
        background_words: preset (`voc`, `coco`, `miniature`) or words; with none, the background has no score and
            `background.rule` has to supply it.
        filter_labels: `False` lets all classes compete, and scores all of them (the paper's row without label filter).
        logit_scale: factor of the cosines before the softmax (the paper: 40).
        window: side of the sliding window in pixels of the resized image; the full image at once if omitted. An image
            smaller than a window is one window.
        stride: step of the window, in pixels; the last window of a row or column ends at the border.
        short_side: the image is resized until its short side has this many pixels; native size if omitted.
        long_side: its long side gets no more than this many pixels; no limit if omitted.
        resampling: how it is resized: `area` (cubic where it is enlarged), or `linear`, bilinear without antialiasing
            as the protocols of open-vocabulary segmentation do it.
        padding: how a window that is no whole number of patches is seen. `None`: padded with black at the bottom and
            right. 0: what is left of the last whole patch is not seen, and the map is stretched over the window. Any
            other number: padded on all sides to a multiple of it, with the model's mean colour in whole levels.
        batch_size: windows that share a forward pass.
        arm: file of an ARM (`moduseg.backbones.arm`) that sharpens the patch features before they are compared, a path
            or `miniature/arm.safetensors`; none if omitted. It was trained on masks, so results are not weakly
            supervised any more.

    Raises:
        ValueError: a value out of range.
    """

    templates: str | list[str] = "imagenet"
    class_words: str | dict[str, Any] | None = None
    word_merge: Literal["max", "mean"] = "max"
    background_words: str | list[str] = "voc"
    filter_labels: bool = True
    logit_scale: float = 40.0
    window: int | None = 336
    stride: int = 112
    short_side: int | None = None
    long_side: int | None = None
    resampling: Resampling = "area"
    padding: int | None = None
    batch_size: int = 8
    arm: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale: got {self.logit_scale}, expected a number above 0; the paper uses 40")
        if self.window is not None and not 1 <= self.stride <= self.window:
            raise ValueError(
                f"stride: got {self.stride}, expected 1 to the window's {self.window}; the paper uses 112 of 336"
            )
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side: got {self.short_side}, expected 1 or more, or null for the image's own size")
        if self.long_side is not None and not (self.short_side or 1) <= self.long_side:
            raise ValueError(f"long_side: got {self.long_side}, expected short_side or more; the protocols use 2048")
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"padding: got {self.padding}, expected 0 or more, or null; try 16")


class ClipWordsGenerator(PseudoMaskGenerator):
    """Every pixel's probability of each word, over the words of the present classes and of the background.

    Patch features and texts are compared by cosine; the similarities are brought to the pixels (bilinear), averaged
    over the windows, and scaled; words of classes outside the image-level labels are dropped *before* the softmax over
    words. A class has the probability of its best word, and so has the background.

    Args:
        options: words and windows.
        encoder: turns windows into patch features in the space of the texts.
        classes: class names, background first.

    Raises:
        ValueError: an unknown preset, or a word list that does not fit the classes.
    """

    def __init__(self, options: ClipWordsOptions, encoder: ClipEncoder, classes: Sequence[str]) -> None:
        self._options, self._encoder, self._source = options, encoder, encoder.source
        self._templates = resolve_templates(options.templates)
        self._class_words = resolve_class_words(options.class_words, classes)
        self._background_words = resolve_background_words(options.background_words)
        self._arm_source = None if options.arm is None else ArmSource(options.arm, self._source)
        self._arm: Arm | None = None

    @property
    def digest(self) -> str:
        """Digest of the CLIP, of another model that the host asks, and of the ARM if there is one.

        Raises:
            MissingError: the weights are not there.
            ArtefactError, ConfigError: the ARM is damaged, or does not fit the CLIP.
        """
        return self._host_digest + (f"+{self._arm_source.digest}" if self._arm_source is not None else "")

    @property
    def supervision(self) -> str | None:
        """What the ARM was trained on, `pixel:<data set>`; `None` without one."""
        return None if self._arm_source is None else self._arm_source.record.supervision

    @property
    @abstractmethod
    def _host_digest(self) -> str:
        """Digest of the models that give the features."""

    @property
    def source(self) -> ClipSource:
        """The CLIP."""
        return self._source

    def share_source(self, source: ClipSource) -> None:
        """Take a CLIP of the same weights that another generator has loaded."""
        self._source = self._encoder.source = source

    def use_arm(self, arm: Arm | None) -> None:
        """Refine features by this module from now on; `None` ends that."""
        self._arm, self._encoder.shallow_blocks = arm, None if arm is None else arm.shape.blocks

    def cut_windows(
        self, sample: Sample, semantic: np.ndarray, proposals: Proposals | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor | None]]:
        """Yield the windows that cover an image, with their ground truth, as a training sees them.

        Args:
            sample: the image.
            semantic: `[H, W]` uint8 ids of its pixels.
            proposals: of the image, if they matter.

        Yields:
            `[h, w, 3]` uint8, `[h, w]` uint8 and `[h, w]` int64 ids of regions, `None` where they do not matter.
        """
        options = self._options
        resized = resize_sides(sample.image, options.short_side, options.long_side, options.resampling)
        height, width = resized.shape[:2]
        regions = self._find_regions(sample, proposals)
        if semantic.shape != (height, width):
            semantic = cv2.resize(semantic, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        if regions is not None:
            regions = sample_regions(regions, (height, width), 1, (height, width))
        for top, bottom, left, right in list_windows(height, width, options.window, options.stride):
            ids = None if regions is None else regions[top:bottom, left:right]
            yield resized[top:bottom, left:right], semantic[top:bottom, left:right], ids

    def compare_windows(self, windows: list[np.ndarray], regions: list[Tensor] | None) -> list[Tensor]:
        """Return the cosines `[Q, h, w]` of the pixels of windows and all words; gradients reach the ARM alone.

        Args:
            windows: `[h, w, 3]` uint8 each.
            regions: `[h, w]` int64 ids of each; `None` if proposals do not matter.
        """
        return self._see_windows(windows, self._texts[0], regions)

    @abstractmethod
    def _encode(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        """Return the features of windows `[H, W, 3]`; `regions` are their `[H, W]` id maps, if there are any."""

    def _find_regions(self, sample: Sample, proposals: Proposals | None) -> Tensor | None:
        """Return `[H, W]` int64 ids of the image's pixels, -1 for no region; `None` if proposals do not matter."""
        return None

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return probabilities of the classes in `labels` and of the background, `[0, 1]`.

        Maps need not sum to 1: a class's or the background's other words keep their share.

        Raises:
            DataError: a label that is no class.
            ConfigError: neither a label nor a background word is left to score.
            MissingError, ArtefactError: the weights are not there, or of another model.
        """
        num_classes = len(self._class_words)
        check_labels(sample.id, labels, num_classes)
        ids = tuple(labels) if self._options.filter_labels else tuple(range(1, num_classes + 1))
        texts, label_of_text = self._texts
        # Words of absent classes would be at minus infinity: dropping them gives the same result, with less work.
        present = [row for row, label in enumerate(label_of_text) if label == 0 or label in ids]
        if not present:
            raise ConfigError(
                "pseudo_masks.generator.background_words: got none, and the image has no label; name a background word"
            )
        with torch.inference_mode():
            cosines = self._compare(sample.image, texts[present], self._find_regions(sample, proposals))
            probability = (self._logit_scale * cosines).softmax(0)
            best = {
                label: probability[[row for row, text in enumerate(present) if label_of_text[text] == label]].amax(0)
                for label in {label_of_text[text] for text in present}
            }
        # Cloned outside inference mode: ordinary tensors.
        background = best[0].clone() if 0 in best else None
        scores = (
            torch.stack([best[label] for label in ids]).clone()
            if ids
            else torch.zeros(0, *sample.size, device=texts.device)
        )
        return ScoreMaps(ids, scores, background)

    @property
    def words(self) -> WordFeatures:
        """The words of the background and of all classes."""
        features, labels = self._texts
        return WordFeatures(features, tuple(labels), self._logit_scale)

    @torch.inference_mode()
    def pool_regions(self, image: np.ndarray, masks: Tensor) -> Tensor:
        """Return the CLIP feature of each region: the mean of its patches' unit features, over all windows.

        Args:
            image: `[H, W, 3]` uint8.
            masks: `[N, H, W]` bool on any device; they may overlap.

        Returns:
            `[N, D]` float32 on the model's device, L2-normalised; all zero for a mask without a pixel.
        """
        options = self._options
        resized = resize_sides(image, options.short_side, options.long_side, options.resampling)
        height, width = resized.shape[:2]
        masks = masks.to(self._source.device.torch_device)
        if masks.shape[1:] != (height, width) and len(masks):
            masks = F.interpolate(masks[None].float(), size=(height, width), mode="nearest")[0] > 0
        boxes = list_windows(height, width, options.window, options.stride)
        total = torch.zeros(len(masks), self._texts[0].shape[1], device=masks.device)
        for start in range(0, len(boxes), options.batch_size):
            batch = boxes[start : start + options.batch_size]
            crops = [resized[top:bottom, left:right] for top, bottom, left, right in batch]
            seen = [masks[:, top:bottom, left:right] for top, bottom, left, right in batch]
            borders = [self._find_border(crop) for crop in crops]
            crops = [pad_window(crop, border, self._mean_colour) for crop, border in zip(crops, borders, strict=True)]
            for part, border, token_map in zip(seen, borders, self._encode_refined(crops, None), strict=True):
                # A window that was cut to whole patches: its map is stretched over all that the window holds.
                is_cut = min(border) < 0
                grid = (
                    dataclasses.replace(token_map, image_size=(part.shape[1], part.shape[2])) if is_cut else token_map
                )
                weights = coverage(part if is_cut else pad_masks(part, border), grid)
                features = F.normalize(token_map.tokens.float(), dim=-1).flatten(0, 1)
                total += weights.flatten(1) @ features
        return F.normalize(total, dim=1)

    def _find_border(self, window: np.ndarray) -> tuple[int, int, int, int]:
        """Return the border that `padding` gives a window `[H, W, 3]`, as `find_borders` does; none if it is `None`."""
        padding = self._options.padding
        return (0, 0, 0, 0) if padding is None else find_borders(window.shape[:2], padding, self._encoder.stride)

    @property
    def base_logit_scale(self) -> float:
        """The factor of the cosines as it is configured."""
        return self._options.logit_scale

    @property
    def _logit_scale(self) -> float:
        """The factor of the cosines, which an ARM has learnt to change."""
        self._load_arm()
        return self._options.logit_scale * (1.0 if self._arm is None else float(self._arm.scale_factor.detach()))

    def _load_arm(self) -> None:
        if self._arm is None and self._arm_source is not None:
            self.use_arm(self._arm_source.load())

    def _encode_refined(self, crops: list[np.ndarray], regions: list[Tensor] | None) -> list[TokenMap]:
        """Return what `_encode` returns, sharpened by the ARM if there is one."""
        self._load_arm()
        maps = self._encode(crops, regions)
        return maps if self._arm is None else refine_maps(self._arm, maps, self._source.device)

    @cached_property
    def _texts(self) -> tuple[Tensor, list[int]]:
        """Normalised features `[Q, D]` of all words, and the class id of each word (0: the background's)."""
        words_by_label = (self._background_words, *self._class_words)
        merge_classes = self._options.word_merge == "mean"
        return encode_words(self._source, self._templates, words_by_label, merge_classes=merge_classes)

    @cached_property
    def _mean_colour(self) -> list[float]:
        """The colour that normalisation brings to about 0, in whole levels."""
        return list((self._source.normalisation[0].flatten() * 255).round().tolist())

    def _compare(self, image: np.ndarray, texts: Tensor, regions: Tensor | None = None) -> Tensor:
        """Return the cosines `[Q, H, W]` of every pixel of the image, averaged over the windows that hold it."""
        options = self._options
        resized = resize_sides(image, options.short_side, options.long_side, options.resampling)
        height, width = resized.shape[:2]
        if regions is not None:
            # A grid of patches of one pixel: the nearest pixel of the image.
            regions = sample_regions(regions, (height, width), 1, (height, width))
        boxes = list_windows(height, width, options.window, options.stride)
        # Of a single window without padding, the map goes to the pixels of the image at once, as the protocols do it.
        if options.padding is not None and len(boxes) == 1 and options.window is None:
            return self._see_windows([resized], texts, None if regions is None else [regions], image.shape[:2])[0]
        total = torch.zeros(len(texts), height, width, device=texts.device)
        num_windows = torch.zeros(height, width, device=texts.device)
        for start in range(0, len(boxes), options.batch_size):
            batch = boxes[start : start + options.batch_size]
            crops = [resized[top:bottom, left:right] for top, bottom, left, right in batch]
            ids = None if regions is None else [regions[top:bottom, left:right] for top, bottom, left, right in batch]
            for (top, bottom, left, right), cosines in zip(batch, self._see_windows(crops, texts, ids), strict=True):
                total[:, top:bottom, left:right] += cosines
                num_windows[top:bottom, left:right] += 1
        mean = total / num_windows
        if mean.shape[1:] != image.shape[:2]:
            mean = F.interpolate(mean[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0]
        return mean

    def _see_windows(
        self,
        crops: list[np.ndarray],
        texts: Tensor,
        regions: list[Tensor] | None,
        size: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """Return the cosines `[Q, h, w]` of the pixels of windows, or of `size` pixels that stand for a window."""
        padding = self._options.padding
        if padding is None:
            maps = self._encode_refined(crops, regions)
            return [_to_pixels(token_map, texts) for token_map in maps]
        borders = [find_borders(crop.shape[:2], padding, self._encoder.stride) for crop in crops]
        padded = [pad_window(crop, border, self._mean_colour) for crop, border in zip(crops, borders, strict=True)]
        if regions is not None:
            regions = [pad_regions(ids, border) for ids, border in zip(regions, borders, strict=True)]
        results = []
        for token_map, crop, border in zip(self._encode_refined(padded, regions), crops, borders, strict=True):
            height, width = crop.shape[:2]
            if min(border) < 0 or border == (0, 0, 0, 0):
                # Seen without padding: the map is stretched over what it stands for.
                whole = dataclasses.replace(token_map, image_size=tuple(size or (height, width)))
                results.append(_to_pixels(whole, texts))
                continue
            cosines = _to_pixels(token_map, texts)[:, border[0] : border[0] + height, border[2] : border[2] + width]
            if size is not None:
                cosines = F.interpolate(cosines[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
            results.append(cosines)
        return results


def as_region_encoder(generator: PseudoMaskGenerator) -> ClipWordsGenerator:
    """Return the generator whose CLIP gives regions the features that words are compared with.

    Raises:
        ConfigError: it compares no words, or its features depend on the image's proposals.
    """
    if not isinstance(generator, ClipWordsGenerator) or generator.needs_proposals:
        raise ConfigError(
            f"pseudo_masks.generator: got {type(generator).__name__}, expected clip_dense with retrieval.answer=words, "
            "whose CLIP sees regions; try pseudo_masks=clip_dense"
        )
    return generator


def _to_pixels(token_map: TokenMap, texts: Tensor) -> Tensor:
    """Return the cosines `[Q, H, W]` of a token map and texts at the pixels of its image."""
    cosines = F.normalize(token_map.tokens, dim=-1) @ texts.T
    return upsample(cosines.permute(2, 0, 1), token_map)
