"""Objects from a configuration mapping, with errors that a reader of the YAML understands.

The signature of a class is its schema: `__init__` gives names, types and defaults, and checks values. A backend with
many settings takes one dataclass, its first argument `options`, whose fields are the flat keys of the YAML; the
dataclass checks values in `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moduseg.config.own_parts import find_own_part, is_own_part
from moduseg.errors import ConfigError, suggest

T = TypeVar("T")


def build_named(group: str, registry: Mapping[str, type[T]], cfg: Mapping[str, Any], **context: Any) -> T:
    """Build the backend that `cfg["name"]` names, with the other keys of `cfg` as arguments.

    Args:
        group: the configuration group, for messages (`"proposer"`).
        registry: from name to class; `module:Class` names one of one's own beside them.
        cfg: the group's configuration.
        context: values that the program supplies (device, precision, a backbone); a backend gets those that its
            `__init__` names.

    Raises:
        ConfigError: unknown name or key, missing key, wrong type, or a value out of range.
    """
    arguments = dict(cfg)
    name = arguments.pop("name", None)
    if name not in registry and not is_own_part(name):
        raise ConfigError(
            f"{group}.name: got {name!r}, expected one of {', '.join(sorted(registry))}, or module:Class for one of "
            f"your own; pick a shipped file with {group}=<file> or set {group}.name"
        )
    backend = registry[name] if name in registry else find_own_part(f"{group}.name", str(name), registry)
    options_class = _find_options_class(backend)
    if options_class is None:
        return construct(backend, arguments, group, **context)
    options: Any = construct(options_class, arguments, group)
    accepted = inspect.signature(backend.__init__).parameters
    try:
        return backend(options, **{k: v for k, v in context.items() if k in accepted})  # type: ignore[call-arg]
    except ValueError as error:
        raise ConfigError(f"{group}: {error}") from error


def takes_key(backend: type, key: str) -> bool:
    """Return whether a backend's configuration has a key."""
    options_class = _find_options_class(backend)
    if options_class is not None:
        return key in {field.name for field in dataclasses.fields(options_class)}
    return key in inspect.signature(backend.__init__).parameters  # type: ignore[misc]


def _find_options_class(backend: type) -> type | None:
    """Return the dataclass of a backend whose first argument is `options`; `None` if it takes plain arguments."""
    names = list(inspect.signature(backend.__init__).parameters)  # type: ignore[misc]
    if names[1:2] != ["options"]:
        return None
    hint = get_type_hints(backend.__init__)["options"]  # type: ignore[misc]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def construct(cls: type[T], arguments: Mapping[str, Any], where: str, **context: Any) -> T:
    """Make a `cls` from a mapping of its arguments, checked against its signature.

    Args:
        cls: a class whose `__init__` has type hints, or a dataclass.
        arguments: values as YAML has them: a whole number passes for a fraction, a list for a tuple, a mapping for a
            dataclass.
        where: the configuration key of `arguments`, for messages.
        context: further arguments, which are taken unchecked if `__init__` names them.

    Raises:
        ConfigError: unknown key, missing key, wrong type, or a value out of range.
    """
    hints = get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    parameters = {
        name: p
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    allowed = [name for name in parameters if name not in context]
    values: dict[str, Any] = {name: value for name, value in context.items() if name in parameters}
    for key, value in arguments.items():
        if key not in allowed:
            close = suggest(str(key), allowed)
            hint = f"did you mean {where}.{close}?" if close else "remove it"
            raise ConfigError(f"{where}.{key}: unknown key, expected one of {', '.join(allowed) or 'none'}; {hint}")
        values[key] = _fit(value, hints.get(key, Any), f"{where}.{key}")
    for name, parameter in parameters.items():
        if name not in values and parameter.default is parameter.empty:
            raise ConfigError(f"{where}.{name}: missing; set {where}.{name}=<value>")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _fit(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as type `hint` (int becomes float, a list a tuple, a mapping dataclass) or raise ConfigError."""
    origin, choices = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return construct(hint, value, where)
        if isinstance(value, hint):
            return value
        keys = [f"{where}.{field.name}" for field in dataclasses.fields(hint)]
        raise ConfigError(f"{where}: got {value!r}, expected keys below it: {', '.join(keys)}; set {keys[0]}=<value>")
    if origin in (Union, types.UnionType):
        for choice in choices:
            try:
                return _fit(value, choice, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in choices:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list | tuple):
            if origin is list:
                return [_fit(v, choices[0], f"{where}[{i}]") for i, v in enumerate(value)]
            inner = [choices[0]] * len(value) if len(choices) == 2 and choices[1] is Ellipsis else list(choices)
            if len(inner) == len(value):
                return tuple(_fit(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, inner, strict=True)))
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is type(None):
        if value is None:
            return None
    elif isinstance(hint, type):
        if isinstance(value, hint):
            return value
    else:
        return value
    got = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
    raise ConfigError(f"{where}: got {got} ({type(value).__name__}), expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    """Return a type in the words of a reader of the YAML."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in choices)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in choices)
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and origin is None:
        return {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}.get(
            hint.__name__, hint.__name__
        )
    return str(hint).replace("typing.", "")
