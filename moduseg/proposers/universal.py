"""Mask2Former, OneFormer and EoMT as class-agnostic proposers: what a mask is called is dropped, its score is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError
from moduseg.masks.id_maps import to_disjoint
from moduseg.proposers.base import Proposer
from moduseg.proposers.inputs import IMAGENET_MEAN, IMAGENET_STD, fit_shortest_side, prepare_images
from moduseg.proposers.mask_upsampling import Embedded, enlarge
from moduseg.structures import Proposals, Sample
from moduseg.weights.pretrained import Pretrained

CLASSES = {
    "mask2former": "Mask2FormerForUniversalSegmentation",
    "oneformer": "OneFormerForUniversalSegmentation",
    "eomt": "EomtForUniversalSegmentation",
    "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
}
"""Classes of `transformers` by the `model_type` of a `config.json`."""
UNUSED = r"^criterion\.|^model\.text_mapper\.|relative_position_index$|position_ids$"
"""Tensors of the losses and of the reader of captions in training, and tables that the models make again."""
DEFAULT_SIZE = {
    "mask2former": {"shortest_edge": 800, "longest_edge": 1333},
    "oneformer": {"shortest_edge": 800, "longest_edge": 1333},
    "eomt": {"shortest_edge": 640, "longest_edge": 640},
    "eomt_dinov3": {"shortest_edge": 640, "longest_edge": 640},
}
"""Sizes of the image processors, for directories without their settings."""


@dataclass(frozen=True, kw_only=True)
class UniversalOptions:
    """Which universal segmenter is run, and which of its masks become proposals.

    Attributes:
        weights: a directory as `save_pretrained` writes it, or a hub id such as `tue-mps/coco_panoptic_eomt_large_640`.
        revision: branch, tag or commit of a hub id.
        score_thresh: smallest score, in [0, 1]. Proposals are cached once for several readers, so leave it low.
        mask_thresh: smallest probability of a mask's pixels, between 0 and 1.
        disjoint: give each pixel to the best-scored mask that holds it; masks that lose all their pixels are dropped.
        task: the task that OneFormer is asked for; the other models have no such input.
        short_side: the image is resized until its short side has this many pixels, or fewer if the long side would
            exceed `max_long_side`; as the image processor's settings say if omitted. EoMT has one size and takes none.
        max_long_side: limit of the long side, in pixels; as the settings say if omitted.

    Raises:
        ValueError: a value out of range.
    """

    weights: str
    revision: str | None = None
    score_thresh: float = 0.05
    mask_thresh: float = 0.5
    disjoint: bool = False
    task: Literal["panoptic", "instance", "semantic"] = "panoptic"
    short_side: int | None = None
    max_long_side: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.score_thresh <= 1:
            raise ValueError(f"score_thresh: got {self.score_thresh}, expected 0 to 1; try 0.05")
        if not 0 < self.mask_thresh < 1:
            raise ValueError(f"mask_thresh: got {self.mask_thresh}, expected a number between 0 and 1; try 0.5")
        if self.task not in ("panoptic", "instance", "semantic"):
            raise ValueError(f"task: got {self.task!r}, expected panoptic, instance or semantic; try panoptic")
        for name, usual in (("short_side", 800), ("max_long_side", 1333)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more; the models were published with {usual}")


class UniversalProposer(Proposer):
    """One mask a query, scored by the probability of its likeliest class times the mean probability of its pixels.

    That is the score of these models' instance segmentation (Cheng et al., Masked-attention Mask Transformer, CVPR
    2022, section 4.1), things and stuff alike.

    Args:
        options: weights and limits.
        device: where the model runs, and in which precision.

    Raises:
        ValueError: empty `weights`.
    """

    def __init__(self, options: UniversalOptions, device: Device) -> None:
        self._options, self._device = options, device
        self._source = Pretrained(options.weights, options.revision, "proposer.weights", "segmentation model")
        self._min_logit = math.log(options.mask_thresh / (1 - options.mask_thresh))

    @property
    def digest(self) -> str:
        """The sha256 over the model's files.

        Raises:
            MissingError: they are not there and cannot be fetched.
            ArtefactError, StorageError: as `moduseg.weights.sources.find_model_folder` does.
        """
        return self._source.digest

    @torch.no_grad()
    def propose(self, sample: Sample) -> Proposals:
        """Return masks in descending score; `[0, H, W]` if none reaches `score_thresh`.

        Raises:
            MissingError: the model is not there and cannot be fetched.
            ArtefactError: it is another model, or damaged.
            ConfigError: as `prepare_input` does.
        """
        pixels, frame = self.prepare_input(sample.image)
        min_score = self._options.score_thresh
        with self._device.autocast():
            output = self.model(pixel_values=pixels, **self.extra_inputs)
        # The last class is "no object".
        classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1].amax(-1)
        # A mask's score never exceeds that of its class.
        hopeful = classes >= min_score
        classes, logits = classes[hopeful], output.masks_queries_logits[0][hopeful].float()
        masks, scores, start = [], [], 0
        for chunk in enlarge(logits, frame):
            inside = chunk > self._min_logit
            area = inside.sum((1, 2))
            quality = (chunk.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
            score = classes[start : start + len(chunk)] * quality
            keep = (area > 0) & (score >= min_score)
            masks.append(inside[keep])
            scores.append(score[keep])
            start += len(chunk)
        if not masks:
            return Proposals(torch.zeros((0, *sample.size), dtype=torch.bool))
        proposals = Proposals(torch.cat(masks), torch.cat(scores))
        proposals = proposals.select(torch.argsort(proposals.predicted_iou, descending=True, stable=True))
        return (to_disjoint(proposals) if self._options.disjoint else proposals).to(torch.device("cpu"))

    @cached_property
    def model(self) -> Any:
        """The model on its device; loaded on first use.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        if self._source.model_type in CLASSES and self._source.preprocessor.get("do_split_image"):
            raise ArtefactError(
                f"{self._source.folder}: a model for semantic segmentation in windows, whose masks are whole classes; "
                "expected one for panoptic or instance segmentation; try tue-mps/coco_panoptic_eomt_large_640"
            )
        model = self._source.load_by_type(CLASSES, "try proposer=sam_transformers for a SAM", unused=UNUSED)
        return model.to(self._device.torch_device)

    @cached_property
    def extra_inputs(self) -> dict[str, Any]:
        """Further inputs: OneFormer reads its task as text, `[1, task_seq_len]` int64 tokens.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        if self._source.model_type != "oneformer":
            return {}
        from transformers import CLIPTokenizer

        folder, length = self._source.folder, int(self.model.config.task_seq_len)
        try:
            # Without its files, some versions of transformers make a tokenizer that knows no word.
            if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
                raise FileNotFoundError("no tokenizer.json or vocab.json")
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
            text = f"the task is {self._options.task}"
            encoded = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{folder}: no tokenizer, with which OneFormer reads its task ({' '.join(str(error).split())[:80]}); "
                "fetch tokenizer.json, or vocab.json and merges.txt, from where the weights are"
            ) from error
        # OneFormer was trained with 0 in the padding, not with the token that CLIP's tokenizer pads with.
        return {"task_inputs": (encoded.input_ids * encoded.attention_mask).to(self._device.torch_device)}

    def _fit_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the size that an image of `shape` is resized to: the options' first, then the processor's settings."""
        options, settings, kind = self._options, self._source.preprocessor, self._source.model_type
        if (options.short_side or options.max_long_side) and kind.startswith("eomt"):
            raise ConfigError(
                f"proposer.short_side: got a size for {kind}, which has positions for one size only; leave "
                "proposer.short_side and proposer.max_long_side out"
            )
        size = settings.get("size") or DEFAULT_SIZE[kind]
        if isinstance(size, int):
            size = {"shortest_edge": size, "longest_edge": settings.get("max_size")}
        if "height" in size and "width" in size and options.short_side is None:
            return int(size["height"]), int(size["width"])
        short_side = options.short_side or int(size["shortest_edge"])
        return fit_shortest_side(shape, short_side, options.max_long_side or size.get("longest_edge"))

    def prepare_input(self, image: np.ndarray) -> tuple[Tensor, Embedded]:
        """Return the model's input, `[1, 3, H', W']`, and how its mask logits lie on the image.

        Raises:
            MissingError, ArtefactError: as `propose` does.
            ConfigError: a size for a model that has one only.
        """
        model = self.model
        settings, kind = self._source.preprocessor, self._source.model_type
        shape = (image.shape[0], image.shape[1])
        inner = self._fit_size(shape)
        if kind == "mask2former" and (step := int(settings.get("size_divisor", 32) or 0)):
            # Stretched, not padded, to a multiple of what its backbone halves.
            inner = (-(-inner[0] // step) * step, -(-inner[1] // step) * step)
        padded = inner
        if kind.startswith("eomt"):
            # It has positions for one size only.
            side = model.config.image_size
            padded = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
            inner = (min(inner[0], padded[0]), min(inner[1], padded[1]))
        mean, std = settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)
        pixels = prepare_images(
            [image],
            [inner],
            padded,
            mean=mean,
            std=std,
            device=self._device.torch_device,
            black=kind.startswith("eomt"),
        )
        return pixels, Embedded(None, shape, inner, padded)
