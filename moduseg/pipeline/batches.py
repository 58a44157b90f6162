"""The one loop over images: batches, resume, failures, progress, shards.

Batches are cut from the whole list of ids once, so that a batch holds the same images however the run was interrupted
or sharded. Their size is the unit of resume; how many images of a batch pass through a model at once is another number
(`moduseg.pipeline.forward`). `BatchRunner.process_batches` is the only loop body: a plain process, a rank of torchrun,
a task of a job array and a worker of Ray all call it with their own batches. An image that cannot be processed is
recorded in its batch and the loop goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Generic, TypeVar

import torch

from moduseg.clock import model_seconds
from moduseg.devices import count_workers
from moduseg.errors import DataError, IncompleteError
from moduseg.files import canonical_json, write_atomic
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.estimate import RunEstimate, StageName, TimeEstimate
from moduseg.pipeline.forward import FATAL, ForwardBatches, describe, is_device_lost, lost_device
from moduseg.pipeline.records import Files, InputStamp, Record, Records, encode_files, read_batch_size
from moduseg.progress import Progress

__all__ = ["BatchJob", "BatchRunner", "Files", "Outcome", "Shard"]

Item = TypeVar("Item")
_MAX_PENDING_WRITES = 2
"""Batches that may wait for encoding and writing before the loop waits for them: this bounds the memory."""


@dataclass(frozen=True)
class Shard:
    """Which part of a stage this process does, and how.

    Attributes:
        index, count: batch `i` is done by the shard whose index is `i % count`.
        workers: threads that load images; 0 takes one a core, 4 at most.
        verify: whether files of earlier runs and their inputs are compared with their digests.
        quiet: whether another process shows the progress.
        wait: seconds to wait for the other shards before the merge is given up.
    """

    index: int = 0
    count: int = 1
    workers: int = 0
    verify: bool = False
    quiet: bool = False
    wait: float = 0.0


@dataclass
class Outcome:
    """What the batches of a stage gave.

    Attributes:
        failed: error of each image that has no result, by id, in list order.
        processed_now: number of images processed by this call; the others were done before.
        changed: whether anything in the artefact differs from when it was last complete.
        seconds: by step, of all runs that made the artefact: `load` and `write` (which includes encoding) in their
            threads, `work` between them, `model` of it in forward passes, `wall` on the clock.
        content_digest: SHA-256 over all file digests and failures, independent of which run wrote them.
    """

    failed: dict[str, str] = field(default_factory=dict)
    processed_now: int = 0
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    content_digest: str = ""


def _no_inputs(image_id: str) -> list[Path]:
    return []


@dataclass(frozen=True)
class BatchJob(Generic[Item]):
    """What a stage does with its images.

    Attributes:
        ids: every image of the stage, in the order of the data set.
        load: id -> what `process` needs of it; may raise `DataError`. Runs in several threads, ahead of `process`.
        process: several loaded items -> the files of each, in order. Runs in inference mode.
        batch_size: images in a batch, the unit of resume. A folder that was begun keeps the size it was begun with.
        title: text of the progress bar.
        skipped: images that an earlier stage could not process, with its error.
        reads: id -> its input files; a batch whose inputs changed since it was made is done again.
        max_forward: images that `process` gets at once; all of a batch if `None`.
        estimate: how long the run takes that the stage is part of.
        name: of the stage in that run.
    """

    ids: Sequence[str]
    load: Callable[[str], Item]
    process: Callable[[list[Item]], list[Files]]
    batch_size: int
    title: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    reads: Callable[[str], list[Path]] = _no_inputs
    max_forward: int | None = None
    estimate: RunEstimate | None = None
    name: StageName = ("", "")


@dataclass(frozen=True)
class _Loaded(Generic[Item]):
    stamps: list[InputStamp]
    item: Item | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    files: dict[str, bytes]
    error: str | None
    seconds: float


class BatchRunner(Generic[Item]):
    """Processes the images of a stage batch by batch, each batch once.

    Args:
        artefact: receives the files.
        job: what is done with the images.
        shard: the part that is this process's; all of it if omitted.
    """

    def __init__(self, artefact: Artefact, job: BatchJob[Item], shard: Shard | None = None) -> None:
        self.artefact, self.job, self.shard = artefact, job, shard or Shard()
        self.ids = list(job.ids)
        size = read_batch_size(artefact, self.ids) or job.batch_size
        self.batches = [self.ids[i : i + size] for i in range(0, len(self.ids), size)]
        self._records = Records(artefact, self.batches, job.reads, self.shard.verify)
        self._valid_records: dict[int, Record] = {}
        self._forward = ForwardBatches(job.title, job.max_forward)

    def run(self) -> Outcome:
        """Process what is not done, and collect the results of all batches; errors as of `run_shard` and `collect`."""
        return self.collect(self.run_shard())

    def run_shard(self, run_batches: Callable[[list[int]], Iterator[tuple[int, int]]] | None = None) -> int:
        """Process the unfinished batches of this shard.

        Args:
            run_batches: takes batch indices and yields each with its number of results when it is done, in any order;
                `process_batches` if omitted.

        Returns:
            Images that have a result now and were processed by this call.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError, DeviceError: the run cannot go on.
        """
        of_shard = range(self.shard.index, len(self.batches), self.shard.count)
        unfinished = [index for index in of_shard if self._is_open(index)]
        if not unfinished:
            return 0
        for index in unfinished:
            self._valid_records.pop(index, None)
        num_images = sum(len(self.batches[i]) for i in of_shard)
        num_done = num_images - sum(len(self.batches[i]) for i in unfinished)
        processed_now = 0
        estimate = TimeEstimate(self.job.title, num_images - num_done, self.job.estimate, self.job.name)
        with Progress(num_images, self.job.title, num_done=num_done, is_quiet=self.shard.quiet) as progress:
            for index, num_results in (run_batches or self.process_batches)(unfinished):
                processed_now += num_results
                progress.update(len(self.batches[index]))
                estimate.update(len(self.batches[index]))
        return processed_now

    def unfinished(self, indices: Sequence[int]) -> list[int]:
        """Return those of the batches that have no valid record or an image that failed."""
        records = ((index, self._records.read(index)) for index in indices)
        return [index for index, record in records if record is None or record["failed"]]

    def collect(self, processed_now: int = 0) -> Outcome:
        """Return what all batches gave, whichever run did them, and write `failures.jsonl`.

        A shard waits up to `Shard.wait` seconds for the others; all could merge, with the same bytes, so the first
        shard does and the others wait until they find it done.

        Args:
            processed_now: images that were processed just now, for the outcome.

        Raises:
            IncompleteError: batches are missing; the shards they belong to are named.
            DataError: not a single image could be processed.
        """
        end = time.monotonic() + self.shard.wait
        pause = 0.05
        outcome: Outcome | None = None
        while True:
            is_over = time.monotonic() >= end
            missing = [] if outcome else list(islice(self._missing_batches(), None if is_over else 1))
            if missing and is_over:
                raise IncompleteError(self._describe_missing(missing))
            if not missing:
                outcome = outcome or self._summarise(processed_now)
                outcome.changed = self.needs_merge(outcome)
                if is_over or self.shard.index == 0 or not outcome.changed:
                    return outcome
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, 1.0)

    def needs_merge(self, outcome: Outcome) -> bool:
        """Return whether the artefact does not hold what the batches gave, or is damaged."""
        is_intact = self.artefact.is_intact(self.shard.verify)
        return not is_intact or self.artefact.manifest.get("content") != outcome.content_digest

    def _missing_batches(self) -> Iterator[int]:
        """Yield the batches without a valid record; a record that was found valid before is not read again."""
        return (index for index in range(len(self.batches)) if self._read(index) is None)

    def _read(self, index: int) -> Record | None:
        if index not in self._valid_records:
            record = self._records.read(index)
            if record is None:
                return None
            self._valid_records[index] = record
        return self._valid_records[index]

    def _summarise(self, processed_now: int) -> Outcome:
        """Return what all batches gave, whose records are valid, and write `failures.jsonl`."""
        outcome = Outcome(processed_now=processed_now)
        digest = hashlib.sha256()
        for _, record in sorted(self._valid_records.items()):
            outcome.failed.update(record["failed"])
            for relative, (_, sha256) in record["files"].items():
                digest.update(f"{relative}\n{sha256}\n".encode())
            for step, value in record["seconds"].items():
                outcome.seconds[step] = outcome.seconds.get(step, 0.0) + value
        if self.ids and len(outcome.failed) == len(self.ids):
            first_id, first_error = next(iter(outcome.failed.items()))
            raise DataError(
                f"{self.job.title}: none of {len(self.ids)} images could be processed; first {first_id}: {first_error}"
            )
        digest.update(canonical_json(outcome.failed).encode())
        outcome.content_digest = digest.hexdigest()
        # Write the list of failures, unless it is there.
        lines = [json.dumps({"id": i, "error": e}, ensure_ascii=False) + "\n" for i, e in outcome.failed.items()]
        failures = self.artefact.path / "failures.jsonl"
        text = "".join(lines).encode()
        if not failures.exists() or failures.read_bytes() != text:
            write_atomic(failures, text)
        return outcome

    def process_batches(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Load, process and write these batches: the loop body that every way of running shares.

        Threads load images ahead of `process`; after it, threads encode files and another one writes them in order.

        Yields:
            Index and number of results of each batch when its record is on disk.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError, DeviceError: the run cannot go on.
        """
        num_workers = count_workers(self.shard.workers)
        loaders = ThreadPoolExecutor(num_workers, thread_name_prefix="load")
        encoders = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        writing: deque[tuple[int, Future[int]]] = deque()
        is_broken = Event()
        batch_start = time.perf_counter()
        try:
            for index, loaded in self._load_ahead(loaders, indices, num_workers):
                start, model_start = time.perf_counter(), model_seconds()
                record, results = self._process_batch(index, loaded)
                now = time.perf_counter()
                record["seconds"].update(work=now - start, model=model_seconds() - model_start)
                while len(writing) >= _MAX_PENDING_WRITES or (writing and writing[0][1].done()):
                    written, num_results = writing.popleft()
                    yield written, num_results.result()
                now = time.perf_counter()
                record["seconds"]["wall"], batch_start = now - batch_start, now
                encoding = {image_id: encoders.submit(_encode, files) for image_id, files in results.items()}
                writing.append((index, writer.submit(self._write, index, record, encoding, is_broken)))
            for written, num_results in writing:
                yield written, num_results.result()
        finally:
            loaders.shutdown(cancel_futures=True)
            # Batches that wait to be written are finished work, also when the next one ends the run. The writer goes
            # first: the batch that it is at waits for its encoded files.
            writer.shutdown()
            encoders.shutdown(cancel_futures=True)

    def _load_ahead(
        self, loaders: ThreadPoolExecutor, indices: Sequence[int], num_workers: int
    ) -> Iterator[tuple[int, list[_Loaded[Item]]]]:
        """Yield each batch with its loaded images while the images of the next batches are being loaded."""
        loading: deque[list[Future[_Loaded[Item]]]] = deque()
        for position, index in enumerate(indices):
            if not position:
                # Load the first image on its own: the data set caches its lists and label files before other threads
                # start.
                first = loaders.submit(self._load_image, self.batches[index][0])
                first.result()
                loading.append([first, *(loaders.submit(self._load_image, i) for i in self.batches[index][1:])])
            # Load the next batch, and more of them if batches are smaller than the number of threads.
            while len(loading) < 2 or sum(map(len, loading)) < 2 * num_workers:
                if position + len(loading) >= len(indices):
                    break
                following = self.batches[indices[position + len(loading)]]
                loading.append([loaders.submit(self._load_image, i) for i in following])
            yield index, [future.result() for future in loading.popleft()]

    def _load_image(self, image_id: str) -> _Loaded[Item]:
        start = time.perf_counter()
        # Stamps are taken before the files are read, so that the next run notices a file that changes meanwhile.
        stamps = self._records.stamp_inputs(image_id)
        item, error = None, None
        try:
            item = self._load_unless_skipped(image_id)
        except FATAL:
            raise
        except Exception as caught:
            error = describe(caught)
        return _Loaded(stamps, item, error, time.perf_counter() - start)

    def _load_unless_skipped(self, image_id: str) -> Item:
        if image_id in self.job.skipped:
            raise DataError(f"left out: {self.job.skipped[image_id]}")
        return self.job.load(image_id)

    def _process_batch(self, index: int, loaded: list[_Loaded[Item]]) -> tuple[Record, dict[str, Files]]:
        """Return the record of a batch, without its files, and the files of each image that has a result."""
        ids = self.batches[index]
        failed = {image_id: image.error for image_id, image in zip(ids, loaded, strict=True) if image.error is not None}
        items: dict[str, Any] = {i: image.item for i, image in zip(ids, loaded, strict=True) if image.error is None}
        results: dict[str, Files] = {}
        with torch.inference_mode():
            for part in self._forward.cut(list(items)):
                with self._forward.catch():
                    results |= dict(zip(part, self.job.process([items[i] for i in part]), strict=True))
        failed.update(self._forward.failed)
        failed = {image_id: failed[image_id] for image_id in ids if image_id in failed}
        seconds = {"load": sum(image.seconds for image in loaded)}
        return {"ids": ids, "stamps": [image.stamps for image in loaded], "failed": failed, "seconds": seconds}, results

    def _write(self, index: int, record: Record, encoding: dict[str, Future[_Encoded]], is_broken: Event) -> int:
        """Write the files and the record of a batch; an image whose files cannot be encoded has failed."""
        if is_broken.is_set():  # an earlier batch could not be written, and the loop is about to raise its error
            return 0
        results: dict[str, dict[str, bytes]] = {}
        seconds, failed = 0.0, record["failed"]
        try:
            for image_id, future in encoding.items():
                encoded = future.result()
                seconds += encoded.seconds
                if encoded.error is None:
                    results[image_id] = encoded.files
                else:
                    failed[image_id] = encoded.error
            record["failed"] = {image_id: failed[image_id] for image_id in record["ids"] if image_id in failed}
            start = time.perf_counter()
            record["files"] = self._records.write(index, results)
            record["seconds"]["write"] = seconds + time.perf_counter() - start
            self._records.commit(index, record)
        except BaseException:
            is_broken.set()
            raise
        return len(results)

    def _is_open(self, index: int) -> bool:
        record = self._read(index)
        return record is None or self._is_worth_a_retry(record)

    def _is_worth_a_retry(self, record: Record) -> bool:
        """Return whether an image that failed may succeed now: it can be loaded again, or it failed after loading."""
        for image_id in record["failed"]:
            try:
                self._load_unless_skipped(image_id)
            except FATAL:
                raise
            except Exception as error:
                if describe(error) == record["failed"][image_id]:
                    continue
            return True
        return False

    def _describe_missing(self, missing: Sequence[int]) -> str:
        index, count = self.shard.index, self.shard.count
        shards = sorted({batch % count for batch in missing})
        num_images = sum(len(self.batches[batch]) for batch in missing)
        return (
            f"{self.artefact.stage}: shard {index} of {count} is done; {num_images} of {len(self.ids)} images "
            f"are missing, of shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}; when they are done, "
            f"run any shard again, or without runtime.shard -> {self.artefact.path}"
        )


def _encode(files: Files) -> _Encoded:
    """Encode the files of one image."""
    start, error = time.perf_counter(), None
    contents: dict[str, bytes] = {}
    try:
        contents = encode_files(files)
    except FATAL:
        raise
    except Exception as caught:
        if is_device_lost(caught):
            raise lost_device("files", caught) from caught
        error = describe(caught)
    return _Encoded(contents, error, time.perf_counter() - start)
