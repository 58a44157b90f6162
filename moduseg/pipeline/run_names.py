"""Names of finished runs: `latest`, and names of one's own, beside the folders that are named by their keys.

`outputs/<dataset>/<stage>/latest` is a link to the folder of the newest finished run, made when a command ends; where
links are not allowed, it is a text file that holds the folder's name.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moduseg.errors import ConfigError, MissingError, StorageError

log = logging.getLogger("moduseg")
LATEST = "latest"
BANKS = ("build_bank", "bank")
STUDENTS = ("train_student",)
RUNS = ("infer", "evaluate", "pseudo_masks", "segment", "discover", "predict_student", "compare")
"""Stages whose folders `bank=<name>`, `student=<name>` and `run=<name>` look for."""
_NAME = re.compile(r"(?!latest$)(?!.*-[0-9a-f]{8}$)[^\W.][^/\\\0]*")


def check_name(name: str) -> str:
    """Return the name of a run, if it may be one.

    Raises:
        ConfigError: it is `latest`, looks like a path, or ends as the folders that are named by their keys.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: got {name!r}, expected letters or digits without '/', not {LATEST!r} and no key of eight digits at "
            "the end; try name=first"
        )
    return name


def name_run(folder: Path, name: str | None = None) -> None:
    """Let `latest`, and a name of one's own, stand for a finished run and for those that it was made from.

    Args:
        folder: of the finished run.
        name: the further name.

    Raises:
        ConfigError: something else has that name.
    """
    from moduseg.pipeline.manifests import StageFolder  # which imports torch; `resolve_run` does without

    outputs = folder.resolve().parents[2]
    for stage in StageFolder(folder).provenance():
        path = stage.path.resolve()
        if path.parents[2] == outputs and path.parent.name == stage.stage:
            for link in (LATEST, *([name] if name else [])):
                _write_link(path.parent / link, path.name)


def resolve_run(text: str, stages: Sequence[str], outputs: Path) -> str:
    """Return the folder that a command's argument means.

    Args:
        text: a path; or `latest` or a run's own name, of any data set below `outputs`, the newest one first.
        stages: whose folders are looked at.
        outputs: root of all artefacts.

    Raises:
        MissingError: `latest`, and no run is finished.
    """
    path = Path(text).expanduser()
    if (target := _read_link(path)) is not None:
        return str(target)
    if path.exists() or path.name != text:
        return text
    links = [link for stage in stages for link in outputs.glob(f"*/{stage}/*") if link.name == text]
    newest = sorted(links, key=lambda link: link.lstat().st_mtime_ns, reverse=True)
    targets = [target for link in newest if (target := _read_link(link)) is not None]
    if not targets and text == LATEST:
        raise MissingError(
            f"{text}: no finished run in {outputs}/*/{{{','.join(stages)}}}; run moduseg {stages[0]} "
            "first, or name a folder"
        )
    return str(targets[0]) if targets else text


def _read_link(path: Path) -> Path | None:
    """Return the folder that a link or a text file of `name_run` stands for; `None` if it is neither."""
    with suppress(OSError, UnicodeDecodeError):
        if path.is_symlink():
            target = path.parent / path.readlink()
        elif path.is_file() and path.stat().st_size < 1000:
            target = path.parent / path.read_text(encoding="utf-8").strip()
        else:
            return None
        return target if (target / "manifest.json").is_file() else None
    return None


def _write_link(link: Path, target: str) -> None:
    """Make or replace a link to a folder beside it."""
    if link.is_dir() and not link.is_symlink():
        if link.name == LATEST:
            # Outputs copied without their links have a copy of a run there, which is no reason to end a command.
            log.warning("%s: is a folder, not a link, and stays as it is; remove it to have the newest run there", link)
            return
        raise ConfigError(f"name: got {link.name!r}, which is a folder in {link.parent}; choose another name")
    temporary = link.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            temporary.symlink_to(target, target_is_directory=True)
        except (OSError, NotImplementedError):  # a file system, or a user of Windows, without links
            temporary.write_text(f"{target}\n", encoding="utf-8")
        Path(temporary).replace(link)
    except OSError as error:
        raise StorageError(f"{link}: cannot be written ({error.strerror}); check space and permissions") from error
