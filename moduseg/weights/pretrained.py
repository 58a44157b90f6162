"""Models of `transformers` in a directory or a repository of the hub, loaded so that every tensor is accounted for."""

from __future__ import annotations

import json
import pickle
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moduseg.errors import ArtefactError
from moduseg.weights.hub import first_line, model_digest, model_folder


class Pretrained:
    """A model by name, whose class is chosen when its `config.json` is known; nothing is read before it is asked for.

    Args:
        weights: a directory as `save_pretrained` writes it, or a hub id; see `moduseg.weights.hub.model_folder`.
        revision: branch, tag or commit of a hub id.
        key: the configuration key of `weights`, for messages.
        what: of which kind the model is, for messages.

    Raises:
        ValueError: an empty `weights`.
    """

    def __init__(self, weights: str, revision: str | None, key: str, what: str) -> None:
        if not weights:
            raise ValueError("weights: got an empty text, expected a directory or a hub id; leave it at the preset's")
        self.weights, self.revision, self.key, self.what = weights, revision, key, what

    @cached_property
    def folder(self) -> Path:
        """The directory, fetched from the hub where need be.

        Raises:
            MissingError, ArtefactError, StorageError: see `moduseg.weights.hub.model_folder`.
        """
        return model_folder(self.weights, self.key, self.revision, self.what)

    @property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weight files.

        Raises:
            MissingError, ArtefactError, StorageError: see `folder`.
        """
        return model_digest(self.folder)

    @cached_property
    def model_type(self) -> str:
        """The architecture that `config.json` names; empty where it names none."""
        return str(self._json("config.json").get("model_type", ""))

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """The image processor's settings; empty where no file has them."""
        if (self.folder / "preprocessor_config.json").is_file():
            return self._json("preprocessor_config.json")
        if (self.folder / "processor_config.json").is_file():
            nested = self._json("processor_config.json").get("image_processor", {})
            return nested if isinstance(nested, dict) else {}
        return {}

    def load(self, cls: Any, unused: str = "(?!)") -> Any:
        """A model of the class `cls`, in float32 and evaluation mode, on the CPU.

        Args:
            cls: a model class of `transformers`.
            unused: regular expression of tensors that may be missing or left over, as nothing reads them here.

        Raises:
            MissingError: see `folder`.
            ArtefactError: damaged files, another model's, or tensors missing or left over.
        """
        from transformers.utils import logging

        # Its bar would break into the one over the images.
        shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        # Its report of wrong tensors is a table; the error below is a line.
        logging.set_verbosity_error()
        try:
            model, report = cls.from_pretrained(str(self.folder), local_files_only=True, output_loading_info=True)
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            SafetensorError,
            pickle.UnpicklingError,
        ) as error:
            raise ArtefactError(
                f"{self.folder}: not readable as a {self.what} ({first_line(error)}); fetch the files again, or check "
                f"{self.key}"
            ) from error
        finally:
            logging.set_verbosity(level)
            if shown:
                logging.enable_progress_bar()
        wrong = {
            what: sorted(name for name in map(_name, report.get(what, ())) if not re.search(unused, name))
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if any(wrong.values()):
            counts = ", ".join(f"{len(names)} {what.removesuffix('_keys')}" for what, names in wrong.items())
            first = next(names[0] for names in wrong.values() if names)
            raise ArtefactError(
                f"{self.folder}: not the weights of its config.json ({counts} tensors, first {first}); check {self.key}"
            )
        return model.float().eval().requires_grad_(False)

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtefactError(f"{file}: not JSON ({first_line(error)}); fetch the file again") from error
        if not isinstance(value, dict):
            raise ArtefactError(f"{file}: got {type(value).__name__}, expected an object; fetch the file again")
        return value


def _name(key: object) -> str:
    """The tensor of an entry of the report, which for shapes that differ is a tuple."""
    return str(key[0] if isinstance(key, tuple) else key)
