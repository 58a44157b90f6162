"""The `key=value` arguments of a command: a dataclass says which keys there are, and their types."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_type_hints

from moduseg.config import Config
from moduseg.config.construct import construct
from moduseg.config.stored import parse_yaml
from moduseg.errors import ConfigError, suggest

Options = TypeVar("Options")
Overrides = Literal["none", "groups", "all"]
"""Which other arguments a command accepts: none; `group.key=value` of the configuration; all, for Hydra to read."""
GROUPS = tuple(field.name for field in dataclasses.fields(Config) if field.name != "predictions")
"""Groups of the configuration that an override may name."""


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
    YAML. The name of a true-or-false key alone means `true`.

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
            values[name] = _to_value(texts[key][0], hints[name])
        elif _is_required(cls, name):
            raise ConfigError(f"{key}: missing; set {key}=<value> for {command}")
    try:
        return construct(cls, values, command), overrides
    except ConfigError as error:
        # The keys of a command stand alone: `out` in place of `predict.out`.
        raise ConfigError(str(error).removeprefix(f"{command}.").removeprefix(f"{command}: ")) from error


def describe_keys(cls: type) -> str:
    """Return one line for each key of a command: its name, its default, and what the class's docstring says of it."""
    documentation = inspect.getdoc(cls) or ""
    lines = []
    for key, name in _fields_by_key(cls).items():
        default = "" if _is_required(cls, name) else f" [{getattr(cls, name)}]"
        entry = re.search(rf"^ +{name}: (.*(?:\n {{8}}.*)*)", documentation, re.MULTILINE)
        meaning = " ".join(entry.group(1).split()) if entry else ""
        lines.append(f"  {key}=<value>{default}  {meaning}".rstrip())
    return "\n".join(lines)


def _fields_by_key(cls: Any) -> dict[str, str]:
    """Return key -> field of an options class; the key of a field `class_` is `class`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name.rstrip("_") if keyword.iskeyword(name[:-1]) else name: name for name in names}


def _is_required(cls: Any, name: str) -> bool:
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


def _to_value(text: str, hint: Any) -> Any:
    """Return what a text says, read as a field's type wants it; `construct` checks the type."""
    choices = str(hint)
    if "tuple" in choices:
        parts = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else text.split(";")
        return [part.strip() for part in parts if part.strip()]
    return parse_yaml(text) if any(name in choices for name in ("int", "float", "bool")) else text
