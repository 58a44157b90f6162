"""Arguments `group=file` and `group.key=value` of a command line: checked in this program's words, taken as typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from moduseg.config.own_parts import is_own_part, settle_own_part
from moduseg.config.schemas import Config
from moduseg.errors import ConfigError, suggest, suggest_all

PATH_KEYS = frozenset((
    "annotation_dir", "annotations", "arm", "checkpoint", "classes_file", "folder", "image_dir", "images",
    "instance_dir", "labels", "list_dir", "mask_dir", "output", "outputs", "path", "pattern", "predictions",
    "release_dir", "root", "tokenizer", "train_split", "val_annotations", "val_images", "val_split", "vocabulary",
    "weights",
))  # fmt: skip
"""Last parts of keys that name a file or a folder; their values are taken character by character, but for `null`."""
_SWEEPS = re.compile(r",|^(choice|range|glob|interval|sort|shuffle|tag)\(")
"""What Hydra reads as several values with `--multirun`."""


@dataclass(frozen=True)
class Override:
    """One argument of the command line.

    Attributes:
        argument: as it was typed.
        sign: `+`, `++` or `~` before the key, or nothing.
        key: what is set: `dataset.root`, `backbone`, `proposer@train_proposer`, `hydra/launcher`.
        text: the value as it was typed.
        has_value: whether there was a `=`.
    """

    argument: str
    sign: str
    key: str
    text: str
    has_value: bool

    @property
    def group(self) -> str:
        """The group whose file is chosen, if the argument chooses one."""
        return self.key.partition("@")[0]

    @property
    def is_path(self) -> bool:
        """Whether the key names a file or a folder."""
        return self.key.rpartition(".")[2] in PATH_KEYS and not self.key.startswith("hydra.")

    def is_choice(self, folder: Path) -> bool:
        """Return whether the argument chooses a file of a group, is removed, or is one of Hydra's own settings."""
        is_group = "." not in self.group and (folder / self.group).is_dir()
        return is_group or self.sign == "~" or self.key.partition(".")[0].partition("/")[0] == "hydra"


def read_override(argument: str) -> Override:
    """Return the parts of an argument.

    Raises:
        ConfigError: it is no `key=value`.
    """
    key, equals, text = argument.partition("=")
    sign = next((sign for sign in ("++", "+", "~") if key.startswith(sign)), "")
    if not equals and sign != "~":
        raise ConfigError(f"{argument}: got no '=', expected key=value; try --help for the keys")
    return Override(argument, sign, key.removeprefix(sign), text, bool(equals))


def check_choice(override: Override, folder: Path) -> None:
    """Check that the files exist that an argument chooses for a group.

    Args:
        override: an argument for which `is_choice` is true.
        folder: of the YAML files.

    Raises:
        ConfigError: no such file, or a class of one's own for a group that takes none.
    """
    if is_own_part(override.text):
        settle_own_part(override.key, override.text)
        return
    if "/" in override.group or override.key.startswith("hydra") or override.sign == "~":
        return
    names = sorted(path.stem for path in (folder / override.group).glob("*.yaml"))
    for name in override.text.strip("[]").split(","):
        chosen = name.strip().strip("'\"").removesuffix(".yaml")
        if chosen not in (*names, "null"):
            close = suggest_all(chosen, names)
            hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(names)}"
            raise ConfigError(f"{override.key}={chosen}: no such file in configs/{override.group}; {hint}")


def check_names(arguments: Sequence[str], folder: Path) -> None:
    """Check groups, files and the keys that do not depend on a file, without composing anything.

    Args:
        arguments: overrides as they are typed; values are not looked at.
        folder: of the YAML files.

    Raises:
        ConfigError: an argument that is no `key=value`, an unknown group or file, or an unknown key of a group whose
            keys are the same for each of its files.
    """
    for override in map(read_override, arguments):
        if override.is_choice(folder):
            check_choice(override, folder)
            continue
        group, _, key = override.key.partition(".")
        groups = [field.name for field in fields(Config)]
        if group not in groups:
            raise ConfigError(describe_unknown(override.key, groups))
        allowed = keys_of_group(group)
        if key and allowed and key.partition(".")[0] not in allowed:
            raise ConfigError(describe_unknown(override.key, [f"{group}.{name}" for name in allowed]))


def set_value(cfg: DictConfig, override: Override) -> None:
    """Set the value that an argument gives.

    A file or folder is taken as it is typed; other values are read as Hydra reads them, and as text where it cannot.

    Args:
        cfg: the composed configuration, changed in place.
        override: an argument that chooses no file.

    Raises:
        ConfigError: an unknown key.
    """
    *parents, last = override.key.split(".")
    parent: Any = cfg
    for depth, name in enumerate(parents):
        if not isinstance(parent, DictConfig) or name not in parent:
            raise ConfigError(_describe_unknown_in(parent, override, depth))
        parent = parent[name]
    if not isinstance(parent, DictConfig) or not _may_hold(parent, override, parents, last):
        raise ConfigError(_describe_unknown_in(parent, override, len(parents)))
    value = _read_value(override, OmegaConf.is_list(OmegaConf.select(parent, last)) if last in parent else False)
    try:
        with open_dict(parent):
            OmegaConf.update(parent, last, value, merge=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override.key}: got {override.text!r}; {' '.join(str(error).split())}") from error


def set_own_part(cfg: DictConfig, override: Override) -> None:
    """Put a class of one's own in the place of a shipped part; its keys are those of its `__init__`.

    Args:
        cfg: the composed configuration, changed in place.
        override: `group=module:Class`.
    """
    key, settings = settle_own_part(override.key, override.text)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, settings, merge=False)


def quote_for_hydra(argument: str, *, is_multirun: bool) -> str:
    """Return an argument that Hydra reads as it was typed; several values of `--multirun` stay as they are."""
    if argument.startswith("-") or "=" not in argument:
        return argument
    override = read_override(argument)
    path = read_path(override.text)
    if not override.is_path or path is None or path.startswith("[") or override.sign == "~":
        return argument
    if is_multirun and _SWEEPS.search(override.text):
        return argument
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escape_interpolation(path))
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{override.sign}{override.key}='{escaped}'"


def read_path(text: str) -> str | None:
    """Return the file or folder that a value means: what was typed, `None` for `null`.

    Quotes around all of it, as Hydra has them, are dropped, unless a file has this very name.
    """
    if text == "null":
        return None
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted and not Path(text).exists() else text


def escape_interpolation(text: str) -> str:
    """Return text in which OmegaConf finds no `${...}`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def keys_of_group(group: str) -> tuple[str, ...]:
    """Return the keys of a group's dataclass; none if the group's keys depend on the chosen file."""
    schema = find_schema(group)
    return () if schema is None else tuple(field.name for field in fields(schema))


def find_schema(group: str) -> Any:
    """Return the dataclass of a group, which may be absent; `None` if the group's keys depend on the chosen file."""
    hint = get_type_hints(Config).get(group)
    return next((choice for choice in (hint, *get_args(hint)) if is_dataclass(choice)), None)


def describe_unknown(key: str, allowed: Sequence[str]) -> str:
    """Return the message for an unknown key: the closest of the allowed ones, or all of them.

    Args:
        key: with the group before it: `retrieval.topk`.
        allowed: of that group, written in the same way.
    """
    prefix = key[: key.rfind(".") + 1]
    close = suggest(key.removeprefix(prefix), [name.removeprefix(prefix) for name in allowed])
    if close:
        return f"{key}: unknown key; did you mean {prefix}{close}?"
    return f"{key}: unknown key, expected one of {', '.join(allowed) or 'none'}; remove it"


def _read_value(override: Override, replaces_list: bool) -> Any:
    text = override.text
    if override.is_path and not (replaces_list and text.startswith("[")):
        path = read_path(text)
        return None if path is None else escape_interpolation(path)
    try:
        parsed = OverridesParser.create().parse_override(f"{override.key}={text}")
        return escape_interpolation(text) if parsed.is_sweep_override() else parsed.value()
    except (HydraException, OmegaConfBaseException, ValueError):
        return escape_interpolation(text)


def _may_hold(parent: DictConfig, override: Override, parents: Sequence[str], last: str) -> bool:
    if last in parent or override.sign:
        return True
    if is_own_part(parent.get("name")):
        return True  # its class says which keys it takes, when it is made
    if not parents:
        # Groups without a chosen file are absent: `train_proposer=null` says what is so already.
        return last in {field.name for field in fields(Config)}
    # A file may leave out keys that have a default.
    return len(parents) == 1 and last in keys_of_group(parents[0])


def _describe_unknown_in(parent: Any, override: Override, depth: int) -> str:
    prefix = "".join(f"{name}." for name in override.key.split(".")[:depth])
    names = [f"{prefix}{name}" for name in parent] if isinstance(parent, Mapping | DictConfig) else []
    if not depth:
        places = [
            f"{group}.{override.key}"
            for group, section in parent.items()
            if group != "hydra"
            and (override.key in keys_of_group(group) or (isinstance(section, DictConfig) and override.key in section))
        ]
        if places:
            return f"{override.key}: unknown key; did you mean {', '.join(places)}?"
        names = [name for name in names if name != "hydra"]
    message = describe_unknown(override.key, names)
    return message if not depth or "did you mean" in message else f"{message}; see configs/{override.key.split('.')[0]}"
