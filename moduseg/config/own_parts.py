"""Parts of one's own: classes that a configuration names as `module:Class`, beside those that are shipped."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moduseg.errors import ConfigError

_ADDRESS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_SPLITS = {"train_split": "train", "val_split": "val"}
"""Splits of a data set of one's own, unless others are set."""


def is_own_part(name: object) -> bool:
    """Return whether a name is the address of a class: `module:Class`, `package.module:Class`."""
    return isinstance(name, str) and _ADDRESS.fullmatch(name) is not None


def find_own_part(where: str, name: str, registry: Mapping[str, type[Any]]) -> type[Any]:
    """Import the class that an address names; modules in the current folder are found like installed ones.

    Args:
        where: the configuration key that names it, for messages.
        name: `module:Class`.
        registry: the shipped classes, of one of whose bases it has to be.

    Raises:
        ConfigError: no such module or class, a class of another kind, or one that lacks a method.
    """
    module_name, _, class_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that no file there stands in for an installed package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{where}: got {name!r}, found no module {error.name!r}, expected {module_name.replace('.', '/')}.py in "
            "the current folder, or an installed package; try PYTHONPATH=<its folder>"
        ) from error
    part = getattr(module, class_name, None)
    bases = {base for shipped in registry.values() for base in shipped.__mro__ if inspect.isabstract(base)}
    expected = " or ".join(sorted(base.__name__ for base in bases))
    if not isinstance(part, type) or not issubclass(part, tuple(bases)):
        # Modules of the interpreter, such as `time`, have no file, and come before one of that name in the folder.
        place = (
            getattr(module, "__file__", None) or f"the module {module_name!r} of Python, whose name hides other files"
        )
        raise ConfigError(f"{where}: got {name!r}, expected a subclass of {expected} in {place}; see docs/extending.md")
    missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
    if missing:
        raise ConfigError(f"{where}: got {name!r} without {missing}, expected all methods of {expected}; define them")
    return part


def settle_own_part(group: str, name: str) -> tuple[str, dict[str, Any]]:
    """Return where a class of one's own stands in the configuration, and the keys that it has there at first.

    Args:
        group: the group that is chosen.
        name: `module:Class`.

    Raises:
        ConfigError: a group that takes shipped files alone.
    """
    keys = {
        "backbone": "backbone", "dataset": "dataset", "discoverer": "discoverer", "proposer": "proposer",
        "proposer@train_proposer": "train_proposer", "pseudo_masks": "pseudo_masks.generator", "tagger": "tagger",
    }  # fmt: skip
    if group not in keys:
        raise ConfigError(f"{group}: got {name!r}, expected a file of configs/{group}; try {group}=<file>")
    return keys[group], {"name": name, **(_SPLITS if group == "dataset" else {})}
