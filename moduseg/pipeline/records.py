"""Records of finished batches: what was read, what was written, what failed.

A batch is done when its record `batches/<index>.json` exists, its input files have not changed, and every file that the
record names has the recorded size (and, if asked for, the recorded sha256). An input has not changed if its size and
time of change are the recorded ones, or if its content is: copies of a data set have other times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from moduseg.files import compute_digest, write_atomic
from moduseg.pipeline.artefacts import Artefact

Files = Mapping[str, bytes | Callable[[], bytes]]
"""What a stage writes for one image: path inside the artefact -> content, or a function that encodes the content.

Functions are called in other threads, while the stage is at its next images."""
Record = dict[str, Any]
"""`ids`, `stamps` (of their inputs), `files` (path -> size, sha256), `failed` (id -> error), `seconds` (by step),
`memory` (peaks, absent in earlier records)."""
InputStamp = tuple[int, int, str]
"""Size of an input file (-1 if it is absent), time of change in nanoseconds, sha256; earlier records hold the size."""
_KEYS = ("files", "failed", "seconds")
"""What is read of a valid record."""


class Records:
    """The batches of one artefact, as they are on disk.

    Args:
        artefact: where files and records are.
        batches: the ids of each batch.
        reads: id -> the files it is made from; a batch whose inputs changed is done again.
        verify: whether inputs and files are read and compared with their digests.
    """

    def __init__(
        self,
        artefact: Artefact,
        batches: Sequence[Sequence[str]],
        reads: Callable[[str], list[Path]],
        verify: bool = False,
    ) -> None:
        self._artefact, self._batches, self._reads, self._verify = artefact, batches, reads, verify

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
            for image_id, stamps in zip(record["ids"], record["stamps"], strict=True):
                if image_id not in record["failed"] and not self._has_same_inputs(image_id, stamps):
                    return None
            for relative, (size, digest) in record["files"].items():
                if not self._is_intact(self._artefact.file(relative), size, digest):
                    return None
            return {key: record[key] for key in _KEYS} | {"memory": record.get("memory", {})}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Whatever is wrong with the record, the batch is done again.
            return None

    def stamp_inputs(self, image_id: str) -> list[InputStamp]:
        """Return what an image's inputs are recognised by."""
        return [stamp_file(path) for path in self._reads(image_id)]

    def write(self, index: int, results: Mapping[str, Mapping[str, bytes]]) -> dict[str, tuple[int, str]]:
        """Write the files of a batch's images and return size and sha256 of each.

        Raises:
            StorageError: a file cannot be written.
        """
        files: dict[str, tuple[int, str]] = {}
        for content in results.values():
            for relative, data in content.items():
                # The record will say that the file is there, so it is to be there after a loss of power too.
                write_atomic(self._artefact.file(relative), data, is_durable=True)
                files[relative] = (len(data), hashlib.sha256(data).hexdigest())
        return files

    def commit(self, index: int, record: Record) -> None:
        """Write the record, which marks the batch as done, and remove what earlier runs left for its failed images.

        Raises:
            StorageError: it cannot be written.
        """
        self._remove_stale(index, record["files"])
        write_atomic(self._path(index), json.dumps(record, ensure_ascii=False).encode(), is_durable=True)

    def _path(self, index: int) -> Path:
        return self._artefact.path / "batches" / f"{index:06d}.json"

    def _has_same_inputs(self, image_id: str, stamps: Sequence[Any]) -> bool:
        paths = self._reads(image_id)
        return len(paths) == len(stamps) and all(
            is_same_file(path, stamp, verify=self._verify) for path, stamp in zip(paths, stamps, strict=True)
        )

    def _is_intact(self, file: Path, size: int, digest: str) -> bool:
        if _size_and_time(file)[0] != size:
            return False
        return not self._verify or compute_digest(file) == digest

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


@dataclass(frozen=True)
class StoredFile:
    """A file of one image in the folder of a stage.

    Attributes:
        path: of the file.
        sha256: of its content, hexadecimal.
        stamps: of the files that it was made from, in the order of the stage's `reads`.
        companions: ids of the images of its batch, itself among them.
    """

    path: Path
    sha256: str
    stamps: Sequence[Any]
    companions: tuple[str, ...]

    def read(self) -> bytes | None:
        """Return the content; `None` if the file is gone or another one."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self.sha256 else None


def list_stored_files(folder: Path, locate: Callable[[str], str]) -> dict[str, StoredFile]:
    """Return a file of each image that a stage has finished, by id, as the records of its batches say.

    Args:
        folder: of the stage; its records may still grow.
        locate: id -> path of the file inside the folder.
    """
    files: dict[str, StoredFile] = {}
    for path in sorted((folder / "batches").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            companions = tuple(record["ids"])
            for image_id, stamps in zip(companions, record["stamps"], strict=True):
                relative = locate(image_id)
                if relative in record["files"]:
                    sha256 = str(record["files"][relative][1])
                    files[image_id] = StoredFile(folder / relative, sha256, stamps, companions)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            # Whatever is wrong with the record, its batch is done again.
            continue
    return files


def read_batch_size(artefact: Artefact, ids: Sequence[str]) -> int | None:
    """Return the number of images in the batches of a folder that was begun; `None` if it has no record.

    Args:
        artefact: the folder.
        ids: every image of the stage, in the order of the data set.
    """
    for path in sorted((artefact.path / "batches").glob("*.json")):
        try:
            index, recorded = int(path.stem), json.loads(path.read_text(encoding="utf-8"))["ids"]
            first = ids.index(recorded[0])
            if list(ids[first : first + len(recorded)]) != recorded:
                continue
            # The last batch may hold fewer images than the others; where it begins tells their number.
            return first // index if index else len(recorded)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
    return None


def stamp_file(path: Path) -> InputStamp:
    """Return what a file is recognised by."""
    size, mtime = _size_and_time(path)
    return size, mtime, compute_digest(path) if size >= 0 else ""


def is_same_file(path: Path, stamp: Any, *, verify: bool) -> bool:
    """Return whether a file is the one that was stamped.

    Args:
        path: the file.
        stamp: an `InputStamp` as JSON gives it, or the size alone, as earlier versions wrote it.
        verify: whether the content is compared although size and time of change agree.
    """
    size, mtime = _size_and_time(path)
    if isinstance(stamp, int):
        return size == stamp
    stamped_size, stamped_mtime, digest = stamp
    if size != stamped_size:
        return False
    return (mtime == stamped_mtime and not verify) or size < 0 or compute_digest(path) == digest


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file; -1 and 0 if it is absent."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return (stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else (-1, 0)
