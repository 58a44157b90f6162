"""Where a text-to-image diffusion model comes from: a directory in diffusers' layout, the hub, or a configuration."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from safetensors import SafetensorError

from moduseg.devices import Device, Precision, seed_weights
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.weights.hub import first_line, model_digest
from moduseg.weights.pipelines import find_pipeline_folder, pipeline_digest
from moduseg.weights.pretrained import Pretrained
from moduseg.weights.sources import find_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Latent = Literal["mean", "sample"]
Part = TypeVar("Part")
_PARTS_OF_CONFIG = ("unet", "vae", "text_encoder", "scheduler")


@dataclass(frozen=True, kw_only=True)
class DiffusionModelOptions:
    """Which text-to-image model is loaded, and what it is shown.

    Attributes:
        weights: a directory as `StableDiffusionPipeline.save_pretrained` writes it (`~` and `$VARIABLE` are expanded),
            `miniature/<name>` for one that the package carries, a hub id such as
            `stable-diffusion-v1-5/stable-diffusion-v1-5` (an existing directory of that name wins), or `random`.
        revision: branch, tag or commit of a hub id.
        config: arguments of the parts, for `random` only: `unet` of `UNet2DConditionModel`, `vae` of `AutoencoderKL`,
            `text_encoder` of `CLIPTextConfig`, `scheduler` of `DDIMScheduler`; a part's own defaults if omitted.
        tokenizer: directory of a tokenizer; that of the weights if omitted.
        seed: of `random` weights.
        precision: of the forward passes on a CUDA device; the run's if omitted.
        image_side: images are squashed to a square of so many pixels (Stable Diffusion: 512).
        latent: `mean` of the autoencoder's distribution, or a `sample`, whose noise is drawn from the seeds.

    Raises:
        ValueError: a value out of range, or values that do not go together.
    """

    weights: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    seed: int = 0
    precision: Precision | None = None
    image_side: int = 512
    latent: Latent = "mean"

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(
                "weights: got an empty text, expected a directory, a hub id or random; see docs/siblings.md"
            )
        if self.config is not None and self.weights != "random":
            raise ValueError(f"config: got one beside weights={self.weights}, expected it with weights=random only")
        if unknown := sorted(set(self.config or ()) - set(_PARTS_OF_CONFIG)):
            raise ValueError(f"config: got {unknown[0]!r}, expected some of {', '.join(_PARTS_OF_CONFIG)}")
        if self.image_side < 8:
            raise ValueError(f"image_side: got {self.image_side}, expected 8 or more; Stable Diffusion has 512")
        if self.latent not in get_args(Latent):
            raise ValueError(f"latent: got {self.latent!r}, expected one of {', '.join(get_args(Latent))}")


class DiffusionModel:
    """The parts of a text-to-image model; each is read on first use.

    Args:
        options: which model.
        device: where it runs; its precision holds unless the options name one.
        key: the configuration key of `weights`, for messages.
    """

    def __init__(self, options: DiffusionModelOptions, device: Device, key: str) -> None:
        self.options, self.key = options, key
        self.device = device.with_precision(options.precision)

    @property
    def digest(self) -> str:
        """sha256 over the files of all parts; of `random`, the seed and the named tokenizer.

        Raises:
            MissingError: there is no such directory, or the hub cannot be reached.
        """
        tokenizer = "" if self.options.tokenizer is None else f"-{model_digest(self._tokenizer_folder)}"
        if self._is_random:
            return f"random-{self.options.seed}{tokenizer}"
        return pipeline_digest(self._folder) + tokenizer

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The noise predictor on its device, in float32 and evaluation mode.

        Raises:
            MissingError: diffusers is not installed, or there are no weights.
            ArtefactError: damaged files, another model's, or tensors missing or left over.
            ConfigError: a configuration that makes no such part.
        """
        return self._place(self._load("unet", "UNet2DConditionModel"))

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, as `unet`."""
        return self._place(self._load("vae", "AutoencoderKL"))

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, as `unet`."""
        from transformers import CLIPTextConfig, CLIPTextModel

        if self._is_random:
            config = (self.options.config or {}).get("text_encoder", {})
            return self._place(self._make_random("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**config))))
        part = Pretrained(str(self._folder / "text_encoder"), None, self.key, "text encoder")
        # Older files hold buffers of position numbers, which the model makes again.
        return self._place(part.load(CLIPTextModel, unused=r"position_ids$"))

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """How much noise each time step has; any scheduler's file is read, as the forward process is the same."""
        scheduler: Any = _import_diffusers(self.key, "DDIMScheduler")
        if self._is_random:
            config = (self.options.config or {}).get("scheduler", {})
            return self._make_random("scheduler", lambda: scheduler(**config))
        with _readable(self._folder / "scheduler", "scheduler", self.key):
            return scheduler.from_pretrained(str(self._folder / "scheduler"), local_files_only=True)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer.

        Raises:
            MissingError: there is none.
            ArtefactError: damaged files, or more tokens than the text encoder has.
        """
        from transformers import CLIPTokenizer

        folder = self._tokenizer_folder
        with _readable(folder, "tokenizer", self.key):
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        num_tokens = self.text_encoder.config.vocab_size
        if len(tokenizer) > num_tokens:
            raise ArtefactError(
                f"{self.key}: the tokenizer has {len(tokenizer)} tokens, the text encoder {num_tokens}; take both from "
                "one place"
            )
        return tokenizer

    @property
    def _is_random(self) -> bool:
        return self.options.weights == "random"

    @cached_property
    def _folder(self) -> Path:
        return find_pipeline_folder(self.options.weights, self.key, self.options.revision)

    @property
    def _tokenizer_folder(self) -> Path:
        key = self.key.rsplit(".", 1)[0] + ".tokenizer"
        if self.options.tokenizer is not None:
            return find_weights(self.options.tokenizer, key)
        if self._is_random:
            raise MissingError(f"{self.key}: random weights have no tokenizer; name one: {key}=miniature/clip")
        return self._folder / "tokenizer"

    def _place(self, part: Part) -> Part:
        """Move a part to the device, in float32 and evaluation mode."""
        module: Any = part
        return module.float().eval().requires_grad_(False).to(self.device.torch_device)

    def _load(self, name: str, class_name: str) -> Any:
        """Load a part with a class of diffusers, or make it with random weights."""
        part_class = _import_diffusers(self.key, class_name)
        if self._is_random:
            config = (self.options.config or {}).get(name, {})
            return self._make_random(name, lambda: part_class(**config))
        folder = self._folder / name
        with _readable(folder, class_name, self.key):
            model, report = part_class.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
            )
        wrong = {
            problem: sorted(map(str, report.get(problem) or ())) for problem in ("missing_keys", "unexpected_keys")
        }
        if any(wrong.values()):
            counts = ", ".join(f"{len(keys)} {problem.removesuffix('_keys')}" for problem, keys in wrong.items())
            first = next(keys[0] for keys in wrong.values() if keys)
            raise ArtefactError(
                f"{folder}: not the weights of its config.json ({counts} tensors, first {first}); check {self.key}"
            )
        return model

    def _make_random(self, name: str, make: Any) -> Any:
        """Return what `make` builds from the options' `config`, with weights drawn from the seed."""
        from huggingface_hub import errors

        # What transformers 5 raises for a value that its configuration refuses is no ValueError.
        refused = getattr(errors, "StrictDataclassError", ValueError)
        with seed_weights(self.options.seed):
            try:
                return make()
            except (refused, TypeError, ValueError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
                key = self.key.rsplit(".", 1)[0] + f".config.{name}"
                raise ConfigError(f"{key}: makes no {name} ({first_line(error)}); see docs/siblings.md") from error


def _import_diffusers(key: str, name: str) -> Any:
    """Return a class of diffusers.

    Raises:
        MissingError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingError(
            f"{key}: needs diffusers, which is not installed; pip install 'moduseg[diffusion]', or choose another "
            "generator"
        ) from error
    return getattr(diffusers, name)


@contextmanager
def _readable(folder: Path, what: str, key: str) -> Iterator[None]:
    """Turn what a library raises for files that it cannot read into one line; its own messages are silenced.

    Raises:
        ArtefactError: the files are damaged or another model's.
    """
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [transformers_logging]
    if what != "tokenizer":
        from diffusers.utils import logging as diffusers_logging

        libraries.append(diffusers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ArtefactError(
            f"{folder}: not readable as a {what} ({first_line(error)}); fetch the files again, or check {key}"
        ) from error
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
