"""The plan of a stage's batches: which are left to do, and what all of them gave. Resume, failures, progress, shards.

Batches are cut from the whole list of ids once, so that a batch holds the same images however the run was interrupted
or sharded. Their size is the unit of resume. `BatchRunner.process_batches` (`moduseg.pipeline.batch_loop`) is the only
loop body: a plain process, a rank of torchrun, a task of a job array and a worker of Ray all call it with their own
batches.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic

from moduseg.errors import DataError, IncompleteError
from moduseg.files import canonical_json, write_atomic
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batch_job import BatchJob, Item, Outcome, Shard
from moduseg.pipeline.batch_loop import BatchLoop
from moduseg.pipeline.estimate import TimeEstimate
from moduseg.pipeline.forward import FATAL, describe
from moduseg.pipeline.memory import join_peaks
from moduseg.pipeline.records import Files, Record, Records, read_batch_size
from moduseg.progress import Progress

__all__ = ["BatchJob", "BatchRunner", "Files", "Item", "Outcome", "Shard"]


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
        self._loop = BatchLoop(job, self.batches, self._records, self.shard.workers)

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
            outcome.memory = join_peaks(outcome.memory, record.get("memory", {}))
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

        Yields:
            Index and number of results of each batch when its record is on disk.

        Raises:
            StorageError, ConfigError, MissingError, ArtefactError, DeviceError: the run cannot go on.
        """
        return self._loop.process(indices)

    def _is_open(self, index: int) -> bool:
        record = self._read(index)
        return record is None or self._is_worth_a_retry(record)

    def _is_worth_a_retry(self, record: Record) -> bool:
        """Return whether an image that failed may succeed now: it can be loaded again, or it failed after loading."""
        for image_id in record["failed"]:
            try:
                self.job.load_unless_skipped(image_id)
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
