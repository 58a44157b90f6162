"""`key=value` arguments of the commands that are not stages: a dataclass says which keys there are, and their types."""

from __future__ import annotations

import copy
import dataclasses
import keyword
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg.config import Config, compose, from_hydra
from moduseg.config.construct import construct
from moduseg.errors import ConfigError, suggest

Options = TypeVar("Options")
GROUPS = tuple(field.name for field in dataclasses.fields(Config) if field.name != "predictions")
"""Groups of the configuration that an override may name."""


def parse(arguments: Sequence[str], cls: type[Options], command: str) -> tuple[Options, list[str]]:
    """The options of a command, and the overrides of the configuration among its arguments.

    A field `class_` is the key `class`. A tuple takes `a;b` or `[a,b]`, text is taken as it is, other types are read as
    YAML. What names a group of the configuration (`retrieval.top_k=3`, `proposer=superpixels`) is an override.

    Args:
        arguments: `key=value` each.
        cls: a dataclass of plain types; fields without default have to be given.
        command: for messages.

    Raises:
        ConfigError: an argument that is not `key=value`, an unknown, repeated or missing key, or a wrong type.
    """
    hints = get_type_hints(cls)
    fields = {field.name.rstrip("_") if keyword.iskeyword(field.name[:-1]) else field.name: field.name
              for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # fmt: skip
    values: dict[str, Any] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{command}: got {argument!r}, expected key=value; keys are {', '.join(fields)}")
        if key not in fields:
            if key.split(".")[0] in GROUPS:
                overrides.append(argument)
                continue
            close = suggest(key, fields)
            hint = f"did you mean {close}?" if close else "or a group of the configuration, as retrieval.top_k=3"
            raise ConfigError(f"{key}: unknown key of {command}, expected one of {', '.join(fields)}; {hint}")
        if fields[key] in values:
            raise ConfigError(f"{key}: given twice to {command}, expected once; separate several values by ';'")
        values[fields[key]] = _value(text, hints[fields[key]])
    missing = [
        key
        for key, name in fields.items()
        if name not in values and _required(cls, name)
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{missing[0]}: missing; set {missing[0]}=<value> for {command}")
    try:
        return construct(cls, values, command), overrides
    except ConfigError as error:
        # Options are keys of their own here: `top` in place of `predict.top`.
        raise ConfigError(str(error).removeprefix(f"{command}.").removeprefix(f"{command}: ")) from error


def configured(stored: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The configuration a bank was made with, some of it replaced.

    Args:
        stored: `config` of the bank.
        overrides: `group.key=value` for a key that is there, or `group=file` for one of the shipped files.

    Raises:
        ConfigError: an unknown key or file, a wrong type, or a value out of range.
    """
    content = copy.deepcopy(dict(stored))
    for override in sorted(overrides, key=lambda o: "." in o.partition("=")[0]):
        path, _, text = override.partition("=")
        group, *keys = path.split(".")
        if not keys:
            content[group] = compose([override]).as_dict()[group]
            continue
        place: Any = content.get(group)
        for key in keys[:-1]:
            place = place.get(key) if isinstance(place, Mapping) else None
        default = _default_keys(group) if len(keys) == 1 else ()
        if not isinstance(place, dict) or (keys[-1] not in place and keys[-1] not in default):
            known = ", ".join(place) if isinstance(place, Mapping) else "none"
            raise ConfigError(f"{path}: unknown key, expected one of {known}; see configs/{group}")
        place[keys[-1]] = _yaml(text)
    return from_hydra(content)


def _default_keys(group: str) -> tuple[str, ...]:
    """Keys that a group has however old the bank is: those of its dataclass."""
    hint = get_type_hints(Config)[group]
    return tuple(f.name for f in dataclasses.fields(hint)) if dataclasses.is_dataclass(hint) else ()


def _value(text: str, hint: Any) -> Any:
    choices = str(hint)
    if "tuple" in choices:
        inner = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else text.split(";")
        return [part.strip() for part in inner if part.strip()]
    if any(name in choices for name in ("int", "float", "bool")):
        return _yaml(text)
    return text


def _yaml(text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except OmegaConfBaseException:
        return text


def _required(cls: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
