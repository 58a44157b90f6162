"""Records of finished batches: what was read, what was written, what failed.

A batch is done when its record `batches/<index>.json` is there, its inputs are as they were, and every file it names
has the recorded size (and, where asked, the recorded sha256).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moduseg.files import write_atomic
from moduseg.pipeline.artefacts import Artefact

Files = dict[str, bytes]
"""What one image leaves behind: path inside the artefact -> content."""
Record = dict[str, Any]
"""`ids`, `stamps` (of each id), `files` (path -> size and sha256), `failed` (id -> error), `seconds` (by step)."""
_KEYS = ("ids", "stamps", "files", "failed", "seconds")


class Records:
    """The batches of one artefact, as they are on disk.

    Args:
        artefact: where files and records are.
        batches: the ids of each batch.
        stamp: id -> what tells whether its input files changed since.
        verify: whether files are read and compared with their digests, not their sizes alone.
    """

    def __init__(
        self,
        artefact: Artefact,
        batches: Sequence[Sequence[str]],
        stamp: Callable[[str], list[int]],
        verify: bool = False,
    ) -> None:
        self._artefact, self._batches, self._stamp, self._verify = artefact, batches, stamp, verify

    def read(self, index: int) -> Record | None:
        """The record of a finished batch; `None` if it is missing, damaged, or a file of it is not as it was."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["ids"] != list(self._batches[index]) or not isinstance(record["failed"], dict):
                return None
            # An image that failed is judged by the loop, which finds out more than a stamp tells.
            for image_id, stamp in zip(record["ids"], record["stamps"], strict=True):
                if image_id not in record["failed"] and stamp != self._stamp(image_id):
                    return None
            for relative, (size, digest) in record["files"].items():
                if not self._is_whole(self._artefact.file(relative), size, digest):
                    return None
            return {key: record[key] for key in _KEYS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Whatever is wrong with the record, the batch is done again.
            return None

    def write(self, index: int, results: Mapping[str, Files]) -> dict[str, tuple[int, str]]:
        """Write the files of a batch's images; size and sha256 of each.

        Raises:
            StorageError: a file cannot be written.
        """
        files: dict[str, tuple[int, str]] = {}
        for content in results.values():
            for relative, data in content.items():
                write_atomic(self._artefact.file(relative), data)
                files[relative] = (len(data), hashlib.sha256(data).hexdigest())
        return files

    def finish(self, index: int, record: Record) -> None:
        """Write the record, which makes the batch done, and remove what earlier runs left for its failed images.

        Raises:
            StorageError: it cannot be written.
        """
        self._remove_stale(index, record["files"])
        write_atomic(self._path(index), json.dumps(record, ensure_ascii=False).encode())

    def _path(self, index: int) -> Path:
        return self._artefact.path / "batches" / f"{index:06d}.json"

    def _is_whole(self, file: Path, size: int, digest: str) -> bool:
        if not file.is_file() or file.stat().st_size != size:
            return False
        return not self._verify or hashlib.sha256(file.read_bytes()).hexdigest() == digest

    def _remove_stale(self, index: int, files: Mapping[str, object]) -> None:
        """Remove what an earlier run left for images of the batch that have no result now."""
        try:
            earlier = json.loads(self._path(index).read_text(encoding="utf-8"))
            if earlier["ids"] != list(self._batches[index]):  # cut by another batch size: other batches' files now
                return
            stale = set(earlier["files"]) - set(files)
        except (OSError, ValueError, KeyError, TypeError):
            return
        for relative in stale:
            self._artefact.file(relative).unlink(missing_ok=True)


def sizes(*paths: Path) -> list[int]:
    """Bytes of each file, -1 where it is absent: a stamp that costs no reading."""
    return [path.stat().st_size if path.is_file() else -1 for path in paths]
