"""Tags by a CLIP: the image compared with words, or TagCLIP's patches, affinity and crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.clip_maps import encode_masked, encode_with_attention
from moduseg.backbones.clip_model import ClipModelOptions, ClipSource
from moduseg.backbones.inputs import round_up, to_inputs
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.prompts import resolve_background_words, resolve_class_words, resolve_templates
from moduseg.pseudo_masks.word_features import encode_words
from moduseg.structures import Sample, Tags
from moduseg.taggers.base import Tagger

_KEY = "tagger.weights"


@dataclass(frozen=True, kw_only=True)
class ClipTaggerOptions(ClipModelOptions):
    """Which CLIP compares which words with an image.

    Attributes:
        templates, class_words, word_merge, background_words: as in
            `moduseg.pseudo_masks.clip_words.ClipWordsOptions`; background words compete, and are no tags.
        logit_scale: factor of the cosines before the softmax; the model's own if omitted.
        image_size: side of the square that the image is brought to; the model's own if omitted.
        threshold: classes of at least this probability are tags; the best one always is.

    Raises:
        ValueError: a value out of range.
    """

    templates: str | list[str] = "imagenet"
    class_words: str | dict[str, Any] | None = None
    word_merge: Literal["max", "mean"] = "max"
    background_words: str | list[str] = "clip_es_voc"
    logit_scale: float | None = None
    image_size: int | None = None
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_scale is not None and not self.logit_scale > 0:
            raise ValueError(f"logit_scale: got {self.logit_scale}, expected a number above 0, or null for the model's")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: got {self.image_size}, expected 1 or more, or null for the model's")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, expected 0 to 1; try 0.1")


@dataclass(frozen=True, kw_only=True)
class TagClipOptions(ClipTaggerOptions):
    """Settings of `TagClipTagger`; `image_size` is the side of the crops, and `threshold` is not used.

    Attributes:
        affinity_blocks: first and last block, 0-based, whose attention is averaged; `None` takes the last third of the
            blocks but the last: 8 to 10 of 12.
        min_votes: blocks in which a pair of patches has to attend more than their mean; `None` takes a third of them.
        candidates: share `a` between the lowest and the highest score of the maps above which a class is looked at in a
            crop (published: VOC .6, COCO .3, Context .2).
        map_weight, crop_weight: of the maps' score and of the crop's probability (VOC .4 and .8, COCO .8 and .2).
        keep: share `b` between the lowest and the highest final score above which a class is a tag (VOC .6, COCO .6,
            Context .2).

    Raises:
        ValueError: a value out of range.
    """

    affinity_blocks: tuple[int, int] | None = None
    min_votes: int | None = None
    candidates: float = 0.5
    map_weight: float = 0.5
    crop_weight: float = 0.5
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("candidates", "keep"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 <= share < 1; try 0.5")
        if min(self.map_weight, self.crop_weight) < 0:
            raise ValueError(f"map_weight, crop_weight: got {self.map_weight}, {self.crop_weight}, expected 0 or more")
        if self.affinity_blocks is not None and not 0 <= self.affinity_blocks[0] <= self.affinity_blocks[1]:
            raise ValueError(f"affinity_blocks: got {list(self.affinity_blocks)}, expected [first, last]; try [8, 10]")

    def resolve_blocks(self, depth: int) -> tuple[int, int]:
        """Return the first and last block of the affinity in an encoder of `depth` blocks.

        Raises:
            ConfigError: blocks that the encoder has not; the last one does not count, as it has no attention.
        """
        first, last = self.affinity_blocks or (min(2 * depth // 3, max(depth - 2, 0)), max(depth - 2, 0))
        if last > max(depth - 2, 0):
            raise ConfigError(
                f"tagger.affinity_blocks: got [{first}, {last}], expected blocks 0..{depth - 2} of an encoder of "
                f"{depth}; leave it out"
            )
        return first, last


class ClipTagger(Tagger):
    """The image as a square against all words: softmax over words, a class has its best word's probability.

    Args:
        options: model, words and threshold.
        device: where the model runs.
        classes: class names, background first.

    Raises:
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    runs_model = True
    takes_words: ClassVar[bool] = True

    def __init__(self, options: ClipTaggerOptions, device: Device, classes: Sequence[str]) -> None:
        self._options, self._source = options, ClipSource(options, device, _KEY)
        self._templates = resolve_templates(options.templates)
        self._words = (
            resolve_background_words(options.background_words),
            *resolve_class_words(options.class_words, classes),
        )

    @property
    def digest(self) -> str:
        """Digest of the CLIP.

        Raises:
            MissingError: the weights are not there.
        """
        return self._source.digest

    @torch.inference_mode()
    def tag(self, sample: Sample) -> Tags:
        """Return the classes whose probability reaches the threshold, and the best one.

        Raises:
            MissingError, ArtefactError: the weights are not there, or of another model.
        """
        pixels = to_inputs([sample.image], None, self._device)[0]
        side = self._side
        square = _resize(pixels[None], (side, side), antialias=True)
        with self._source.device.autocast():
            feature = encode_masked(self._source.model, self._normalise(square), self._all_patches(side))
        scores = self._best_by_class(self._compare(feature))[0].cpu()
        is_tag = scores >= self._options.threshold
        is_tag[scores.argmax()] = True
        return Tags(tuple(int(i) + 1 for i in is_tag.nonzero()[:, 0]), scores)

    @property
    def _device(self) -> torch.device:
        return self._source.device.torch_device

    @property
    def _patch(self) -> int:
        return int(self._source.model.config.vision_config.patch_size)

    @property
    def _side(self) -> int:
        """Side of a square input, in pixels, a multiple of the patch."""
        side = self._options.image_size or int(self._source.model.config.vision_config.image_size)
        return round_up((side, side), self._patch)[0]

    def _all_patches(self, side: int) -> Tensor:
        return torch.ones(1, (side // self._patch) ** 2, dtype=torch.bool, device=self._device)

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = self._source.normalisation
        return (pixels - mean) / std

    @cached_property
    def _texts(self) -> tuple[Tensor, list[int]]:
        """Features `[Q, D]` of all words, and the class id of each (0: the background's)."""
        merge_classes = self._options.word_merge == "mean"
        return encode_words(self._source, self._templates, self._words, merge_classes=merge_classes)

    @cached_property
    def _label_of_text(self) -> Tensor:
        """The class id of each word, `[Q]` int64, copied to the device once."""
        return torch.tensor(self._texts[1], device=self._device)

    def _compare(self, features: Tensor) -> Tensor:
        """Return the probabilities `[B, Q]` of all words for features `[B, D]`."""
        scale = self._options.logit_scale
        factor = self._source.model.logit_scale.exp() if scale is None else scale
        return (factor * F.normalize(features, dim=-1) @ self._texts[0].T).softmax(-1)

    def _best_by_class(self, probability: Tensor) -> Tensor:
        """Return the probability of each class's best word, `[..., C]`, from that of all words, `[..., Q]`."""
        best = probability.new_zeros(*probability.shape[:-1], len(self._words))
        best.scatter_reduce_(-1, self._label_of_text.expand_as(probability), probability, "amax")
        return best[..., 1:]


class TagClipTagger(ClipTagger):
    """TagCLIP (Lin et al., AAAI 2024): patch probabilities, spread by attention, checked in crops.

    1. `S0`: softmax over words at each patch, by a last block without attention, the image at its own size.
    2. `S1 = W S0`, `W` the mean attention of late blocks where enough blocks attend more than their mean; then once
       more for each word, from the patches inside the boxes of `S1` above its mean: `S_c = W_box S0_c`.
    3. A class scores the maximum of its map over patches. Those above `candidates` are looked at again: the crop around
       `S_c > 0.5` (after min-max), whose class token attends to these patches alone, gives the probability `p_c`, and
       the score becomes `map_weight * s + crop_weight * p_c`.
    4. Tags are the classes above `keep`, or the best one.

    Args:
        options: model, words, blocks and shares.
        device: where the model runs.
        classes: class names, background first.

    Raises:
        ValueError: a value out of range, an unknown preset, or a word list that does not fit the classes.
    """

    _options: TagClipOptions

    def __init__(self, options: TagClipOptions, device: Device, classes: Sequence[str]) -> None:
        super().__init__(options, device, classes)

    @torch.inference_mode()
    def tag(self, sample: Sample) -> Tags:
        """Return the classes whose score is above `keep`, or the best one.

        Raises:
            ConfigError: `affinity_blocks` that the model has not.
            MissingError, ArtefactError: the weights are not there, or of another model.
        """
        options = self._options
        # Patch probabilities and affinity, the image at its own size.
        pixels = to_inputs([sample.image], None, self._device)
        size = round_up(pixels[0].shape[1:], self._patch)
        inputs = self._normalise(_resize(pixels[0][None], size, antialias=False))
        grid = (size[0] // self._patch, size[1] // self._patch)
        with self._source.device.autocast():
            features, attention = encode_with_attention(self._source.model, inputs)
        coarse = self._compare(features)
        num_blocks = len(attention)
        first, last = options.resolve_blocks(num_blocks)
        min_votes = num_blocks // 3 if options.min_votes is None else options.min_votes
        affinity = select_affinity(attention, (first, last), min_votes)
        # Maps of all words, spread inside their boxes.
        maps = spread_in_boxes(coarse, affinity, grid)
        by_class = self._best_by_class(maps)
        scores = by_class.amax(0)
        # Candidates once more, each in its crop.
        low, high = maps.min(), maps.max()
        candidates = (scores > low + options.candidates * (high - low)).nonzero()[:, 0].tolist()
        for index in candidates:
            probability = self._look_again(inputs, by_class[:, index].unflatten(0, grid), index)
            if probability is not None:
                scores[index] = options.map_weight * scores[index] + options.crop_weight * probability
        return Tags(select_tags(scores, options.keep), scores.cpu())

    def _look_again(self, inputs: Tensor, class_map: Tensor, index: int) -> Tensor | None:
        """Return the probability of a class in the crop around its map; `None` if the map is flat.

        Args:
            inputs: `[1, 3, H, W]` normalised.
            class_map: `[h, w]` scores of the class.
            index: of the class, 0 the first.
        """
        mask = _stretch(class_map) > 0.5
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if not len(rows):
            return None
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        patch, side = self._patch, self._side
        crop = inputs[:, :, top * patch : bottom * patch, left * patch : right * patch]
        crop = F.interpolate(crop, size=(side, side), mode="bilinear", align_corners=False)
        cells = side // patch
        visible = F.interpolate(mask[None, None, top:bottom, left:right].float(), size=(cells, cells), mode="nearest")
        with self._source.device.autocast():
            feature = encode_masked(self._source.model, crop, visible.flatten(1) > 0)
        return self._best_by_class(self._compare(feature))[0, index]


def select_affinity(attention: Tensor, blocks: tuple[int, int], min_votes: int) -> Tensor:
    """Return the affinity of patches `[n, n]`: mean attention of some blocks, where enough blocks agree.

    Args:
        attention: `[L, n, n]`, of each block.
        blocks: first and last block of the mean.
        min_votes: blocks in which a pair has to attend more than the block's mean.
    """
    votes = (attention > attention.mean((1, 2), keepdim=True)).sum(0)
    return attention[blocks[0] : blocks[1] + 1].mean(0) * (votes >= min_votes)


def spread_in_boxes(coarse: Tensor, affinity: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return maps `[n, Q]` of words spread by the affinity, from the patches in each word's own boxes.

    The boxes of a word are those of the connected parts of its spread map, after min-max, above its mean.

    Args:
        coarse: `[n, Q]`, probability of each word at each patch.
        affinity: `[n, n]`.
        grid: `(h, w)` with `n = h * w`.
    """
    spread = _stretch(affinity @ coarse, dim=0)
    is_high = (spread > spread.mean(0)).T.unflatten(1, grid).cpu().numpy()
    boxes = torch.from_numpy(np.stack([fill_boxes(mask) for mask in is_high])).to(coarse.device)
    return affinity @ (coarse * boxes.flatten(1).T)


def fill_boxes(mask: np.ndarray) -> np.ndarray:
    """Return a mask `[h, w]` bool whose connected parts (corners connect) are filled to their bounding boxes."""
    filled = np.zeros_like(mask)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    for left, top, width, height, _ in stats[1:]:
        filled[top : top + height, left : left + width] = True
    return filled


def select_tags(scores: Tensor, keep: float) -> tuple[int, ...]:
    """Return the ascending ids of the classes whose score is above `min + keep (max - min)`, or of the best one.

    Args:
        scores: `[C]`, class 1 first.
        keep: in [0, 1).
    """
    low, high = scores.min(), scores.max()
    chosen = (scores > low + keep * (high - low)).nonzero()[:, 0].tolist() or [int(scores.argmax())]
    return tuple(index + 1 for index in chosen)


def _stretch(values: Tensor, dim: int | None = None) -> Tensor:
    """Return values between 0 and 1 by their lowest and highest (of each column for `dim` 0); flat ones become 0."""
    low, high = (values.amin(), values.amax()) if dim is None else (values.amin(dim), values.amax(dim))
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def _resize(pixels: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    """Return `[B, 3, *size]` in [0, 1], bicubic; as it is if it has the size."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=antialias, align_corners=False).clamp(0, 1)
