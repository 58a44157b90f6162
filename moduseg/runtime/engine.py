"""The one loop over images: batches, resume, failures, progress.

Batches are cut from the whole list of ids once, so that a batch holds the same images however the run was interrupted.
A batch is done when its record `batches/<index>.json` is there, its inputs are as they were, and every file it names
has the recorded size. An image that cannot be processed is recorded in its batch and the loop goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError, StorageError
from moduseg.runtime.artefacts import Artefact, write_atomic

Item = TypeVar("Item")
Files = dict[str, bytes]
"""What one image leaves behind: path inside the artefact -> content."""

_FATAL = (StorageError, ConfigError, MissingError, ArtefactError, MemoryError)
"""Errors that the next image would meet as well: they end the run instead of being recorded."""


@dataclass
class Outcome:
    """What the loop did.

    Attributes:
        failed: error of each image that has no result, by id, in list order.
        fresh: images processed now; the others were done before.
        changed: whether anything in the artefact differs from before the call.
        seconds: time by step (`load`, `work`, `write`), of all runs that made the artefact.
    """

    failed: dict[str, str] = field(default_factory=dict)
    fresh: int = 0
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class Loop(Generic[Item]):
    """Process the images of a stage batch by batch, each batch once.

    Args:
        artefact: where files go.
        ids: every image of the stage, in the order of the data set.
        load: id -> what `work` needs of it; may raise `DataError`. Runs in a thread, one batch ahead.
        work: several loaded items -> the files of each, in order.
        batch_size: images in a batch.
        left_out: images that an earlier stage could not process, with its error.
        stamp: id -> what tells whether its input files changed since (their sizes); a batch whose stamps differ from
            those it was made with is done again.
        title: what the progress bar says.
    """

    def __init__(
        self,
        artefact: Artefact,
        ids: Sequence[str],
        load: Callable[[str], Item],
        work: Callable[[list[Item]], list[Files]],
        batch_size: int,
        left_out: Mapping[str, str] | None = None,
        title: str = "",
        stamp: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.artefact, self.ids, self.title = artefact, list(ids), title
        self._load, self._work, self._left_out = load, work, dict(left_out or {})
        self._stamp = stamp or (lambda image_id: [])
        self.batches = [self.ids[i : i + batch_size] for i in range(0, len(self.ids), batch_size)]

    def run(self) -> Outcome:
        """Do what is not done.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError: the run cannot go on.
            DataError: not a single image could be processed.
        """
        outcome = Outcome()
        records = [self._read_record(i) for i in range(len(self.batches))]
        todo = [i for i, record in enumerate(records) if record is None or self._worth_a_retry(record)]
        if todo:
            self._run_batches(todo, records, outcome)
        for record in records:
            if record is None:
                raise ArtefactError(f"{self.artefact.path}: a batch has no record after the run; run again")
            outcome.failed.update(record["failed"])
            for step, value in record["seconds"].items():
                outcome.seconds[step] = outcome.seconds.get(step, 0.0) + value
        if self.ids and len(outcome.failed) == len(self.ids):
            first = next(iter(outcome.failed.items()))
            raise DataError(
                f"{self.title}: none of {len(self.ids)} images could be processed; first {first[0]}: {first[1]}"
            )
        lines = [json.dumps({"id": i, "error": e}, ensure_ascii=False) + "\n" for i, e in outcome.failed.items()]
        failures = self.artefact.path / "failures.jsonl"
        text = "".join(lines).encode()
        if not failures.exists() or failures.read_bytes() != text:
            write_atomic(failures, text)
        return outcome

    def _run_batches(self, todo: list[int], records: list[dict[str, Any] | None], outcome: Outcome) -> None:
        images = sum(len(self.batches[i]) for i in todo)
        done = len(self.ids) - images
        with (
            ThreadPoolExecutor(1, thread_name_prefix="load") as loader,
            tqdm(total=len(self.ids), initial=done, desc=self.title, unit="img", leave=False) as progress,
        ):
            following = loader.submit(self._load_batch, todo[0])
            try:
                for position, index in enumerate(todo):
                    loaded, failed, stamps, load_seconds = following.result()
                    if position + 1 < len(todo):
                        following = loader.submit(self._load_batch, todo[position + 1])
                    start = time.perf_counter()
                    results = self._process(loaded, failed)
                    worked = time.perf_counter()
                    files = {}
                    for content in results.values():
                        for relative, data in content.items():
                            write_atomic(self.artefact.file(relative), data)
                            files[relative] = [len(data), hashlib.sha256(data).hexdigest()]
                    seconds = {
                        "load": load_seconds,
                        "work": worked - start,
                        "write": time.perf_counter() - worked,
                    }
                    record = {
                        "ids": self.batches[index],
                        "stamps": stamps,
                        "files": files,
                        "failed": failed,
                        "seconds": seconds,
                    }
                    self._remove_stale(index, files)
                    write_atomic(self._record_path(index), json.dumps(record, ensure_ascii=False).encode())
                    records[index] = record
                    outcome.fresh += len(results)
                    outcome.changed = True
                    progress.update(len(self.batches[index]))
            finally:
                following.cancel()

    def _load_batch(self, index: int) -> tuple[dict[str, Item], dict[str, str], list[list[int]], float]:
        start = time.perf_counter()
        # Taken before the files are read: a file that changes meanwhile is noticed by the next run.
        stamps = [self._stamp(image_id) for image_id in self.batches[index]]
        loaded: dict[str, Item] = {}
        failed: dict[str, str] = {}
        for image_id in self.batches[index]:
            try:
                loaded[image_id] = self._load_one(image_id)
            except _FATAL:
                raise
            except Exception as error:
                failed[image_id] = _describe(error)
        return loaded, failed, stamps, time.perf_counter() - start

    def _load_one(self, image_id: str) -> Item:
        if image_id in self._left_out:
            raise DataError(f"left out: {self._left_out[image_id]}")
        return self._load(image_id)

    def _process(self, loaded: dict[str, Item], failed: dict[str, str]) -> dict[str, Files]:
        """The files of each image; if the batch fails as a whole, image by image, to find the one to blame."""
        if not loaded:
            return {}
        try:
            return dict(zip(loaded, self._work(list(loaded.values())), strict=True))
        except _FATAL:
            raise
        except Exception as error:
            if len(loaded) == 1:
                failed[next(iter(loaded))] = _describe(error)
                return {}
        results: dict[str, Files] = {}
        for image_id, item in loaded.items():
            results.update(self._process({image_id: item}, failed))
        return results

    def _worth_a_retry(self, record: dict[str, Any]) -> bool:
        """Whether an image that failed may succeed now: it can be loaded again, or it failed after loading."""
        for image_id in record["failed"]:
            try:
                self._load_one(image_id)
            except _FATAL:
                raise
            except Exception as error:
                if _describe(error) == record["failed"][image_id]:
                    continue
            return True
        return False

    def _record_path(self, index: int) -> Path:
        return self.artefact.path / "batches" / f"{index:06d}.json"

    def _remove_stale(self, index: int, files: Mapping[str, object]) -> None:
        """Remove what an earlier run left for images of the batch that have no result now."""
        try:
            earlier = json.loads(self._record_path(index).read_text(encoding="utf-8"))
            if earlier["ids"] != self.batches[index]:  # cut by another batch size: the files are other batches' now
                return
            stale = set(earlier["files"]) - set(files)
        except (OSError, ValueError, KeyError, TypeError):
            return
        for relative in stale:
            self.artefact.file(relative).unlink(missing_ok=True)

    def _read_record(self, index: int) -> dict[str, Any] | None:
        """The record of a finished batch; `None` if it is missing, damaged, or a file of it is not as it was."""
        path = self._record_path(index)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["ids"] != self.batches[index] or not isinstance(record["failed"], dict):
                return None
            # An image that failed is judged by `_worth_a_retry`, which finds out more than a stamp tells.
            for image_id, stamp in zip(record["ids"], record["stamps"], strict=True):
                if image_id not in record["failed"] and stamp != self._stamp(image_id):
                    return None
            for relative, (size, _) in record["files"].items():
                file = self.artefact.file(relative)
                if not file.is_file() or file.stat().st_size != size:
                    return None
            return {key: record[key] for key in ("ids", "stamps", "files", "failed", "seconds")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Whatever is wrong with the record, the batch is done again.
            return None


def _describe(error: Exception) -> str:
    """One line: the message of our own errors, the type as well for others."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"


def sizes(*paths: Path) -> list[int]:
    """Bytes of each file, -1 where it is absent: a stamp that costs no reading."""
    return [path.stat().st_size if path.is_file() else -1 for path in paths]
