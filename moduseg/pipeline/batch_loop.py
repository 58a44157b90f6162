"""The one loop over images: load, process, encode and write batches, each ahead of the next step.

How many images of a batch pass through a model at once is another number than the batch's (`moduseg.pipeline.forward`).
An image that cannot be processed is recorded in its batch and the loop goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Generic

import torch

from moduseg.allocator import trim_memory
from moduseg.clock import model_seconds
from moduseg.devices import count_workers
from moduseg.pipeline.batch_job import BatchJob, Item
from moduseg.pipeline.forward import FATAL, ForwardBatches, describe, is_device_lost, lost_device
from moduseg.pipeline.memory import read_peaks, restart_peaks
from moduseg.pipeline.records import Files, InputStamp, Record, Records, encode_files

_MAX_PENDING_WRITES = 2
"""Batches that may wait for encoding and writing before the loop waits for them: this bounds the memory."""


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


class BatchLoop(Generic[Item]):
    """Processes batches and writes their records.

    Args:
        job: what is done with the images.
        batches: the ids of each batch of the stage.
        records: receives files and records.
        workers: threads that load images; 0 takes one a core, 4 at most.
    """

    def __init__(self, job: BatchJob[Item], batches: Sequence[list[str]], records: Records, workers: int) -> None:
        self.job, self.batches, self._records, self._workers = job, batches, records, workers
        self._forward = ForwardBatches(job.title, job.max_forward)

    def process(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Load, process and write these batches: the loop body that every way of running shares.

        Threads load images ahead of `process`; after it, threads encode files and another one writes them in order.

        Yields:
            Index and number of results of each batch when its record is on disk.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError, DeviceError: the run cannot go on.
        """
        num_workers = count_workers(self._workers)
        loaders = ThreadPoolExecutor(num_workers, thread_name_prefix="load")
        encoders = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        writing: deque[tuple[int, Future[int]]] = deque()
        is_broken = Event()
        restart_peaks()
        batch_start, cpu_start = time.perf_counter(), time.process_time()
        try:
            for index, loaded in self._load_ahead(loaders, indices, num_workers):
                start, model_start = time.perf_counter(), model_seconds()
                record, results = self._process_batch(index, loaded)
                trim_memory()
                now = time.perf_counter()
                record["seconds"].update(work=now - start, model=model_seconds() - model_start)
                while len(writing) >= _MAX_PENDING_WRITES or (writing and writing[0][1].done()):
                    written, num_results = writing.popleft()
                    yield written, num_results.result()
                now = time.perf_counter()
                record["seconds"]["wall"], batch_start = now - batch_start, now
                now = time.process_time()
                record["seconds"]["cpu"], cpu_start = now - cpu_start, now
                record["memory"] = read_peaks()
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
            item = self.job.load_unless_skipped(image_id)
        except FATAL:
            raise
        except Exception as caught:
            error = describe(caught)
        return _Loaded(stamps, item, error, time.perf_counter() - start)

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
