"""The base class of the stages that process a data set image by image."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

from moduseg.allocator import look_at_all, trim_memory
from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.errors import ArtefactError, DataError
from moduseg.pipeline.artefacts import Artefact, locate_artefact
from moduseg.pipeline.batches import BatchJob, BatchRunner, Files, Item, Outcome
from moduseg.pipeline.estimate import StageName
from moduseg.pipeline.manifests import StageFolder, wall_seconds
from moduseg.pipeline.preflight import HasDigest, check_before_run
from moduseg.pipeline.workspace import FinishedStages, Workspace

log = logging.getLogger("moduseg")
_MAX_LISTED_FAILURES = 5
_RESERVED_FIELDS = frozenset(
    (
        "stage", "key", "parts", "products", "status", "images", "failed", "failures", "content", "seconds", "memory",
        "inputs",
    )
)  # fmt: skip
"""Fields of a manifest that the base class writes."""


class Stage(ABC, Generic[Item]):
    """One stage of the pipeline on one split of the data set.

    A subclass says what the stage needs, what decides its result and what is done with images. `run` is written here
    once, with everything around it: resume, failed images, shards, torchrun, Ray, the manifest. `process` needs neither
    a run nor files, so it can be called with items made by hand.

    Args:
        work: the configuration and the objects that it names.
        split: the split whose images are processed; the stage's own if omitted.
    """

    name: ClassVar[str]
    """Name of the stage, and of the folder below the data set's that holds its results."""
    uses: ClassVar[Literal["train", "eval"]]
    """The split that the stage processes: the one that the bank is built from, or the one that is labelled."""

    def __init__(self, work: Workspace, split: str | None = None) -> None:
        self.work, self.cfg, self._requested_split = work, work.cfg, split
        self.split = split or (work.train_split if self.uses == "train" else work.eval_split)

    # What a subclass says.

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return the stages that this one reads, by name; they run before it, and return at once when complete."""
        return {}

    def models(self) -> dict[str, HasDigest]:
        """Return the backends whose weights the stage needs, by the key of the configuration that names them."""
        return {}

    def estimate_bytes(self, image_id: str) -> int:
        """Return about how many bytes the stage writes for an image.

        Raises:
            DataError: the image cannot be read.
        """
        return 20_000

    @property
    def has_known_key(self) -> bool:
        """Whether `key` can be computed before the stages in `inputs` have run; it reads the names of their folders."""
        return True

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Return everything that decides the bytes of the result, as JSON values."""

    @abstractmethod
    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""

    @abstractmethod
    def load(self, image_id: str) -> Item:
        """Return what `process` needs of one image; called in several threads.

        Raises:
            DataError: the image cannot be used; the stage records that and goes on.
        """

    @abstractmethod
    def process(self, items: list[Item]) -> list[Files]:
        """Return the files of several loaded images, in their order; called in inference mode."""

    @abstractmethod
    def reads(self, image_id: str) -> list[Path]:
        """Return the files that an image's result is made from; if they change it is made again."""

    def image_ids(self) -> Sequence[str]:
        """Return the ids of the images to process, in the order of the data set."""
        return self.dataset.ids

    def skipped(self) -> dict[str, str]:
        """Return the images that an earlier stage could not process, with the reason; they are not loaded."""
        return skipped_images(self.input_folders)

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Make what needs all images, once they are processed, and return further fields of the manifest.

        It is called on every run, also when nothing is left to do, so it checks `outcome.changed` and its files. Of
        torchrun's ranks rank 0 calls it. Of the tasks of a job array (`runtime.shard`) every task that finds all shards
        finished calls it: with changed results one after the other, the later ones with `outcome.changed` false. All
        write the same bytes, each file to a temporary name (`moduseg.files.write_atomic`).

        What it writes beside the manifest or into `panels/` is checked on the next run; a file in another sub-folder is
        not. It starts no stage that is not complete, as the other ranks wait and have no share in it; what it reads
        belongs into `inputs`. Any error it raises ends the run on every rank.

        Args:
            outcome: what the images gave.

        Returns:
            Fields of the manifest, JSON values, none with a name that the base class writes (`images`, `seconds`, ...).
            They are written if images were processed, a file of the stage is missing or the number of failures changed;
            else the manifest stays as it is.
        """
        return {}

    def report(self, outcome: Outcome) -> None:
        """Write what reads the complete folder, such as pictures for people; nothing by default."""

    def existing_folder(self) -> Path | None:
        """Return a folder to use in place of running the stage; `None` to run it."""
        return None

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return self.name.replace("_", " ")

    @property
    def cache_name(self) -> str:
        """Name under which the workspace remembers the folder, beside the split."""
        return self.name

    def cost(self) -> Hashable:
        """Return what is equal for stages that take about the same time for an image: their models, else their name."""
        return tuple(id(model) for model in self.models().values()) or self.name

    # What is written once.

    @classmethod
    def run(cls, cfg: Config, work: Workspace | None = None, split: str | None = None) -> Path:
        """Run the stage and those before it, as far as they are not complete.

        Args:
            cfg: the configuration.
            work: the objects of `cfg`, shared with other stages; made here if omitted or of another configuration.
            split: the split whose images are processed; the stage's own if omitted.

        Returns:
            The folder of the complete result, or the one that `existing_folder` names.

        Raises:
            ModusegError: the stage cannot be completed, say because other shards have work left.
        """
        is_shared = work is not None and work.cfg is cfg
        stage = cls(work if work is not None and is_shared else Workspace(cfg), split)
        finished, result = stage.work.finished_stages, stage.result_name
        if result not in finished:
            folder = stage.existing_folder()
            if folder is None:
                check_before_run(stage)
                runner = stage.runner()
                share = partial(runner.run_shard, stage._ray_batches())
                task = f"{stage.name}-{stage.artefact.key}"
                folder = Path(stage.work.peers.run_then_merge(task, share, partial(stage._complete, runner)))
                stage.work.estimate.finish(result)
                # What a stage took is free for the next one, not kept beside what that takes.
                trim_memory()
            finished[result] = folder
        if not is_shared:
            # The models end with the run, which a program may outlive: they are garbage in a circle.
            look_at_all()
        return finished[result]

    def locate(self) -> tuple[Path, str]:
        """Return the folder that the stage writes and its key, without making it."""
        work = self.work
        return locate_artefact(work.outputs, work.dataset_name, self.name, self.folder_name(), self.key())

    @property
    def result_name(self) -> StageName:
        """Name and split under which the workspace remembers the folder."""
        return self.cache_name, self.split

    @property
    def dataset(self) -> Dataset:
        """The split whose images are processed."""
        return self.work.dataset(self.split)

    @cached_property
    def input_folders(self) -> dict[str, StageFolder]:
        """The folders of `inputs`, whose stages are run on first use."""
        stages = self.inputs()
        return {name: StageFolder(type(s).run(self.cfg, self.work, s._requested_split)) for name, s in stages.items()}

    @cached_property
    def artefact(self) -> Artefact:
        """The folder that the stage writes."""
        return self.work.artefact(self.name, self.folder_name(), self.key())

    def runner(self) -> BatchRunner[Item]:
        """Return what processes the images batch by batch; the stages before this one are run first."""
        job = BatchJob(
            self.image_ids(),
            self.load,
            self.process,
            self.cfg.runtime.record_size,
            title=self.title,
            skipped=self.skipped(),
            reads=self.reads,
            # On the CPU the last bits of a result may depend on which images share a pass, and runs are to agree.
            max_forward=None if self.work.device.torch_device.type == "cpu" else self.cfg.runtime.batch_size,
            estimate=self.work.estimate,
            name=self.result_name,
        )
        return BatchRunner(self.artefact, job, self.work.shard)

    def image_file(self, image_id: str) -> Path:
        """Return the image's file; a path that does not exist if the data set has none, so that `load` says why."""
        try:
            return self.dataset.image_path(image_id)
        except DataError:
            return self.dataset.root / image_id

    def _ray_batches(self) -> Callable[[list[int]], Iterator[tuple[int, int]]] | None:
        """Return what processes batches on the workers of Ray; `None` if the configuration names another engine."""
        runtime = self.cfg.runtime
        if runtime.engine != "ray" or self.work.has_own_splits:
            return None
        from moduseg.pipeline.ray_engine import RayWorkers, worker_config

        cfg, finished = worker_config(self.cfg, self.work.device), dict(self.work.finished_stages)
        rebuild = partial(rebuild_runner, type(self), cfg, finished, self._requested_split)
        return partial(RayWorkers(**vars(runtime.ray)).run, rebuild)

    def _complete(self, runner: BatchRunner[Item], processed_now: int) -> str:
        """Collect what the batches gave, complete the folder with it, and return the folder."""
        outcome = runner.collect(processed_now)
        if outcome.changed:
            with self.artefact.lock():
                # Another shard that found all batches done may have merged them in the meantime.
                outcome.changed = runner.needs_merge(outcome)
                self._write_products(outcome)
        else:
            self._write_products(outcome)
        return str(self.artefact.path)

    def _write_products(self, outcome: Outcome) -> None:
        """Merge, write the manifest and the report, and say what was done."""
        fields, folder, total = self.merge(outcome), self.artefact.path, len(self.image_ids())
        if reserved := sorted(_RESERVED_FIELDS & fields.keys()):
            raise ArtefactError(
                f"{type(self).__name__}.merge: got the fields {', '.join(reserved)}, expected none of those that every "
                "manifest has; choose other names"
            )
        failures = len(outcome.failed) + sum(f.num_failures for f in self.input_folders.values())
        stored = self.artefact.manifest
        if outcome.changed or not self.artefact.is_intact() or stored.get("failures") != failures:
            self.artefact.write_manifest(
                status="complete",
                images=total,
                failed=len(outcome.failed),
                failures=failures,
                content=outcome.content_digest,
                seconds={step: round(value, 3) for step, value in outcome.seconds.items()},
                memory=outcome.memory,
                inputs={name: str(folder.path) for name, folder in self.input_folders.items()},
                **fields,
            )
        log.info(
            "%s: %d images (%d now, %d done before), %d failed, %.1f s of work -> %s",
            self.name,
            total,
            outcome.processed_now,
            total - outcome.processed_now - len(outcome.failed),
            len(outcome.failed),
            wall_seconds(outcome.seconds),
            folder,
        )
        for image_id, error in list(outcome.failed.items())[:_MAX_LISTED_FAILURES]:
            log.warning("  not processed: %s: %s", image_id, error)
        if len(outcome.failed) > _MAX_LISTED_FAILURES:
            more = len(outcome.failed) - _MAX_LISTED_FAILURES
            log.warning("  and %d more, see %s", more, folder / "failures.jsonl")
        self.report(outcome)


def skipped_images(folders: Mapping[str, StageFolder]) -> dict[str, str]:
    """Return the images that one of the stages could not process, with its error.

    Args:
        folders: of the stages, by name; the last one to fail an image gives the error.
    """
    return {i: f"{name} failed: {e}" for name, folder in folders.items() for i, e in folder.failures.items()}


def rebuild_runner(
    stage: type[Stage[Any]], cfg: Config, finished_stages: FinishedStages, split: str | None
) -> BatchRunner[Any]:
    """Return the runner of a stage in another process, where the stages before it are known to be complete."""
    return stage(Workspace(cfg, finished_stages=finished_stages), split).runner()
