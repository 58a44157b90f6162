"""Records of finished batches: what was read, what was written, what failed.

A batch is done when its record `batches/<index>.json` exists, the sizes of its input files have not changed, and every
file that the record names has the recorded size (and, if asked for, the recorded sha256).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moduseg.files import write_atomic
from moduseg.pipeline.artefacts import Artefact

Files = Mapping[str, bytes | Callable[[], bytes]]
"""What a stage writes for one image: path inside the artefact -> content, or a function that encodes the content.

Functions are called in other threads, while the stage is at its next images."""
Record = dict[str, Any]
"""`ids`, `stamps` (input sizes by id), `files` (path -> size, sha256), `failed` (id -> error), `seconds` (by step)."""
_KEYS = ("ids", "stamps", "files", "failed", "seconds")


class Records:
    """The batches of one artefact, as they are on disk.

    Args:
        artefact: where files and records are.
        batches: the ids of each batch.
        input_sizes: id -> sizes of the files it is made from; a batch whose inputs changed is done again.
        verify: whether files are read and compared with their digests, not their sizes alone.
    """

    def __init__(
        self,
        artefact: Artefact,
        batches: Sequence[Sequence[str]],
        input_sizes: Callable[[str], list[int]],
        verify: bool = False,
    ) -> None:
        self._artefact, self._batches, self._input_sizes, self._verify = artefact, batches, input_sizes, verify

    def read(self, index: int) -> Record | None:
        """Return the record of a finished batch; `None` if it is missing or damaged, or if a file of it changed."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["ids"] != list(self._batches[index]) or not isinstance(record["failed"], dict):
                return None
            # The runner loads an image that failed again, which tells more than the sizes of its files.
            for image_id, sizes in zip(record["ids"], record["stamps"], strict=True):
                if image_id not in record["failed"] and sizes != self._input_sizes(image_id):
                    return None
            for relative, (size, digest) in record["files"].items():
                if not self._is_intact(self._artefact.file(relative), size, digest):
                    return None
            return {key: record[key] for key in _KEYS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Whatever is wrong with the record, the batch is done again.
            return None

    def write(self, index: int, results: Mapping[str, Mapping[str, bytes]]) -> dict[str, tuple[int, str]]:
        """Write the files of a batch's images and return size and sha256 of each.

        Raises:
            StorageError: a file cannot be written.
        """
        files: dict[str, tuple[int, str]] = {}
        for content in results.values():
            for relative, data in content.items():
                write_atomic(self._artefact.file(relative), data)
                files[relative] = (len(data), hashlib.sha256(data).hexdigest())
        return files

    def commit(self, index: int, record: Record) -> None:
        """Write the record, which marks the batch as done, and remove what earlier runs left for its failed images.

        Raises:
            StorageError: it cannot be written.
        """
        self._remove_stale(index, record["files"])
        write_atomic(self._path(index), json.dumps(record, ensure_ascii=False).encode())

    def _path(self, index: int) -> Path:
        return self._artefact.path / "batches" / f"{index:06d}.json"

    def _is_intact(self, file: Path, size: int, digest: str) -> bool:
        if not file.is_file() or file.stat().st_size != size:
            return False
        return not self._verify or hashlib.sha256(file.read_bytes()).hexdigest() == digest

    def _remove_stale(self, index: int, files: Mapping[str, object]) -> None:
        """Remove the files of images that had a result in an earlier run and have none now."""
        try:
            earlier = json.loads(self._path(index).read_text(encoding="utf-8"))
            if earlier["ids"] != list(self._batches[index]):  # of another batch size
                return
            stale = set(earlier["files"]) - set(files)
        except (OSError, ValueError, KeyError, TypeError):
            return
        for relative in stale:
            self._artefact.file(relative).unlink(missing_ok=True)


def encode_files(files: Files) -> dict[str, bytes]:
    """Return the content of one image's files, encoding those that a function encodes."""
    return {relative: content if isinstance(content, bytes) else content() for relative, content in files.items()}


def file_sizes(paths: Sequence[Path]) -> list[int]:
    """Return the bytes of each file, -1 if it is absent: a change of an input shows without reading it."""
    return [path.stat().st_size if path.is_file() else -1 for path in paths]
