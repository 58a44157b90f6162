"""Folders that hold the result of a stage, named by everything that decides it.

`outputs/<dataset>/<stage>/<name>-<key8>/`: the key hashes the stage's configuration, the digests of its weights and the
keys of the artefacts it was made from. Runs that differ never share a folder, runs that agree share their work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moduseg.errors import ArtefactError
from moduseg.files import FORMAT, compute_digest, digest_of, read_json, remove_leftovers, write_json
from moduseg.pipeline.environment import describe_environment, report_difference

log = logging.getLogger("moduseg")


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
        self.path, self.key = locate_artefact(outputs, dataset, stage, name, parts)
        stored = self._stored_manifest()
        if stored is not None and stored.get("key") != self.key:
            raise ArtefactError(
                f"{self.path}: holds key {stored.get('key')!r}, expected {self.key!r}; remove the folder"
            )
        if stored is not None:
            report_difference(stage, str(self.path), stored.get("environment"))
        remove_leftovers(self.path)
        if stored is None:
            self.write_manifest(status="running")

    @property
    def manifest_path(self) -> Path:
        """Where `manifest.json` is."""
        return self.path / "manifest.json"

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        value = read_json(self.manifest_path)
        if not isinstance(value, dict):
            raise ArtefactError(
                f"{self.manifest_path}: got {type(value).__name__}, expected an object; remove the folder"
            )
        return value

    @property
    def is_complete(self) -> bool:
        """Whether the stage has completed in this folder."""
        return self.manifest_path.exists() and self.manifest.get("status") == "complete"

    def is_intact(self, verify: bool = False) -> bool:
        """Return whether the stage is complete and its merged files have the recorded sizes.

        Files of single images are checked with the records of their batches (`moduseg.pipeline.records`).

        Args:
            verify: whether the files are read and compared with their digests as well.
        """
        if not self.is_complete:
            return False
        products = self.manifest.get("products")
        if not isinstance(products, dict):
            return False
        try:
            return all(
                (path := self.file(name)).stat().st_size == size and (not verify or compute_digest(path) == digest)
                for name, (size, digest) in products.items()
            )
        except (OSError, ValueError, TypeError):
            return False

    def write_manifest(self, **fields: Any) -> None:
        """Write `manifest.json`: stage, key, parts and `fields` (`status` is `running` or `complete`).

        A complete manifest also lists size and sha256 of the merged files: those beside it, and the pictures in
        `panels/`.
        """
        fields["environment"] = describe_environment()
        if fields.get("status") == "complete":
            entries = [p for p in (*self.path.iterdir(), *self.path.glob("panels/**/*")) if p.name[0] != "."]
            files = sorted(p for p in entries if p.is_file() and p != self.manifest_path)
            fields["products"] = {
                p.relative_to(self.path).as_posix(): [p.stat().st_size, compute_digest(p)] for p in files
            }
        write_json(
            self.manifest_path, {"stage": self.stage, "key": self.key, "parts": self.parts, **fields}, is_durable=True
        )

    def file(self, relative: str) -> Path:
        """Return `path / relative`; a path that leaves the folder is refused.

        Raises:
            ArtefactError: `relative` is absolute or climbs out.
        """
        candidate = Path(relative)
        if candidate.is_absolute() or ".." in candidate.parts:
            raise ArtefactError(f"{relative!r}: leaves the folder {self.path}; rename the image")
        return self.path / candidate

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time merge; one that dies releases its lock.

        On a file system without locks every process merges, with the same bytes.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".merge.lock")
        with ExitStack() as stack:
            try:
                try:
                    stack.enter_context(lock.acquire(timeout=1))
                except Timeout:
                    log.info("waiting for another process that merges %s", self.path)
                    stack.enter_context(lock.acquire())
            except (OSError, NotImplementedError) as error:
                log.debug("%s: no lock (%s)", self.path, error)
            yield

    def _stored_manifest(self) -> dict[str, Any] | None:
        """Return the content of `manifest.json`; `None` if it is absent or damaged: the stage is then checked again."""
        try:
            return self.manifest
        except ArtefactError:
            return None


def locate_artefact(outputs: Path, dataset: str, stage: str, name: str, parts: Mapping[str, Any]) -> tuple[Path, str]:
    """Return the folder of a stage's result and its key, whether it exists or not; arguments as those of `Artefact`."""
    key = digest_of({"format": FORMAT, **parts})
    # Of `module:Class` the class is enough to read; a colon is no part of a folder's name on every system.
    readable = name.rpartition(":")[2]
    return outputs / dataset / stage / f"{readable}-{key[:8]}", key
