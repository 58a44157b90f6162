"""Captions of images, which continue a prompt: from BLIP, or from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from moduseg.devices import Device, Precision
from moduseg.errors import ArtefactError, DataError, MissingError
from moduseg.files import file_digest
from moduseg.structures import Sample
from moduseg.weights.hub import first_line
from moduseg.weights.pretrained import Pretrained

if TYPE_CHECKING:
    from transformers import BlipForConditionalGeneration, BlipProcessor

CaptionerName = Literal["none", "blip", "file"]


@dataclass(frozen=True, kw_only=True)
class CaptionerOptions:
    """Where captions come from.

    Attributes:
        name: `none`; `blip`, which continues the prompt about each class; `file`, which holds texts.
        weights: of `blip`, a directory as `save_pretrained` writes it, or a hub id.
        revision: branch, tag or commit of a hub id.
        path: of `file`, a JSON object from the id of an image to a text, or to an object from names of classes to
            texts. A text continues the prompt; one that begins with the prompt is read from there on.
        max_tokens: of `blip`, tokens of a caption with its prompt (transformers' own default: 20).
        precision: of `blip` on a CUDA device; the run's if omitted.

    Raises:
        ValueError: a value out of range, or a missing path.
    """

    name: CaptionerName = "none"
    weights: str = "Salesforce/blip-image-captioning-large"
    revision: str | None = None
    path: str | None = None
    max_tokens: int = 20
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(CaptionerName):
            raise ValueError(f"name: got {self.name!r}, expected one of {', '.join(get_args(CaptionerName))}")
        if self.name == "file" and not self.path:
            raise ValueError("path: got none, expected a JSON file of captions with name=file")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected 1 or more; try 20")


class Captioner:
    """Continues prompts about an image; this one with nothing.

    Args:
        key: the configuration key of the options, for messages.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    @property
    def digest(self) -> str:
        """Digest of what decides the captions; empty without any."""
        return ""

    def caption(self, sample: Sample, class_name: str, prefix: str) -> str:
        """Return what follows a prompt, without the prompt.

        Args:
            sample: an image.
            class_name: the class that the prompt is about.
            prefix: the prompt.

        Raises:
            DataError: there is no caption.
        """
        return ""


class FileCaptioner(Captioner):
    """Reads captions from a JSON file.

    Args:
        path: the file.
        key: the configuration key of the options, for messages.
    """

    def __init__(self, path: str, key: str) -> None:
        super().__init__(key)
        self._path = Path(path).expanduser()

    @property
    def digest(self) -> str:
        """The file's sha256.

        Raises:
            MissingError: there is no such file.
        """
        if not self._path.is_file():
            raise MissingError(f"{self._key}.path: got '{self._path}', no such file; set {self._key}.path=<JSON file>")
        return file_digest(self._path)

    def caption(self, sample: Sample, class_name: str, prefix: str) -> str:
        """Return the text of an image, or of one of its classes; see `Captioner.caption`.

        Raises:
            MissingError, ArtefactError: no such file, or another content.
            DataError: it has no text for the image or the class.
        """
        entry = self._captions.get(sample.id)
        text = entry.get(class_name) if isinstance(entry, Mapping) else entry
        if not isinstance(text, str):
            raise DataError(
                f"caption: got none for {class_name!r}, expected a text in {self._path}; add it, or set "
                f"{self._key}.name=none"
            )
        if text.casefold().startswith(prefix.casefold()):
            return text[len(prefix) :].rstrip()
        return f" {text.strip()}" if text.strip() else ""

    @cached_property
    def _captions(self) -> Mapping[str, Any]:
        if not self._path.is_file():
            raise MissingError(f"{self._key}.path: got '{self._path}', no such file; set {self._key}.path=<JSON file>")
        try:
            captions = json.loads(self._path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ArtefactError(f"{self._path}: not JSON ({first_line(error)}); write it again") from error
        if not isinstance(captions, Mapping):
            raise ArtefactError(
                f"{self._path}: got {type(captions).__name__}, expected an object from ids of images to captions; "
                "write it again"
            )
        return captions


class BlipCaptioner(Captioner):
    """Continues a prompt with BLIP (Li et al., 2022), greedily.

    Args:
        options: which model.
        device: where it runs.
        key: the configuration key of the options, for messages.
    """

    def __init__(self, options: CaptionerOptions, device: Device, key: str) -> None:
        super().__init__(key)
        self._options, self._device = options, device.with_precision(options.precision)
        companions = ("tokenizer.json", "vocab.txt")
        self._pretrained = Pretrained(options.weights, options.revision, f"{key}.weights", "captioner", companions)

    @property
    def digest(self) -> str:
        """The sha256 over the model's files.

        Raises:
            MissingError, ArtefactError, StorageError: the weights are not there.
        """
        return self._pretrained.digest

    @torch.inference_mode()
    def caption(self, sample: Sample, class_name: str, prefix: str) -> str:
        """Return how BLIP continues the prompt; see `Captioner.caption`.

        Raises:
            MissingError, ArtefactError: the weights are not there, or damaged.
        """
        device, processor = self._device, self._processor
        inputs = processor(images=sample.image, text=prefix, return_tensors="pt").to(device.torch_device)
        with device.autocast():
            output = self._model.generate(
                pixel_values=inputs["pixel_values"],
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_length=self._options.max_tokens,
                do_sample=False,
                num_beams=1,
            )
        # BLIP replaces the first token of the prompt and drops the last one, the separator.
        added = output[0, inputs["input_ids"].shape[1] - 1 :]
        text = processor.decode(added, skip_special_tokens=True).strip()
        return f" {text}" if text else ""

    @cached_property
    def _model(self) -> BlipForConditionalGeneration:
        from transformers import BlipForConditionalGeneration

        model = self._pretrained.load(BlipForConditionalGeneration, unused=r"position_ids$")
        return model.to(self._device.torch_device)

    @cached_property
    def _processor(self) -> BlipProcessor:
        from transformers import BlipProcessor

        folder = self._pretrained.folder
        try:
            return BlipProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ArtefactError(
                f"{folder}: no image processor and tokenizer of BLIP ({first_line(error)}); fetch the files again, or "
                f"check {self._key}.weights"
            ) from error


def build_captioner(options: CaptionerOptions, device: Device, key: str) -> Captioner:
    """Return the captioner that the options name; no model is loaded and no file is read."""
    if options.name == "blip":
        return BlipCaptioner(options, device, key)
    if options.name == "file":
        return FileCaptioner(options.path or "", key)
    return Captioner(key)
