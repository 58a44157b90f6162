"""Files that are either complete or absent, their JSON, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from moduseg.errors import ArtefactError, MissingError, StorageError, hide_credentials

FORMAT = 1
"""Raised when the files of a stage change meaning, so that older folders are not taken for new ones."""

_MAX_LEFTOVER_AGE = 24 * 3600
"""Seconds after which a temporary file is a leftover, whoever wrote it: writing one takes seconds."""
_ATTEMPTS = 3
"""How often a file is written whose folder another process removes meanwhile."""


def _identify_machine() -> str:
    """Return text that two processes share only if each sees the other's process id.

    Containers may have equal host names; what they do not share is the namespace of their process ids.
    """
    parts = [platform.node()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


_MACHINE = _identify_machine()
# Containers sharing this folder may have equal process ids, so a random token tells their files apart.
_TOKEN = os.urandom(4).hex()


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and without spaces: equal values give equal text, as do addresses that differ in
    their `user:password@` alone.
    """
    return hide_credentials(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def to_json_values(value: Any) -> Any:
    """Return nested mappings as dicts and tuples as lists, for hashing and JSON."""
    if isinstance(value, Mapping):
        return {str(k): to_json_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(v) for v in value]
    return value


def write_atomic(path: Path, data: bytes, *, is_durable: bool = False) -> None:
    """Write `data` so that `path` holds either all of it or its former content, even if the process dies meanwhile.

    Args:
        path: the file; its folder is made if need be.
        data: the new content.
        is_durable: whether that also holds if the machine loses its power. It takes the time that the disk takes.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """
    replace_atomic(path, lambda temporary: temporary.write_bytes(data), is_durable=is_durable)


def replace_atomic(path: Path, write: Callable[[Path], object], *, is_durable: bool = False) -> None:
    """Do what `write_atomic` does, with a function that writes a file: its content need not be in memory at once.

    Args:
        path: the file; its folder is made if need be.
        write: writes the new content to the file that it is given; it is called again if the folder vanishes.
        is_durable: as for `write_atomic`.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """
    temporary = path.with_name(f".{path.name}.{_MACHINE}.{_TOKEN}.{os.getpid()}.tmp")
    try:
        for attempt in range(_ATTEMPTS):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(temporary)
                if is_durable:
                    with temporary.open("rb+") as file:
                        os.fsync(file.fileno())
                temporary.replace(path)
                break
            except FileNotFoundError:
                # Another process that writes the same result has removed the folder.
                if attempt == _ATTEMPTS - 1:
                    raise
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
            errno.EDQUOT: "free some space of your quota",
            errno.EACCES: "check the permissions, or set runtime.outputs=<folder>",
            errno.EPERM: "check the permissions, or set runtime.outputs=<folder>",
            errno.EROFS: "set runtime.outputs=<a folder that can be written>",
        }.get(error.errno or 0, "set runtime.outputs=<another folder>")
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); {remedy} and run again, finished images are kept"
        ) from error


def write_json(path: Path, value: Any, *, is_durable: bool = False) -> None:
    """Write indented JSON with `write_atomic`; web addresses in it lose their `user:password@`."""
    text = hide_credentials(json.dumps(value, indent=2, ensure_ascii=False))
    write_atomic(path, (text + "\n").encode(), is_durable=is_durable)


def read_json(path: Path) -> Any:
    """Return the JSON in `path`.

    Raises:
        ArtefactError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # damage may open a thousand brackets
        raise ArtefactError(f"{path}: not readable as JSON ({error}); remove the folder and run again") from error


_digested: dict[Path, int] = {}
"""Bytes of each file that this process has taken the digest of."""


def get_digested_bytes() -> int:
    """Return the size of the files that this process has taken the digest of: weights, above all."""
    return sum(_digested.values())


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    _digested[path] = size
    return compute_digest(path)


def compute_digest(path: Path) -> str:
    """Return the sha256 of a file as it is now, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal; it is read once for each size and modification time.

    Raises:
        MissingError: the file does not exist.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such file; check the path")
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files below a folder that killed processes left.

    Whether a process runs can be told on its own machine and in its own container alone; files of others are removed
    when they are a day old.
    """
    for leftover in folder.rglob(".*.tmp"):
        *_, machine, _, owner, _ = ("", *leftover.name.split("."))
        if machine == _MACHINE and owner.isdigit():
            is_left = not _is_running(int(owner))
        else:
            is_left = _age(leftover) > _MAX_LEFTOVER_AGE
        if is_left:
            leftover.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the seconds since a file was changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
