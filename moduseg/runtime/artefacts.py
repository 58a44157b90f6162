"""Folders that hold the result of a stage, named by everything that decides it.

`outputs/<dataset>/<stage>/<name>-<key8>/`: the key hashes the stage's configuration, the digests of its weights and the
keys of the artefacts it was made from. Runs that differ never share a folder, runs that agree share their work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moduseg.errors import ArtefactError, StorageError

FORMAT = 1
"""Raised when the files of a stage change meaning, so that older folders are not taken for new ones."""

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node()) or "host"
# Containers may share a folder and have one name and the same process ids.
_TOKEN = os.urandom(4).hex()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before, even if the process dies meanwhile.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}.{_TOKEN}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
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


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises:
        ArtefactError: it is not there or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: not readable as JSON ({error}); remove the folder and run again") from error


class Artefact:
    """The folder of one stage's result.

    Args:
        outputs: root of all artefacts.
        dataset: name of the data set, the first folder.
        stage: name of the stage, the second folder.
        name: readable part of the third folder's name.
        parts: everything that decides the result, JSON values; hashed into the key.

    Raises:
        StorageError: the folder cannot be made.
        ArtefactError: the folder holds something made from other parts.
    """

    def __init__(self, outputs: Path, dataset: str, stage: str, name: str, parts: Mapping[str, Any]) -> None:
        self.stage = stage
        self.parts = {"format": FORMAT, **parts}
        self.key = digest_of(self.parts)
        self.path = outputs / dataset / stage / f"{name}-{self.key[:8]}"
        found = self._stored_manifest()
        if found is not None and found.get("key") != self.key:
            raise ArtefactError(
                f"{self.path}: holds key {found.get('key')!r}, expected {self.key!r}; remove the folder"
            )
        sweep(self.path)
        if found is None:
            self.write_manifest(status="running")

    @property
    def manifest_path(self) -> Path:
        """Where `manifest.json` is."""
        return self.path / "manifest.json"

    @property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says."""
        value = read_json(self.manifest_path)
        if not isinstance(value, dict):
            raise ArtefactError(
                f"{self.manifest_path}: got {type(value).__name__}, expected an object; remove the folder"
            )
        return value

    @property
    def is_complete(self) -> bool:
        """Whether the stage once came to its end here."""
        return self.manifest_path.exists() and self.manifest.get("status") == "complete"

    def is_whole(self, verify: bool = False) -> bool:
        """Whether it is complete and what was merged has the recorded sizes (`verify`: and digests).

        Files of single images are the loop's to look at.
        """
        if not self.is_complete:
            return False
        products = self.manifest.get("products")
        if not isinstance(products, dict):
            return False
        try:
            return all(
                (path := self.file(name)).stat().st_size == size and (not verify or _sha256(path) == digest)
                for name, (size, digest) in products.items()
            )
        except (OSError, ValueError, TypeError):
            return False

    def write_manifest(self, **fields: Any) -> None:
        """Write `manifest.json`: stage, key, parts and `fields` (`status` is `running` or `complete`).

        When complete, also size and sha256 of what was merged: the files beside it, and the pictures in `panels/`.
        """
        if fields.get("status") == "complete":
            found = [p for p in (*self.path.iterdir(), *self.path.glob("panels/**/*")) if not p.name.startswith(".")]
            files = sorted(p for p in found if p.is_file() and p != self.manifest_path)
            fields["products"] = {p.relative_to(self.path).as_posix(): [p.stat().st_size, _sha256(p)] for p in files}
        write_json(self.manifest_path, {"stage": self.stage, "key": self.key, "parts": self.parts, **fields})

    def file(self, relative: str) -> Path:
        """`path / relative`, refused if it would leave the folder.

        Raises:
            ArtefactError: `relative` is absolute or climbs out.
        """
        candidate = Path(relative)
        if candidate.is_absolute() or ".." in candidate.parts:
            raise ArtefactError(f"{relative!r}: leaves the folder {self.path}; rename the image")
        return self.path / candidate

    def _stored_manifest(self) -> dict[str, Any] | None:
        """What `manifest.json` says; `None` where it is absent or damaged, and the stage is to be looked at anew."""
        try:
            return self.manifest
        except ArtefactError:
            return None


def sweep(folder: Path) -> None:
    """Remove the temporary files below a folder that a process of this machine left when it was killed."""
    for leftover in folder.rglob(f".*.{_HOST}.*.tmp"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit() and not _is_running(int(owner)):
            leftover.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
