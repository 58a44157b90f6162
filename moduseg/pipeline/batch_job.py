"""What a stage does with its images, batch by batch: the job, the part of one process, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from moduseg.errors import DataError
from moduseg.pipeline.estimate import RunEstimate, StageName
from moduseg.pipeline.memory import PeakMemory
from moduseg.pipeline.records import Files

Item = TypeVar("Item")


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
            threads, `work` between them, `model` of it in forward passes, `wall` on the clock, `cpu` in all threads of
            the process on the CPU, which other programs do not lengthen.
        memory: the most that a process held while it made the artefact; empty for one of an earlier version.
        content_digest: SHA-256 over all file digests and failures, independent of which run wrote them.
    """

    failed: dict[str, str] = field(default_factory=dict)
    processed_now: int = 0
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    memory: PeakMemory = field(default_factory=dict)
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

    def load_unless_skipped(self, image_id: str) -> Item:
        """Return what `process` needs of an image.

        Raises:
            DataError: an earlier stage could not process it.
        """
        if image_id in self.skipped:
            raise DataError(f"left out: {self.skipped[image_id]}")
        return self.load(image_id)
