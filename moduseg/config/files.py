"""Where the YAML files are, and how they become a checked `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from moduseg.config.construct import construct
from moduseg.config.overrides import (
    Override,
    check_choice,
    describe_unknown,
    read_override,
    set_own_part,
    set_value,
)
from moduseg.config.own_parts import is_own_part
from moduseg.config.schemas import (
    BankConfig,
    Config,
    EvaluationConfig,
    PseudoMasksConfig,
    RetrievalConfig,
    RuntimeConfig,
    StudentConfig,
)
from moduseg.errors import ConfigError, MissingError

UNREADABLE = (YAMLError, ValueError, TypeError, AttributeError, AssertionError, RecursionError)
"""Errors beside their own that Hydra and OmegaConf raise for a damaged YAML file."""


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, or at the top of a clone.

    Raises:
        MissingError: neither folder exists.
    """
    package = Path(__file__).parent.parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise MissingError(f"{package / 'configs'}: no config.yaml; install moduseg again, or run inside a clone")


def compose(overrides: Sequence[str] = (), config_name: str = "config") -> Config:
    """Return the configuration that a command line gives.

    Args:
        overrides: arguments of the command line: `retrieval.top_k=9`, `proposer=sam`, `experiment=coco150`.
        config_name: the file at the top of the folder.

    Raises:
        ConfigError: an unknown key, group or file, a wrong type, a value out of range.
    """
    return from_hydra(compose_hydra(overrides, config_name))


def compose_hydra(overrides: Sequence[str], config_name: str = "config") -> DictConfig:
    """Return what a command line gives as Hydra composes it: the files first, then the values in their order.

    Args:
        overrides, config_name: see `compose`.

    Raises:
        ConfigError: an unknown key, group or file.
    """
    folder = config_dir()
    parsed = [read_override(argument) for argument in overrides]
    chosen = [override for override in parsed if override.is_choice(folder) and override.text != "null"]
    for override in chosen:
        check_choice(override, folder)
    choices = [override for override in chosen if not is_own_part(override.text)]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            cfg = hydra_compose(config_name, overrides=[override.argument for override in choices])
    except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        raise ConfigError(_one_line(error)) from error
    for override in chosen:
        if is_own_part(override.text):
            set_own_part(cfg, override)
    for override in parsed:
        if not override.is_choice(folder):
            set_value(cfg, override)
    _check_root(cfg, parsed)
    return cfg


def _check_root(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuse a folder of one's own for the embedded world, which would be drawn into it."""
    root = next((override.text for override in overrides if override.key == "dataset.root"), None)
    is_world = root is None or Path(root).name.startswith("world")
    if not is_world and OmegaConf.select(cfg, "dataset.name") == "miniature":
        raise ConfigError(
            f"dataset.root: got {root!r} with dataset=miniature, which draws its own images; for images of your own "
            f"set dataset=folder, or experiment=folder"
        )


def from_hydra(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """Return what Hydra composed as a checked configuration.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    if not isinstance(plain, dict):
        raise ConfigError(f"configuration: got {type(plain).__name__}, expected groups; start from configs/config.yaml")
    plain.pop("hydra", None)
    group_names = [f.name for f in dataclasses.fields(Config)]
    for key in plain:
        if key not in group_names:
            raise ConfigError(describe_unknown(str(key), group_names))
    schemas = {
        "pseudo_masks": PseudoMasksConfig,
        "bank": BankConfig,
        "retrieval": RetrievalConfig,
        "evaluation": EvaluationConfig,
        "runtime": RuntimeConfig,
    }
    predictions = plain.get("predictions")
    if not isinstance(predictions, str | None):
        raise ConfigError(f"predictions: got {predictions!r}, expected a folder; set predictions=<folder>")
    values: dict[str, Any] = {"predictions": predictions, "vocabulary": _read_vocabulary(plain.get("vocabulary"))}
    num_clusters = plain.get("num_clusters")
    if isinstance(num_clusters, bool) or not isinstance(num_clusters, int | None):
        raise ConfigError(f"num_clusters: got {num_clusters!r}, expected a whole number; try num_clusters=20")
    values["num_clusters"] = num_clusters
    optional = {"train_proposer": "proposer@train_proposer", "tagger": "tagger", "discoverer": "discoverer"}
    for name, choice in optional.items():
        values[name] = plain.get(name)
        if not isinstance(values[name], Mapping | None):
            raise ConfigError(
                f"{name}: got {values[name]!r}, expected a group of settings; pick a file with {choice}=<file>"
            )
    student = plain.get("student")
    if not isinstance(student, Mapping | None):
        raise ConfigError(f"student: got {student!r}, expected a group of settings; pick a file with student=<file>")
    values["student"] = None if student is None else construct(StudentConfig, student, "student")
    for name in group_names:
        value = plain.get(name)
        if name in values:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: got {value!r}, expected a group of settings; pick a file with {name}=<file>")
        values[name] = construct(schemas[name], value, name) if name in schemas else value
    return Config(**values)


def _read_vocabulary(value: object) -> str | tuple[str, ...]:
    """Return a vocabulary as it was typed: text, or a list of words, which may look like numbers.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, list | tuple):
        return tuple(map(str, value))
    if not isinstance(value, str | None):
        raise ConfigError(
            f"vocabulary: got {value!r}, expected a file or a list of words; try vocabulary='a dog;grass'"
        )
    return value or ()


def _one_line(error: Exception) -> str:
    """Return Hydra's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
