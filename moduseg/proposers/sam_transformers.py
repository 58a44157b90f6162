"""Proposals of SAM, SAM-HQ, SAM 2, SAM 2.1 and the tracker of SAM 3, as `transformers` has them, under our own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.drawn import prompt_model
from moduseg.proposers.grid_options import EncoderOptions
from moduseg.proposers.inputs import IMAGENET_MEAN, IMAGENET_STD, fit_longest_side, prepare_images
from moduseg.proposers.mask_generation import Decoded, Promptable, check_thickness, generate_batch
from moduseg.proposers.mask_upsampling import Embedded
from moduseg.proposers.sam_attention import RelativeAttention
from moduseg.structures import Proposals, Sample
from moduseg.weights.pretrained import Pretrained

CLASSES = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "sam3_tracker": "Sam3TrackerModel",
    "sam3_tracker_video": "Sam3TrackerModel",
    "sam3_video": "Sam3TrackerModel",
}
"""Classes of `transformers` by the `model_type` of a `config.json`. The published files of SAM 2 and 3 hold the video
models; the image model has neither their memory nor their detector."""
SQUASHED = ("Sam2Model", "Sam3TrackerModel")
"""Models that resize an image to a square; the others resize its longest side, and pad."""


@dataclass(frozen=True, kw_only=True)
class SamTransformersOptions(EncoderOptions):
    """Options of the mask generation, and the name of the model under it.

    Attributes:
        weights: a directory as `save_pretrained` writes it, or a hub id such as `facebook/sam2.1-hiera-large`.
        revision: branch, tag or commit of a hub id.
        multimask_output: three masks for each point; `False` gives one, which is meant to be the object.

    Raises:
        ValueError: a value out of range.
    """

    weights: str
    revision: str | None = None
    multimask_output: bool = True


class SamTransformersProposer(Proposer):
    """Masks of a grid of points, filtered as `SamAutomaticMaskGenerator` does, best predicted IoU first.

    Args:
        options: weights, grid and filters.
        device: where the model runs. Precision holds for the image encoder; prompts and masks stay in float32.

    Raises:
        ValueError: empty `weights`.
    """

    def __init__(self, options: SamTransformersOptions, device: Device) -> None:
        self._options, self._device = options, device
        self._source = Pretrained(options.weights, options.revision, "proposer.weights", "SAM")

    @property
    def digest(self) -> str:
        """The sha256 over the model's files.

        Raises:
            MissingError: they are not there and cannot be fetched.
            ArtefactError, StorageError: as `moduseg.weights.sources.find_model_folder` does.
        """
        return self._source.digest

    def propose(self, sample: Sample) -> Proposals:
        """Return masks in descending predicted IoU; `[0, H, W]` if none survives.

        Raises:
            DataError: an image so thin that nothing of it is left at the model's input size.
            MissingError: the model is not there and cannot be fetched.
            ArtefactError: it is another model, or damaged.
        """
        return self.propose_batch([sample])[0]

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        """Return the masks of several images, which are embedded together.

        Raises:
            DataError, MissingError, ArtefactError: as `propose` does.
        """
        if not self.promptable.squash:
            for sample in samples:
                check_thickness(sample, self.promptable.side)
        images = [sample.image for sample in samples]
        options = self._options
        return generate_batch(
            self.promptable, images, options, options.images_per_batch, skip_certain=options.skip_certain
        )

    def find_region(self, sample: Sample, box: PromptBox) -> np.ndarray | None:
        """Ask the model with points, `[H, W]` bool.

        Raises:
            DataError, MissingError, ArtefactError: as `propose` does.
        """
        if not self.promptable.squash:
            check_thickness(sample, self.promptable.side)
        return prompt_model(self.promptable, sample.image, box)

    @cached_property
    def promptable(self) -> HubSam:
        """The model; loaded on first use.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        model = self._source.load_by_type(CLASSES, "try proposer=mask2former for models without prompts")
        return HubSam(
            model,
            self._device,
            self._source.preprocessor,
            compiled=self._options.compile,
            multimask_output=self._options.multimask_output,
        )


class HubSam(Promptable):
    """A promptable model of `transformers`.

    Args:
        model: a model of one of the classes in `CLASSES`, in evaluation mode.
        device: where it is moved to; precision holds for the image encoder.
        preprocessor: settings of its image processor: `image_mean` and `image_std`.
        compiled: have `torch.compile` translate the image encoder, at its first pass.
        multimask_output: three masks for each point, or one.
    """

    def __init__(
        self,
        model: Any,
        device: Device,
        preprocessor: dict[str, Any],
        *,
        compiled: bool = False,
        multimask_output: bool = True,
    ) -> None:
        self._model, self._device = model.to(device.torch_device), device
        self._multimask_output = multimask_output
        # SAM 2's own mask generation has the decoder's single mask as it is; a user's click may take another in its
        # place if that is more stable.
        if hasattr(model.mask_decoder, "dynamic_multimask_via_stability"):
            model.mask_decoder.dynamic_multimask_via_stability = False
        self._name = type(model).__name__
        self.squash = self._name in SQUASHED
        self.side = int(model.config.prompt_encoder_config.image_size)
        default = (0.5, 0.5, 0.5) if self._name == "Sam3TrackerModel" else None
        self._mean = preprocessor.get("image_mean", default or IMAGENET_MEAN)
        self._std = preprocessor.get("image_std", default or IMAGENET_STD)
        if self._name == "SamHQModel":
            _use_attended_image(model.mask_decoder)
        if self._name in ("SamModel", "SamHQModel"):
            for layer in model.vision_encoder.layers:
                layer.attn = _RelativeAttention(layer.attn, layer.attn.num_attention_heads)
        if compiled:
            model.vision_encoder.compile()

    @property
    def device(self) -> torch.device:
        return self._device.torch_device

    def embed(self, image: np.ndarray) -> Embedded:
        return self.embed_batch([image])[0]

    def embed_batch(self, images: Sequence[np.ndarray]) -> list[Embedded]:
        """Return the embeddings of several images in one pass: all are squashed or padded to one square."""
        square = (self.side, self.side)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        inputs = [square if self.squash else fit_longest_side(size, self.side) for size in sizes]
        pixels = prepare_images(images, inputs, square, mean=self._mean, std=self._std, device=self.device)
        with self._device.autocast():
            features = _to_float(self._model.get_image_embeddings(pixels))
        return [
            Embedded(_select_row(features, row), size, input_size, None if self.squash else square)
            for row, (size, input_size) in enumerate(zip(sizes, inputs, strict=True))
        ]

    def decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        features: dict[str, Any] = {"image_embeddings": embedded.features}
        if self._name == "SamHQModel":
            features = dict(zip(("image_embeddings", "intermediate_embeddings"), embedded.features, strict=True))
        labels = torch.ones(1, len(points), 1, dtype=torch.int, device=points.device)
        with self._device.run_uncast():
            output = self._model(
                input_points=points[None, :, None],
                input_labels=labels,
                multimask_output=self._multimask_output,
                **features,
            )
        predicted_iou, logits = output.iou_scores[0], output.pred_masks[0]
        if min_iou <= 0:
            return Decoded(logits.flatten(0, 1), predicted_iou.flatten())
        rows = (predicted_iou > min_iou).flatten().nonzero()[:, 0]
        return Decoded(logits.flatten(0, 1)[rows], predicted_iou.flatten()[rows])


class _RelativeAttention(RelativeAttention):
    """Attention that is called, and answers, as that of `transformers`."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


def _to_float(value: Any) -> Any:
    """Return tensors in float32, also inside lists and tuples."""
    if isinstance(value, list | tuple):
        return [_to_float(v) for v in value]
    return value.float()


def _select_row(value: Any, row: int) -> Any:
    """Return one image's row `[1, ...]` of tensors `[B, ...]`, also inside lists."""
    if isinstance(value, list):
        return [_select_row(v, row) for v in value]
    return value[row : row + 1]


def _use_attended_image(decoder: Any) -> None:
    """Correct SAM-HQ's mask decoder as `transformers` 5 has it.

    The decoder upscales the image embedding from before its transformer, with rows and columns exchanged; SAM and
    SAM-HQ (Ke et al., Segment Anything in High Quality, NeurIPS 2023) upscale the embedding that the transformer
    returns. A decoder that does so already computes the same with these hooks.
    """
    attended: list[Tensor] = []

    def remember(module: Any, arguments: Any, output: Any) -> None:
        attended[:] = [output[1]]

    def replace(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (embedding,) = arguments
        return (attended.pop().flatten(0, 1).transpose(1, 2).reshape(embedding.shape),)

    decoder.transformer.register_forward_hook(remember)
    decoder.upscale_conv1.register_forward_pre_hook(replace)
