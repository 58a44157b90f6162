"""Models of `transformers` by a directory or a hub id, loaded so that every tensor is accounted for."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moduseg.errors import ArtefactError, MissingError
from moduseg.runtime.weights import file_digest, find_weights

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ("*config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
WEIGHT_FILES = ("model*.safetensors*", "pytorch_model*")


class Pretrained:
    """A directory as `save_pretrained` writes it, local or of the hub; nothing is read before it is asked for.

    Args:
        weights: the directory (`~` and `$VARIABLE` are expanded when it is first needed), or a hub id such as
            `facebook/sam-vit-huge` (an existing directory of that name wins).
        revision: branch, tag or commit of a hub id.
        key: the configuration key of `weights`, for messages.
        kind: what the directory should hold, for messages (`"a SAM"`).

    Raises:
        ValueError: an empty `weights`.
    """

    def __init__(self, weights: str, revision: str | None, key: str, kind: str) -> None:
        if not weights:
            raise ValueError("weights: got an empty text, expected a directory or a hub id; leave it at the preset's")
        self.weights, self.revision, self.key, self.kind = weights, revision, key, kind

    @cached_property
    def folder(self) -> Path:
        """The directory, fetched from the hub where need be.

        Raises:
            MissingError: it is not there, cannot be fetched, or holds no model.
        """
        text = os.path.expandvars(self.weights)
        if unset := re.search(r"\$\{?(\w+)", text):
            raise MissingError(
                f"{self.key}: got {self.weights!r}, but the environment variable {unset[1]} is not set; set it to the "
                f"directory of {self.kind}, or give it: {self.key}=<directory>"
            )
        is_hub_id = HUB_ID.fullmatch(text) and not Path(text).exists()
        folder = self._fetch(text) if is_hub_id else find_weights(text, self.key)
        if not (folder / "config.json").is_file() or not _weight_files(folder):
            raise MissingError(
                f"{self.key}: {folder} holds no config.json with model.safetensors or pytorch_model.bin; "
                f"set {self.key}=<directory of {self.kind} as save_pretrained writes it>"
            )
        return folder

    @property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weight files.

        Raises:
            MissingError: see `folder`.
        """
        total = hashlib.sha256()
        for path in sorted({p for pattern in (*SMALL_FILES, *WEIGHT_FILES) for p in self.folder.glob(pattern)}):
            total.update(f"{path.name}:{file_digest(path)}\n".encode())
        return total.hexdigest()

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
                f"{self.folder}: not readable as {self.kind} ({_first_line(error)}); fetch the files again, or check "
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
            raise ArtefactError(f"{file}: not JSON ({_first_line(error)}); fetch the file again") from error
        if not isinstance(value, dict):
            raise ArtefactError(f"{file}: got {type(value).__name__}, expected an object; fetch the file again")
        return value

    def _fetch(self, hub_id: str) -> Path:
        """The directory of a hub id in the hub's cache, fetched where it is not there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            patterns = [*SMALL_FILES, WEIGHT_FILES[0]]
            folder = Path(snapshot_download(hub_id, revision=self.revision, allow_patterns=patterns))
            if not _weight_files(folder):
                # Older repositories have their weights as a PyTorch file only.
                folder = Path(snapshot_download(hub_id, revision=self.revision, allow_patterns=[WEIGHT_FILES[1]]))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            at = f" at revision {self.revision}" if self.revision else ""
            option = f" --revision {self.revision}" if self.revision else ""
            raise MissingError(
                f"{self.key}: got hub id {hub_id!r}{at}, which is not cached and could not be fetched "
                f"({_first_line(error)}); with a network run `hf download {hub_id}{option}`, or fetch config.json, "
                f"preprocessor_config.json and model.safetensors from https://huggingface.co/{hub_id} into a directory "
                f"and set {self.key}=<that directory>"
            ) from error
        return folder


def _weight_files(folder: Path) -> list[Path]:
    return [p for pattern in WEIGHT_FILES for p in folder.glob(pattern) if p.suffix in (".safetensors", ".bin")]


def _name(key: object) -> str:
    """The tensor of an entry of the report, which for shapes that differ is a tuple."""
    return str(key[0] if isinstance(key, tuple) else key)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
