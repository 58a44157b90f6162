"""What `--help` prints: the list of commands, and one page for each command, without importing what they run."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from moduseg.cli.commands import COMMANDS, Command
from moduseg.cli.options import describe_keys, describe_type, read_attributes, to_text
from moduseg.config import Config, compose_hydra, config_dir
from moduseg.config.overrides import find_schema

_WIDTH = 110
_KEY_WIDTH = 44
_PHOTOS = "photos"
"""How the experiments for one's own photographs begin; the help says what each needs and is good for."""
_CHAPTERS = ("data", "pipeline", "experiments", "tools")
_TITLES = {
    "data": "data: lay out and check images and labels",
    "pipeline": "pipeline: build_bank and infer are the whole job",
    "experiments": "experiments: many runs, one table",
    "tools": "tools: use and correct a finished bank, look at a finished run",
}


def list_commands() -> str:
    """Return the page of `moduseg --help`."""
    lines = ["moduseg <command> [key=value ...]", "", "Label every pixel of images, learned from tagged images alone."]
    for chapter in _CHAPTERS:
        lines += ["", _TITLES[chapter]]
        lines += [f"  {c.name:<18} {c.summary}" for c in COMMANDS.values() if c.group == chapter]
    lines += [
        "",
        "moduseg <command> --help        its keys, with defaults",
        "moduseg --version               the version",
        "moduseg completion <shell>      completion for bash, zsh or fish",
        "",
        "A first run, which needs nothing: moduseg build_bank, then moduseg infer.",
    ]
    return "\n".join(lines)


def describe_verbs(name: str) -> str:
    """Return the page of a command that has several verbs, such as `bank`."""
    verbs = [command for command in COMMANDS.values() if command.name.startswith(f"{name} ")]
    lines = [f"moduseg {name} <verb> [key=value ...]", ""]
    lines += [f"  {verb.name:<18} {verb.summary}" for verb in verbs]
    return "\n".join([*lines, "", f"moduseg {name} <verb> --help: its keys", "", "examples", *_list_examples(verbs)])


def describe_command(command: Command, overrides: Sequence[str] = ()) -> str:
    """Return the page of a command: what it reads and writes, its keys with type and default, two examples.

    Args:
        command: of the table.
        overrides: other arguments, which choose the files whose keys are listed.

    Raises:
        ConfigError: an unknown key, group or file among them.
    """
    usage = " ".join(f"<{word}>" for word in command.words)
    lines = [f"moduseg {command.name} {usage + ' ' if usage else ''}[key=value ...]", "", command.summary, ""]
    lines += [*_fill("reads    ", command.reads), *_fill("writes   ", command.writes), "", "keys"]
    if command.options is not None:
        rows = describe_keys(command.options)
        lines += _to_columns(rows)
        if command.accepts != "none":
            lines += ["  and those of the configuration, <group>.<key>=<value> (moduseg infer --help)"]
    else:
        lines += _describe_configuration(command, overrides)
        lines += [
            "",
            "--cfg job prints the configuration; -m runs several values, key=a,b; --hydra-help lists more",
        ]
        if command.stage is not None:
            lines += ["--dry-run prints stages, images, downloads, disk and keys, and does nothing"]
    return "\n".join([*lines, "", "examples", *_list_examples([command])])


def _describe_configuration(command: Command, overrides: Sequence[str]) -> list[str]:
    """Return the lines of the keys of a command that reads the configuration alone."""
    cfg, folder = compose_hydra(overrides, command.config_name), config_dir()
    groups = command.groups or tuple(str(key) for key in cfg if (folder / str(key)).is_dir())
    lines = []
    for group in groups:
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        lines += _fill(f"  {group}=<file>   ", ", ".join(names)) if len(names) > 1 else []
        if group == "experiment":
            for name in (name for name in names if name.startswith(_PHOTOS)):
                lines += _fill(f"  {group}={name}   ", _read_comment(folder / group / f"{name}.yaml"))
    rows = [("name=<text>", "a name of the run beside its key: run=<name>, bank=<name>")] if command.groups else []
    if "evaluation" in groups:
        rows.append(("predictions=<text> [null]", read_attributes(Config)["predictions"]))
    if "tagger" in groups:
        rows.append(("vocabulary=<file or list> [[]]", read_attributes(Config)["vocabulary"]))
    if "discoverer" in groups:
        rows.append(("num_clusters=<number> [null]", read_attributes(Config)["num_clusters"]))
    if "student" in groups and "student" not in cfg:
        rows.append(("student.<key>", "those of the chosen file; --help with student=<file> lists them"))
    for group in (group for group in groups if group in cfg):
        schema = find_schema(group)
        if schema is not None:
            rows += _describe_schema(schema, cfg[group], group)
        else:
            rows += _describe_file(cfg[group], group, _list_files(folder, group))
    if not command.groups:
        shared = {field.name for field in dataclasses.fields(Config)}
        own_file = [folder / f"{command.config_name}.yaml"]
        for key in (key for key in cfg if key not in groups and key not in shared):
            section = cfg[key]
            if not isinstance(section, DictConfig):
                rows += _describe_file(cfg, "", own_file, [key])
            elif any(isinstance(value, DictConfig) for value in section.values()):
                rows.append((f"{key!s}.<key>", "settings of several parts; --cfg job prints them"))
            else:
                rows += _describe_file(section, str(key), own_file)
    return [*lines, *_to_columns(rows)]


def _read_comment(path: Path) -> str:
    """Return the comment at the head of a YAML file as one text, without the line for Hydra."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in head if "@package" not in line)


def _describe_schema(cls: type, cfg: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of a group whose keys a dataclass has."""
    hints, meanings = get_type_hints(cls), read_attributes(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}.{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _describe_schema(hint, cfg.get(field.name) or OmegaConf.create({}), key)
        elif "Mapping" in str(hint):
            yield from _describe_file(cfg[field.name], key, _list_files(config_dir(), key))
        else:
            value = cfg.get(field.name, field.default)
            yield f"{key}=<{describe_type(hint)}> [{_show(value)}]", meanings.get(field.name, "")


def _list_files(folder: Path, prefix: str) -> list[Path]:
    return sorted((folder / prefix.partition(".")[0]).glob("*.yaml"))


def _describe_file(
    cfg: DictConfig, prefix: str, files: Iterable[Path], keys: Iterable[Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the rows of a section whose keys depend on the chosen file; comments of the files say what they mean."""
    group = prefix.partition(".")[0]
    texts = [path.read_text(encoding="utf-8") for path in files]
    # Files of other backends use the same names for other things.
    texts = [
        text for text in texts if "name" not in cfg or re.search(rf"^ *name: {cfg.get('name')}$", text, re.MULTILINE)
    ]
    plain: dict[Any, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    for name in plain if keys is None else keys:
        value = plain[name]
        shown, kind = _show(value), _TYPES.get(type(value), "value")
        comments = [m for text in texts for m in re.findall(rf"^ *{name}: *([^#\n]*?) +# (.+)$", text, re.MULTILINE)]
        same = [comment for written, comment in comments if written == shown]
        meaning = next(iter([*same, *(comment for _, comment in comments)]), "")
        if name == "name" and not meaning:
            meaning = f"the implementation that these keys are of; {group}=<file> sets it"
        yield f"{prefix}{'.' if prefix else ''}{name}=<{kind}> [{shown}]", meaning


_TYPES = {str: "text", int: "whole number", float: "number", bool: "true|false", list: "list", dict: "settings"}


def _show(value: Any) -> str:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    text = to_text(value) if not isinstance(value, list) else f"[{', '.join(map(str, value))}]"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _list_examples(commands: Iterable[Command]) -> list[str]:
    return [f"  moduseg {example}" for command in commands for example in command.examples]


def _to_columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each key, or two where the key is long."""
    lines = []
    for key, meaning in rows:
        filled = textwrap.wrap(meaning, _WIDTH - _KEY_WIDTH)
        # A long key stands on a line of its own.
        first = filled.pop(0) if filled and len(key) < _KEY_WIDTH - 1 else ""
        lines += [f"  {key:<{_KEY_WIDTH - 2}} {first}".rstrip()]
        lines += [f"{'':<{_KEY_WIDTH}} {line}" for line in filled]
    return lines


def _fill(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=title, subsequent_indent=" " * len(title))
