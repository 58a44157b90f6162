"""The one loop over images: batches, resume, failures, progress, shards.

Batches are cut from the whole list of ids once, so that a batch holds the same images however the run was interrupted
or spread. `Loop.batches_done` is the only body: the plain process, a rank of torchrun, a task of a job array and a
worker of Ray all call it with the batches that are theirs. An image that cannot be processed is recorded in its batch
and the loop goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from moduseg.clock import model_seconds
from moduseg.errors import ArtefactError, ConfigError, DataError, IncompleteError, MissingError, StorageError
from moduseg.files import canonical_json, write_atomic
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.records import Files, Record, Records, sizes

__all__ = ["Files", "Loop", "Outcome", "Spread", "sizes"]

Item = TypeVar("Item")
MAX_AUTO_WORKERS = 4
_WRITES_WAITING = 2
"""Batches that may wait for the writer before the loop waits for it: what is in memory stays bounded."""

_FATAL = (StorageError, ConfigError, MissingError, ArtefactError, MemoryError)
"""Errors that the next image would meet as well: they end the run instead of being recorded."""


@dataclass(frozen=True)
class Spread:
    """Which part of a stage this process does, and how.

    Attributes:
        index, count: batch `i` is done by the shard whose index is `i % count`.
        workers: threads that load images; 0 takes one a core, 4 at most.
        verify: whether files of earlier runs are compared with their digests, not their sizes alone.
        quiet: whether another process shows the progress.
    """

    index: int = 0
    count: int = 1
    workers: int = 0
    verify: bool = False
    quiet: bool = False


@dataclass
class Outcome:
    """What the loop did.

    Attributes:
        failed: error of each image that has no result, by id, in list order.
        fresh: images processed now; the others were done before.
        changed: whether anything in the artefact differs from when it was last complete.
        seconds: by step, of all runs that made the artefact: `load` and `write` in their threads, `work` between them,
            `model` of it in forward passes, `wall` on the clock.
        content: digest of every file's digest and of the failures, whoever made them when.
    """

    failed: dict[str, str] = field(default_factory=dict)
    fresh: int = 0
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    content: str = ""


@dataclass
class _Loaded(Generic[Item]):
    stamp: list[int]
    item: Item | None
    error: str | None
    seconds: float


class Loop(Generic[Item]):
    """Process the images of a stage batch by batch, each batch once.

    Args:
        artefact: where files go.
        ids: every image of the stage, in the order of the data set.
        load: id -> what `work` needs of it; may raise `DataError`. Runs in several threads, ahead of `work`.
        work: several loaded items -> the files of each, in order. Runs in inference mode.
        batch_size: images in a batch.
        left_out: images that an earlier stage could not process, with its error.
        stamp: id -> what tells whether its input files changed since (their sizes); a batch whose stamps differ from
            those it was made with is done again.
        title: what the progress bar says.
        spread: the part that is this process's.
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
        spread: Spread | None = None,
    ) -> None:
        self.artefact, self.ids, self.title = artefact, list(ids), title
        self._load, self._work, self._left_out = load, work, dict(left_out or {})
        self._stamp = stamp or (lambda image_id: [])
        self._spread = spread or Spread()
        self.batches = [self.ids[i : i + batch_size] for i in range(0, len(self.ids), batch_size)]
        self._records = Records(artefact, self.batches, self._stamp, self._spread.verify)

    def run(self) -> Outcome:
        """Do what is not done, and gather what all batches gave; see `own` and `gather` for the errors."""
        return self.gather(self.own())

    def own(self, run: Callable[[list[int]], Iterator[tuple[int, int]]] | None = None) -> int:
        """Do those batches of this process's shard that are not done.

        Args:
            run: takes batch indices and yields each with its number of results when it is done, in any order;
                `batches_done` by default.

        Returns:
            Images that have a result now and were processed by this call.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError: the run cannot go on.
        """
        mine = range(self._spread.index, len(self.batches), self._spread.count)
        todo = [index for index in mine if self._is_open(index)]
        if not todo:
            return 0
        images = sum(len(self.batches[i]) for i in mine)
        done = images - sum(len(self.batches[i]) for i in todo)
        fresh = 0
        with tqdm(
            total=images, initial=done, desc=self.title, unit="img", leave=False, disable=self._spread.quiet or None
        ) as progress:
            for index, results in (run or self.batches_done)(todo):
                fresh += results
                progress.update(len(self.batches[index]))
        return fresh

    def unfinished(self, indices: Sequence[int]) -> list[int]:
        """Those of the batches that have no valid record or an image that failed."""
        records = ((index, self._records.read(index)) for index in indices)
        return [index for index, record in records if record is None or record["failed"]]

    def gather(self, fresh: int = 0) -> Outcome:
        """What all batches gave, whoever did them; writes `failures.jsonl`.

        Args:
            fresh: images that were processed just now, for the outcome.

        Raises:
            IncompleteError: batches are missing; the shards they belong to are named.
            DataError: not a single image could be processed.
        """
        outcome = Outcome(fresh=fresh)
        digest, missing = hashlib.sha256(), []
        for index in range(len(self.batches)):
            record = self._records.read(index)
            if record is None:
                missing.append(index)
                continue
            outcome.failed.update(record["failed"])
            for relative, (_, sha256) in record["files"].items():
                digest.update(f"{relative}\n{sha256}\n".encode())
            for step, value in record["seconds"].items():
                outcome.seconds[step] = outcome.seconds.get(step, 0.0) + value
        if missing:
            raise IncompleteError(self._who_is_missing(missing))
        if self.ids and len(outcome.failed) == len(self.ids):
            first = next(iter(outcome.failed.items()))
            raise DataError(
                f"{self.title}: none of {len(self.ids)} images could be processed; first {first[0]}: {first[1]}"
            )
        digest.update(canonical_json(outcome.failed).encode())
        outcome.content = digest.hexdigest()
        whole = self.artefact.is_whole(self._spread.verify)
        outcome.changed = not whole or self.artefact.manifest.get("content") != outcome.content
        lines = [json.dumps({"id": i, "error": e}, ensure_ascii=False) + "\n" for i, e in outcome.failed.items()]
        failures = self.artefact.path / "failures.jsonl"
        text = "".join(lines).encode()
        if not failures.exists() or failures.read_bytes() != text:
            write_atomic(failures, text)
        return outcome

    def batches_done(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Load, process and write these batches: the body that every way of running shares.

        Images are loaded by threads ahead of the work, files are written by another behind it, both in order.

        Yields:
            Index and number of results of each batch when its record is on disk.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError: the run cannot go on.
        """
        workers = self._spread.workers or min(MAX_AUTO_WORKERS, os.cpu_count() or 1)
        loaders = ThreadPoolExecutor(workers, thread_name_prefix="load")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        loading: deque[list[Future[_Loaded[Item]]]] = deque()
        writing: deque[tuple[int, Future[int]]] = deque()
        broken = Event()
        begun = time.perf_counter()
        try:
            for position, index in enumerate(indices):
                if not position:
                    # The first image alone: what a data set reads once, it has read when the others start.
                    first = loaders.submit(self._load_one, self.batches[index][0])
                    first.result()
                    loading.append([first, *(loaders.submit(self._load_one, i) for i in self.batches[index][1:])])
                # The batch behind this one, and more where batches are smaller than the number of threads.
                while len(loading) < 2 or sum(map(len, loading)) < 2 * workers:
                    if position + len(loading) >= len(indices):
                        break
                    following = self.batches[indices[position + len(loading)]]
                    loading.append([loaders.submit(self._load_one, i) for i in following])
                found = [future.result() for future in loading.popleft()]
                start, spent = time.perf_counter(), model_seconds()
                record, results = self._worked(index, found)
                now = time.perf_counter()
                record["seconds"].update(work=now - start, model=model_seconds() - spent)
                while len(writing) >= _WRITES_WAITING or (writing and writing[0][1].done()):
                    yield self._written(writing)
                now = time.perf_counter()
                record["seconds"]["wall"], begun = now - begun, now
                writing.append((index, writer.submit(self._write, index, record, results, broken)))
            while writing:
                yield self._written(writing)
        finally:
            loaders.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)

    def _written(self, writing: deque[tuple[int, Future[int]]]) -> tuple[int, int]:
        index, future = writing.popleft()
        return index, future.result()

    def _write(self, index: int, record: Record, results: dict[str, Files], broken: Event) -> int:
        if broken.is_set():  # the batch before could not be written, and the loop is about to learn it
            return 0
        start = time.perf_counter()
        try:
            record["files"] = self._records.write(index, results)
            record["seconds"]["write"] = time.perf_counter() - start
            self._records.finish(index, record)
        except BaseException:
            broken.set()
            raise
        return len(results)

    def _load_one(self, image_id: str) -> _Loaded[Item]:
        start = time.perf_counter()
        # Taken before the files are read: a file that changes meanwhile is noticed by the next run.
        stamp = self._stamp(image_id)
        item, error = None, None
        try:
            item = self._loaded(image_id)
        except _FATAL:
            raise
        except Exception as caught:
            error = _describe(caught)
        return _Loaded(stamp, item, error, time.perf_counter() - start)

    def _loaded(self, image_id: str) -> Item:
        if image_id in self._left_out:
            raise DataError(f"left out: {self._left_out[image_id]}")
        return self._load(image_id)

    def _worked(self, index: int, found: list[_Loaded[Item]]) -> tuple[Record, dict[str, Files]]:
        ids = self.batches[index]
        pairs = list(zip(ids, found, strict=True))
        failed = {image_id: one.error for image_id, one in pairs if one.error is not None}
        loaded: dict[str, Any] = {image_id: one.item for image_id, one in pairs if one.error is None}
        with torch.inference_mode():
            results = self._process(loaded, failed)
        failed = {image_id: failed[image_id] for image_id in ids if image_id in failed}
        seconds = {"load": sum(one.seconds for one in found)}
        return {"ids": ids, "stamps": [one.stamp for one in found], "failed": failed, "seconds": seconds}, results

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

    def _is_open(self, index: int) -> bool:
        record = self._records.read(index)
        return record is None or self._worth_a_retry(record)

    def _worth_a_retry(self, record: Record) -> bool:
        """Whether an image that failed may succeed now: it can be loaded again, or it failed after loading."""
        for image_id in record["failed"]:
            try:
                self._loaded(image_id)
            except _FATAL:
                raise
            except Exception as error:
                if _describe(error) == record["failed"][image_id]:
                    continue
            return True
        return False

    def _who_is_missing(self, missing: Sequence[int]) -> str:
        count = self._spread.count
        shards = sorted({index % count for index in missing})
        images = sum(len(self.batches[index]) for index in missing)
        named = ", ".join(map(str, shards))
        return (
            f"{self.artefact.stage}: shard {self._spread.index} of {count} is done; {images} of {len(self.ids)} images "
            f"are missing, of shard{'s' if len(shards) > 1 else ''} {named}; when they are done, run any shard again, "
            f"or without runtime.shard -> {self.artefact.path}"
        )


def _describe(error: Exception) -> str:
    """One line: the message of our own errors, the type as well for others."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"
