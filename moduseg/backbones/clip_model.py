"""Where a CLIP comes from, and how it is loaded: a local directory, the hub, or a configuration and a seed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moduseg.allocator import pause_collection
from moduseg.devices import Device, Precision, seed_weights
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.weights.hub import first_line, model_digest
from moduseg.weights.pretrained import Pretrained
from moduseg.weights.sources import find_weights

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

log = logging.getLogger("moduseg")
Activation = Literal["quick_gelu", "gelu"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's normalisation of inputs in [0, 1], for directories without a preprocessor file."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
QUICK_GELU_WEIGHTS = re.compile(r"openai/clip-|facebook/metaclip-(?!2-)")
"""How hub ids of weights begin that were trained with quick GELU, whatever a conversion's `config.json` says."""
_TEXTS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class ClipModelOptions:
    """Which CLIP is loaded.

    Attributes:
        weights: a directory as `save_pretrained` writes it (`~` and `$VARIABLE` are expanded when it is first needed),
            `miniature/clip` for the one that the package carries, a hub id such as `openai/clip-vit-base-patch16`
            (an existing directory of that name wins), or `random`.
        revision: branch, tag or commit of a hub id.
        config: `CLIPConfig`'s arguments (`{vision_config: {...}, text_config: {...}}`), for `random` only.
        tokenizer: directory of a tokenizer; that of the weights if omitted.
        seed: of `random` weights.
        activation: of both encoders' MLPs, as they were trained: `quick_gelu` (OpenAI, MetaCLIP) or `gelu` (OpenCLIP's
            own). It goes before `config.json`, with a warning if they differ: conversions of MetaCLIP have been
            published with the wrong one. What `config.json` says if omitted.
        precision: of the forward passes on a CUDA device; the run's if omitted.

    Raises:
        ValueError: values that do not go together.
    """

    weights: str = "miniature/clip"
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    seed: int = 0
    activation: Activation | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: got an empty text, expected a directory, a hub id or random; try miniature/clip")
        if self.activation == "gelu" and QUICK_GELU_WEIGHTS.match(self.weights):
            raise ValueError(f"activation: got gelu, expected quick_gelu, with which {self.weights} was trained")
        if self.config is not None and self.weights != "random":
            raise ValueError(f"config: got one beside weights={self.weights}, expected it with weights=random only")


@dataclass(frozen=True)
class ClipSizes:
    """The sizes of a CLIP's image encoder.

    Attributes:
        width: channels of a patch between the blocks.
        joint_width: channels of the space of the texts.
        depth: number of blocks.
    """

    width: int
    joint_width: int
    depth: int


class ClipSource:
    """A CLIP with its tokenizer and normalisation; each is read on first use.

    Args:
        options: which CLIP.
        device: where the model runs; its precision holds unless the options name one.
        key: the configuration key of `weights`, for messages.
    """

    def __init__(self, options: ClipModelOptions, device: Device, key: str = "backbone.weights") -> None:
        self.options, self.key = options, key
        self.device = device.with_precision(options.precision)

    @property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weight files; of `random`, the seed and the named tokenizer.

        Raises:
            MissingError: there is no such directory, or the hub cannot be reached.
        """
        folders = [] if self._is_random else [self._pretrained.folder]
        if self.options.tokenizer is not None:
            folders.append(find_weights(self.options.tokenizer, self._tokenizer_key))
        if self._is_random:
            return f"random-{self.options.seed}" + (f"-{model_digest(*folders)}" if folders else "")
        return model_digest(*folders)

    @cached_property
    def model(self) -> CLIPModel:
        """The model on its device, in float32 and evaluation mode.

        Raises:
            MissingError: no weights there.
            ArtefactError: damaged files, another model's, or tensors missing or left over.
            ConfigError: a `config` that makes no CLIP, or a `config.json` with another activation than its weights were
                trained with, if `activation` is omitted.
        """
        with pause_collection():
            from transformers import CLIPModel

        if self._is_random:
            model = self._make_random().float().eval().requires_grad_(False)
        else:
            # Older files hold buffers of position numbers, which the model makes again.
            model = self._pretrained.load(CLIPModel, unused=r"position_ids$", adjust_config=self._override_activation)
        return model.to(self.device.torch_device)

    @cached_property
    def sizes(self) -> ClipSizes:
        """The sizes that `config.json` says; no weights are read.

        Raises:
            MissingError: no weights there.
            ArtefactError: a damaged `config.json`.
            ConfigError: a `config` that makes no CLIP.
        """
        from transformers import CLIPConfig

        if self._is_random:
            config = self.model.config
        else:
            folder = self._pretrained.folder
            try:
                config = CLIPConfig.from_pretrained(str(folder), local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise ArtefactError(
                    f"{folder}/config.json: not readable ({first_line(error)}); fetch the file again"
                ) from error
        vision = config.vision_config
        return ClipSizes(int(vision.hidden_size), int(config.projection_dim), int(vision.num_hidden_layers))

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of inputs in [0, 1], `[3, 1, 1]` each, as the preprocessor file says."""
        values: dict[str, Any] = {}
        if not self._is_random and (file := self._pretrained.folder / "preprocessor_config.json").is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ArtefactError(f"{file}: not JSON ({error}); fetch the file again") from error
        device = self.device.torch_device
        mean = torch.tensor(values.get("image_mean", CLIP_MEAN), dtype=torch.float32, device=device)
        std = torch.tensor(values.get("image_std", CLIP_STD), dtype=torch.float32, device=device)
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer.

        Raises:
            MissingError: there is none beside the weights, and none was named.
        """
        from transformers import CLIPTokenizer

        if self.options.tokenizer is not None:
            folder = find_weights(self.options.tokenizer, self._tokenizer_key)
        elif self._is_random:
            raise MissingError(
                f"{self.key}: random weights have no tokenizer; name one: {self._tokenizer_key}=miniature/clip"
            )
        else:
            folder = self._pretrained.folder
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise MissingError(
                f"{folder}: no {' or '.join(TOKENIZER_FILES)}, which texts need; fetch it where the weights are from"
            )
        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder}: not a CLIP tokenizer ({first_line(error)}); fetch it again") from error

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return L2-normalised features of texts, `[N, D]` float32 on the device; longer texts are cut off.

        Raises:
            ArtefactError: the tokenizer has more tokens than the model.
        """
        # Cloned outside inference mode: an ordinary tensor.
        return self._text_features(prompts).clone()

    @torch.inference_mode()
    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        model, tokenizer = self.model, self.tokenizer
        settings = model.config.text_config
        if len(tokenizer) > settings.vocab_size:
            raise ArtefactError(
                f"{self.key}: the tokenizer has {len(tokenizer)} tokens, the model {settings.vocab_size}; "
                "take both from one place"
            )
        features = [torch.zeros(0, model.config.projection_dim, device=self.device.torch_device)]
        for start in range(0, len(prompts), _TEXTS_AT_ONCE):
            batch = tokenizer(
                list(prompts[start : start + _TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=settings.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device.torch_device)
            with self.device.autocast():
                output = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            # transformers 4 returns the features, transformers 5 an object that holds them.
            pooled = output if isinstance(output, Tensor) else output.pooler_output
            features.append(torch.nn.functional.normalize(pooled.float(), dim=-1))
        return torch.cat(features)

    @property
    def _tokenizer_key(self) -> str:
        return self.key.rsplit(".", 1)[0] + ".tokenizer"

    @property
    def _is_random(self) -> bool:
        return self.options.weights == "random"

    @cached_property
    def _pretrained(self) -> Pretrained:
        companions = TOKENIZER_FILES if self.options.tokenizer is None else ()
        return Pretrained(self.options.weights, self.options.revision, self.key, "CLIP", companions)

    def _make_random(self) -> CLIPModel:
        """Return a model of random weights."""
        from huggingface_hub import errors
        from transformers import CLIPConfig, CLIPModel

        # What transformers 5 raises for a value that its configuration refuses is no ValueError.
        refused = getattr(errors, "StrictDataclassError", ValueError)
        with seed_weights(self.options.seed):
            try:
                return CLIPModel(self._override_activation(CLIPConfig(**(self.options.config or {}))))
            except (refused, TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
                key = self.key.rsplit(".", 1)[0] + ".config"
                raise ConfigError(f"{key}: makes no CLIP ({_last_line(error)}); see transformers.CLIPConfig") from error

    def _override_activation(self, config: CLIPConfig) -> CLIPConfig:
        """Set the activation of both encoders to the one with which they were trained, if it is given."""
        activation, key = self.options.activation, self.key.rsplit(".", 1)[0] + ".activation"
        for part in (config.text_config, config.vision_config):
            if (
                activation is None
                and part.hidden_act != "quick_gelu"
                and QUICK_GELU_WEIGHTS.match(self.options.weights)
            ):
                raise ConfigError(
                    f"{self.key}: the {part.model_type} of {self.options.weights} has {part.hidden_act} in its "
                    f"config.json, expected quick_gelu, with which it was trained; set {key}=quick_gelu"
                )
            if activation is not None and part.hidden_act != activation:
                log.warning(
                    "%s: the %s has %s in its configuration and runs with %s, as %s says",
                    *(self.key, part.model_type, part.hidden_act, activation, key),
                )
                part.hidden_act = activation
        return config


def _last_line(error: BaseException) -> str:
    """Return the last line of an error: where a library wraps another error, the reason stands last."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
