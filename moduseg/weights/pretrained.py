"""Models of `transformers` in a directory or a repository of the hub, loaded so that every tensor is accounted for."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moduseg.errors import ArtefactError
from moduseg.weights.hub import first_line, model_digest
from moduseg.weights.sources import find_model_folder


@dataclass(frozen=True)
class Pretrained:
    """A model of `transformers` by name; no file is read until a property or method needs it.

    Attributes:
        weights: a directory as `save_pretrained` writes it, `miniature/<name>`, or a hub id; see
            `moduseg.weights.sources.find_model_folder`.
        revision: branch, tag or commit of a hub id.
        key: the configuration key of `weights`, for messages.
        what: kind of model, for messages.
        companions: files (of a tokenizer, say) of which a copy in the hub's cache needs at least one.

    Raises:
        ValueError: an empty `weights`.
    """

    weights: str
    revision: str | None
    key: str
    what: str
    companions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: got an empty text, expected a directory or a hub id; leave it at the preset's")

    @cached_property
    def folder(self) -> Path:
        """The directory, fetched from the hub if need be.

        Raises:
            MissingError, ArtefactError, StorageError: as `moduseg.weights.sources.find_model_folder` does.
        """
        return find_model_folder(
            self.weights, self.key, revision=self.revision, what=self.what, companions=self.companions
        )

    @property
    def digest(self) -> str:
        """The sha256 over configuration, tokenizer and weight files.

        Raises:
            MissingError, ArtefactError, StorageError: as `folder` does.
        """
        return model_digest(self.folder)

    @cached_property
    def model_type(self) -> str:
        """The architecture that `config.json` names; empty if it names none."""
        return str(self._read_json("config.json").get("model_type", ""))

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """The image processor's settings; empty if no file holds them."""
        if (self.folder / "preprocessor_config.json").is_file():
            return self._read_json("preprocessor_config.json")
        if (self.folder / "processor_config.json").is_file():
            nested = self._read_json("processor_config.json").get("image_processor", {})
            return nested if isinstance(nested, dict) else {}
        return {}

    def load_by_type(self, classes: Mapping[str, str], hint: str, *, unused: str = "(?!)") -> Any:
        """Load the model with the class of `transformers` that its `model_type` asks for; see `load`.

        Args:
            classes: from `model_type` to the name of a class.
            hint: another remedy for a `model_type` that is not among them.
            unused: as `load` takes it.

        Raises:
            ArtefactError: another architecture, an installed version of transformers without the class, or as `load`.
        """
        import transformers

        name = classes.get(self.model_type)
        if name is None:
            raise ArtefactError(
                f"{self.folder}: config.json names model_type {self.model_type!r}, expected one of "
                f"{', '.join(classes)}; check {self.key}, or {hint}"
            )
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ArtefactError(
                f"{self.key}: transformers {transformers.__version__} has no {name}, which {self.weights} needs; "
                "upgrade it: pip install -U transformers"
            )
        return self.load(model_class, unused=unused)

    def load(self, model_class: Any, *, unused: str = "(?!)", adjust_config: Callable[[Any], Any] | None = None) -> Any:
        """Load a model in float32 and evaluation mode, on the CPU.

        Args:
            model_class: a model class of `transformers`.
            unused: regular expression of tensors that may be missing or left over, because this package reads none.
            adjust_config: changes the configuration before the model is built from it.

        Raises:
            MissingError: as `folder` does.
            ArtefactError: damaged files, another model's, or tensors missing or left over.
        """
        folder = str(self.folder)
        try:
            with _quiet_transformers():
                # transformers reads the configuration itself if none is given.
                config = {}
                if adjust_config is not None:
                    loaded = model_class.config_class.from_pretrained(folder, local_files_only=True)
                    config = {"config": adjust_config(loaded)}
                model, report = model_class.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, **config
                )
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
                f"{folder}: not readable as a {self.what} ({first_line(error)}); fetch the files again, or check "
                f"{self.key}"
            ) from error
        wrong = {
            problem: sorted(
                name for name in map(_get_tensor_name, report.get(problem, ())) if not re.search(unused, name)
            )
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if any(wrong.values()):
            counts = ", ".join(f"{len(names)} {problem.removesuffix('_keys')}" for problem, names in wrong.items())
            first = next(names[0] for names in wrong.values() if names)
            raise ArtefactError(
                f"{folder}: not the weights of its config.json ({counts} tensors, first {first}); check {self.key}"
            )
        return model.float().eval().requires_grad_(False)

    def _read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object from a file of the directory."""
        file = self.folder / name
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtefactError(f"{file}: not JSON ({first_line(error)}); fetch the file again") from error
        if not isinstance(value, dict):
            raise ArtefactError(f"{file}: got {type(value).__name__}, expected an object; fetch the file again")
        return value


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers while a model is loaded."""
    from transformers.utils import logging

    # Its progress bar would interrupt ours, and its table of wrong tensors repeats what our one-line error says.
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _get_tensor_name(key: object) -> str:
    """Return the tensor that an entry of the report is about; an entry about shapes that differ is a tuple."""
    return str(key[0] if isinstance(key, tuple) else key)
