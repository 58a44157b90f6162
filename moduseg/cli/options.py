"""The `key=value` arguments of a command: a dataclass says which keys there are, and their types."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moduseg.config import Config
from moduseg.config.construct import construct
from moduseg.config.stored import parse_yaml
from moduseg.errors import ConfigError, suggest

Options = TypeVar("Options")
Overrides = Literal["none", "groups", "all"]
"""Which other arguments a command accepts: none; `group.key=value` of the configuration; all, for Hydra to read."""
GROUPS = tuple(field.name for field in dataclasses.fields(Config) if field.name not in ("predictions", "vocabulary"))
"""Groups of the configuration that an override may name."""
_PATH_KEYS = ("images", "banks")
"""Keys of several files or folders."""


def parse(
    arguments: Sequence[str],
    cls: type[Options],
    command: str,
    *,
    words: Sequence[str] = (),
    repeated: Sequence[str] = (),
    accepts: Overrides = "groups",
) -> tuple[Options, list[str]]:
    """Return the options of a command, and the overrides of the configuration among its arguments.

    A field `class_` is the key `class`. A tuple takes `a;b` or `[a,b]`, text is taken as it is, other types are read as
    YAML. A file or folder whose name holds `;` or `[` is found under that name. The name of a true-or-false key alone
    means `true`.

    Args:
        arguments: as they are typed, without the command.
        cls: a dataclass of plain types; fields without default have to be given.
        command: for messages.
        words: keys that arguments without `=` fill, in this order; one that is repeated takes all that are left.
        repeated: tuple keys that are given once for each value, which is taken as it is.
        accepts: which other arguments are overrides.

    Raises:
        ConfigError: an argument that is no `key=value`, an unknown, repeated or missing key, or a wrong type.
    """
    fields, hints = _fields_by_key(cls), get_type_hints(cls)
    texts: dict[str, list[str]] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals and hints.get(fields.get(key, "")) is bool:
            text = "true"
        elif not equals:
            key, text = next((word for word in words if word in repeated or word not in texts), ""), argument
        if key in fields:
            texts.setdefault(key, []).append(text)
        elif accepts == "all" or (equals and accepts == "groups" and key.split(".")[0] in GROUPS):
            overrides.append(argument)
        else:
            raise ConfigError(_unknown_argument(argument, list(fields), command, accepts))
    values: dict[str, Any] = {}
    for key, name in fields.items():
        if key in texts and key in repeated:
            values[name] = texts[key]
        elif len(texts.get(key, [])) > 1:
            raise ConfigError(f"{key}: given twice to {command}, expected once; separate several values by ';'")
        elif key in texts:
            values[name] = _to_value(key, texts[key][0], hints[name])
        elif is_required(cls, name):
            raise ConfigError(f"{key}: missing; set {key}=<value> for {command}")
    try:
        return construct(cls, values, command), overrides
    except ConfigError as error:
        # The keys of a command stand alone: `out` in place of `predict.out`.
        raise ConfigError(str(error).removeprefix(f"{command}.").removeprefix(f"{command}: ")) from error


def describe_keys(cls: type) -> list[tuple[str, str]]:
    """Return a row for each key of a command: the key with type and default, and what the docstring says of it."""
    hints, meanings = get_type_hints(cls), read_attributes(cls)
    rows = []
    for key, name in _fields_by_key(cls).items():
        default = "" if is_required(cls, name) else f" [{to_text(getattr(cls, name))}]"
        rows.append((f"{key}=<{describe_type(hints[name])}>{default}", meanings.get(name, "")))
    return rows


def read_attributes(cls: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each attribute, on one line, with `null` for Python's `None`."""
    entries = re.findall(r"^ +(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    return {
        name: " ".join(text.split()).replace("`None`", "`null`")
        for names, text in entries
        for name in names.split(", ")
    }


def describe_type(hint: Any) -> str:
    """Return a type in a few words."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{describe_type(get_args(hint)[0])};..."
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(describe_type(choice) for choice in get_args(hint))
    words = {str: "text", int: "whole number", float: "number", bool: "true|false", type(None): "null"}
    return words.get(hint, "settings")


def to_text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)


def list_keys(cls: type) -> list[str]:
    """Return the keys of a command in their order."""
    return list(_fields_by_key(cls))


def _fields_by_key(cls: Any) -> dict[str, str]:
    """Return key -> field of an options class; the key of a field `class_` is `class`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name.rstrip("_") if keyword.iskeyword(name[:-1]) else name: name for name in names}


def is_required(cls: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown_argument(argument: str, keys: Sequence[str], command: str, accepts: Overrides) -> str:
    """Return the message for an argument that is neither a key nor an override."""
    key, equals, _ = argument.partition("=")
    if not equals:
        return f"{command}: got {argument!r}, expected key=value; keys are {', '.join(keys)}"
    groups = "or a group of the configuration, as retrieval.top_k=3" if accepts == "groups" else "remove it"
    close = suggest(key, keys)
    hint = f"did you mean {close}?" if close else groups
    return f"{key}: unknown key of {command}, expected one of {', '.join(keys)}; {hint}"


def _to_value(key: str, text: str, hint: Any) -> Any:
    """Return what a text says, read as a field's type wants it; `construct` checks the type."""
    choices = str(hint)
    if "tuple" in choices:
        # A file or folder that has this very name is meant, whatever characters are in it.
        if key in _PATH_KEYS and Path(text).exists():
            return [text]
        parts = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else text.split(";")
        return [part.strip() for part in parts if part.strip()]
    return parse_yaml(text) if any(name in choices for name in ("int", "float", "bool")) else text
