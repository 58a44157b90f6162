"""SAM 3, as `transformers` has it, asked where an image shows what a word says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moduseg.devices import Device, copy_arrays
from moduseg.errors import ArtefactError, MissingError
from moduseg.weights.hub import first_line
from moduseg.weights.pretrained import Pretrained

CLASSES = {"sam3": "Sam3Model", "sam3_video": "Sam3Model"}
"""Classes of `transformers` by the `model_type` of a `config.json`; of the published video model, only the detector."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_TRACKER = r"^(tracker_model|tracker_neck)\."
_TEXTS_AT_ONCE = 32
_MASKS_AT_ONCE = 32
"""Masks that are brought to the size of the image together, which bounds the memory."""


@dataclass(frozen=True)
class EncodedWords:
    """Words as the model's detector takes them.

    Attributes:
        features: `[Q, L, D]` float32, a vector for each token.
        mask: `[Q, L]` int64, 1 where there is a token and 0 behind the end of the word.
    """

    features: Tensor
    mask: Tensor

    def select(self, rows: Sequence[int]) -> EncodedWords:
        """Return some of the words, in the order of `rows`."""
        return EncodedWords(
            torch.stack([self.features[row] for row in rows]), torch.stack([self.mask[row] for row in rows])
        )


@dataclass(frozen=True)
class Sightings:
    """What the model sees of some words in an image.

    Attributes:
        presence: `[Q]` float32 in [0, 1], how probable it is that the image shows the word at all.
        object_scores: `[Q, N]` float32 in [0, 1], how well each of the model's objects fits the word, if it is there.
        masks: `[Q, N, h, w]` float32, logits of the objects' pixels.
        semantic: `[Q, h, w]` float32, logits of the pixels of everything that the word says.
    """

    presence: Tensor
    object_scores: Tensor
    masks: Tensor
    semantic: Tensor


class ConceptModel:
    """SAM 3 with its tokenizer; each is read on first use.

    Args:
        source: where weights and tokenizer are.
        device: where the model runs, and in which precision.
    """

    def __init__(self, source: Pretrained, device: Device) -> None:
        self._source, self._device = source, device

    @property
    def side(self) -> int:
        """Side of the square that an image is squashed to, in pixels."""
        return int(self._backbone_config.image_size)

    @property
    def stride(self) -> int:
        """Side of a patch in pixels."""
        return int(self._backbone_config.patch_size)

    def encode_words(self, words: Sequence[str]) -> EncodedWords:
        """Return words as the detector takes them; longer ones than the model reads are cut off.

        Raises:
            MissingError, ArtefactError: the weights or the tokenizer are not there, damaged, or of another model.
        """
        settings = self._model.config.text_config
        if len(self._tokenizer) > settings.vocab_size:
            raise ArtefactError(
                f"{self._source.key}: the tokenizer has {len(self._tokenizer)} tokens, the model "
                f"{settings.vocab_size}; take both from one place"
            )
        features, masks = [], []
        for start in range(0, len(words), _TEXTS_AT_ONCE):
            batch = self._tokenizer(
                list(words[start : start + _TEXTS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=settings.max_position_embeddings,
                return_tensors="pt",
            ).to(self._device.torch_device)
            with torch.inference_mode(), self._device.autocast():
                output = self._model.get_text_features(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                )
            features.append(output.pooler_output.float())
            masks.append(batch["attention_mask"])
        return EncodedWords(torch.cat(features), torch.cat(masks))

    def encode_image(self, image: np.ndarray, side: int) -> Any:
        """Return the features of an image that all words share.

        Args:
            image: `[H, W, 3]` uint8 RGB.
            side: of the square that it is squashed to, in pixels; a multiple of `stride`.
        """
        with torch.inference_mode(), self._at_side(side), self._device.autocast():
            return self._model.get_vision_features(pixel_values=self._prepare(image, side))

    def look(self, encoded_image: Any, words: EncodedWords) -> Sightings:
        """Return what the model sees of words in an image, in one pass of its detector."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        num_words = len(words.features)
        shared = {
            name: tuple(level.expand(num_words, -1, -1, -1) for level in encoded_image[name])
            for name in ("fpn_hidden_states", "fpn_position_encoding")
        }
        with torch.inference_mode(), self._device.autocast():
            output = self._model(
                vision_embeds=type(encoded_image)(**shared),
                text_embeds=BaseModelOutputWithPooling(pooler_output=words.features),
                attention_mask=words.mask,
            )
        return Sightings(
            presence=output.presence_logits.float().sigmoid()[:, 0],
            object_scores=output.pred_logits.float().sigmoid(),
            masks=output.pred_masks.float(),
            semantic=output.semantic_seg.float()[:, 0],
        )

    def _prepare(self, image: np.ndarray, side: int) -> Tensor:
        """Return the input `[1, 3, side, side]` float32: squashed with Pillow's bilinear filter, and normalised."""
        squashed = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        (pixels,) = copy_arrays([squashed], self._device.torch_device)
        mean, std = self._normalisation
        return ((pixels.permute(2, 0, 1).float() / 255 - mean) / std)[None]

    @contextmanager
    def _at_side(self, side: int) -> Iterator[None]:
        """Let the image encoder take squares of another side: its positions are made for the side of its configuration.

        As a model does that is built for the other side, this stretches the positions of global attention to the same
        range; windows have the same positions at every side.
        """
        if side == self.side:
            yield
            return
        layers = [layer for layer in self._model.vision_encoder.backbone.layers if layer.window_size == 0]
        own = [layer.position_ids for layer in layers]
        try:
            for layer in layers:
                layer.position_ids = self._find_positions(layer, side)
            yield
        finally:
            for layer, positions in zip(layers, own, strict=True):
                layer.position_ids = positions

    def _find_positions(self, layer: Any, side: int) -> Tensor:
        """Return the positions `[(side / stride)^2, 2]` of the patches for a layer with global attention."""
        if side not in self._positions:
            config = deepcopy(layer.config)
            config.image_size = side
            self._positions[side] = layer.precompute_positions(config, 0).to(self._device.torch_device)
        return self._positions[side]

    @cached_property
    def _positions(self) -> dict[int, Tensor]:
        """Positions by the side of the square, as far as they were asked for."""
        return {}

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of inputs in [0, 1], `[3, 1, 1]` each, as the preprocessor file says."""
        settings, device = self._source.preprocessor, self._device.torch_device
        mean, std = (settings.get(name, (0.5, 0.5, 0.5)) for name in ("image_mean", "image_std"))
        return (
            torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1),
            torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1),
        )

    @property
    def _backbone_config(self) -> Any:
        return self._model.config.vision_config.backbone_config

    @cached_property
    def _model(self) -> Any:
        """The model on its device, in float32 and evaluation mode."""
        hint = "try pseudo_masks=clip_dense_vit_b16 for a CLIP"
        model = self._source.load_by_type(CLASSES, hint, unused=_TRACKER)
        return model.requires_grad_(False).to(self._device.torch_device)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        folder = self._source.folder
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise MissingError(
                f"{folder}: no {' or '.join(TOKENIZER_FILES)}, which words need; fetch it where the weights are from"
            )
        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder}: not a CLIP tokenizer ({first_line(error)}); fetch it again") from error


def merge_objects(sightings: Sightings, min_score: float, size: tuple[int, int]) -> Tensor:
    """Return every pixel's best object of each word, as SegEarth-OV3 has it before the semantic head.

    An object's score is its fit to the word times the word's presence, as in `transformers`'
    `Sam3Processor.post_process_instance_segmentation`; a pixel has the probability that the mask gives it times that
    score.

    Args:
        sightings: of `Q` words.
        min_score: objects count whose score is above it, in [0, 1].
        size: `(H, W)` of the result; probabilities are brought to it (bilinear).

    Returns:
        `[Q, H, W]` float32 in [0, 1]; 0 for a word without objects.
    """
    scores = sightings.object_scores * sightings.presence[:, None]
    words, objects = (scores > min_score).nonzero(as_tuple=True)
    best = scores.new_zeros(len(scores), size[0] * size[1])
    for start in range(0, len(words), _MASKS_AT_ONCE):
        block = slice(start, start + _MASKS_AT_ONCE)
        owners, found = words[block], objects[block]
        probability = _to_pixels(sightings.masks[owners, found].sigmoid(), size).flatten(1)
        weighted = probability * scores[owners, found, None]
        best.scatter_reduce_(0, owners[:, None].expand_as(weighted), weighted, "amax")
    return best.view(-1, *size)


def weigh_semantic(sightings: Sightings, size: tuple[int, int]) -> Tensor:
    """Return every pixel's probability by the semantic head times the presence, `[Q, H, W]` float32 in [0, 1]."""
    return _to_pixels(sightings.semantic.sigmoid(), size) * sightings.presence[:, None, None]


def _to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps `[N, h, w]` at another size (bilinear)."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
