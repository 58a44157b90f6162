"""What a run would do: stages, images done and to do, downloads, disk, keys. No model runs, nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moduseg.config import Config
from moduseg.errors import DataError, MissingError, MissingWeightsError
from moduseg.pipeline.estimate import StageName
from moduseg.pipeline.manifests import StageFolder
from moduseg.weights.download import find_download_size, forbid_downloads

if TYPE_CHECKING:
    from moduseg.pipeline.stage import Stage

_NUM_SAMPLES = 8
"""Images whose sizes stand for all when bytes are estimated."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run that has not begun.

    Attributes:
        title: of the stage and its split.
        folder, key: where its result will be; `None` if that is known only later, as `note` says.
        note: why there is no key, or nothing to do.
        num_images, num_done: images of the split, and those that an earlier run processed.
        num_bytes: what it will write, estimated.
        name, cost: the stage's, by which its time is estimated; see `StageWork`.
    """

    title: str
    folder: Path | None = None
    key: str | None = None
    note: str = ""
    num_images: int = 0
    num_done: int = 0
    num_bytes: int = 0
    name: StageName = ("", "")
    cost: Hashable = None


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        stages: in the order in which they run.
        downloads: what is missing, by the key of the configuration that names it.
        problems: what ends the run before its first image.
        num_free_bytes: room on the disk of the artefacts.
    """

    stages: list[PlannedStage] = field(default_factory=list)
    downloads: dict[str, MissingWeightsError] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_free_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """What the run will write, estimated."""
        return sum(stage.num_bytes for stage in self.stages)


def plan_run(stage: Stage[Any], *, may_fetch: bool) -> Plan:
    """Plan a stage and those before it.

    Args:
        stage: the last one.
        may_fetch: whether weights are fetched and data sets drawn, so that what is missing is an error.

    Raises:
        MissingError: if `may_fetch`, a data set or weights are missing.
        ModusegError: a backend refuses its settings.
    """
    planner = _Planner(may_fetch)
    with nullcontext() if may_fetch else forbid_downloads():
        planner.visit(stage)
    outputs = stage.work.outputs.absolute()
    existing = next(folder for folder in (outputs, *outputs.parents) if folder.is_dir())
    planner.plan.num_free_bytes = shutil.disk_usage(existing).free
    return planner.plan


class _Planner:
    """Visits stages, each once, those before it first."""

    def __init__(self, may_fetch: bool) -> None:
        self._may_fetch = may_fetch
        self._visited: dict[StageName, PlannedStage] = {}
        self.plan = Plan()

    def visit(self, stage: Stage[Any]) -> PlannedStage:
        """Plan a stage after those that it reads."""
        result = stage.result_name
        if result not in self._visited:
            planned = self._plan_stage(stage)
            self._visited[result] = planned
            self.plan.stages.append(planned)
        return self._visited[result]

    def _plan_stage(self, stage: Stage[Any]) -> PlannedStage:
        title = stage.title if stage.split in stage.title else f"{stage.title} {stage.split}"
        if (existing := stage.existing_folder()) is not None:
            return PlannedStage(title, existing, note="is there")
        folders: dict[str, StageFolder] = {}
        unnamed = [self._visit_input(name, before, folders) for name, before in stage.inputs().items()]
        ids = self._list_images(stage)
        is_ready = self._find_weights(stage)
        folder, key, note = None, None, next(filter(None, unnamed), "")
        if not ids:
            note = note or "named when the data set is there"
        elif not is_ready:
            note = note or "named when the weights are there"
        elif not note:
            stage.input_folders = folders
            if stage.has_known_key:
                folder, key = stage.locate()
            else:
                note = "named by content that is made on the way"
            # The stage itself may run next; then it has to run those before it.
            del stage.input_folders
        num_done = 0 if folder is None else _count_done(folder)
        num_bytes = self._estimate_bytes(stage, ids) * (len(ids) - num_done)
        return PlannedStage(
            title, folder, key, note, len(ids), num_done, num_bytes, name=stage.result_name, cost=stage.cost()
        )

    def _visit_input(self, name: str, stage: Stage[Any], folders: dict[str, StageFolder]) -> str:
        """Plan a stage that another one reads, note its folder; return why it has none, or an empty text."""
        planned = self.visit(stage)
        if planned.folder is None:
            return f"named after {planned.title}"
        folders[name] = StageFolder(planned.folder)
        return ""

    def _list_images(self, stage: Stage[Any]) -> tuple[str, ...]:
        """Return the ids of the images to process; none if the data set is missing or has yet to be drawn."""
        if self._may_fetch:
            return tuple(stage.image_ids())
        try:
            return tuple(stage.image_ids()) if stage.dataset.is_written else ()
        except MissingError as error:
            if str(error) not in self.plan.problems:
                self.plan.problems.append(str(error))
            return ()

    def _find_weights(self, stage: Stage[Any]) -> bool:
        """Look for the weights of a stage; return whether they are here."""
        for key, model in stage.models().items():
            try:
                _ = model.digest
            except MissingWeightsError as error:
                if self._may_fetch:
                    raise
                self.plan.downloads[key] = error
            except MissingError as error:
                if self._may_fetch:
                    raise
                if str(error) not in self.plan.problems:
                    self.plan.problems.append(str(error))
                return False
        return not any(key in self.plan.downloads for key in stage.models())

    def _estimate_bytes(self, stage: Stage[Any], ids: tuple[str, ...]) -> int:
        """Return about how many bytes an image takes; images that cannot be read do not count."""
        sizes = []
        for image_id in ids[:: max(1, len(ids) // _NUM_SAMPLES)][:_NUM_SAMPLES]:
            try:
                sizes.append(stage.estimate_bytes(image_id))
            except DataError:
                continue
        return sum(sizes) // max(1, len(sizes))


def print_plan(stage_class: type[Stage[Any]], cfg: Config) -> int:
    """Print what a command would do, and return its exit code: 2 if something is missing that it cannot fetch."""
    from moduseg.pipeline.preflight import describe_device
    from moduseg.pipeline.workspace import Workspace

    work = Workspace(cfg)
    print(describe_device(work))
    plan = plan_run(stage_class(work), may_fetch=False)
    print("\n".join(describe_plan(plan, work.outputs)))
    return 2 if plan.problems else 0


def describe_plan(plan: Plan, outputs: Path) -> Iterator[str]:
    """Yield the lines that tell a person of a plan."""
    width = max(len(stage.title) for stage in plan.stages)
    for stage in plan.stages:
        where = f"{stage.folder} key {stage.key}" if stage.key else str(stage.folder or f"({stage.note})")
        num_left = stage.num_images - stage.num_done
        counts = f"{stage.num_done:6d} done {num_left:6d} to do {stage.num_bytes / 1e6:10.1f} MB"
        yield f"{stage.title:{width}} {counts}  -> {where}"
    for key, error in plan.downloads.items():
        address = next(iter(re.findall(r"https?://\S+", error.source)), error.source)
        size = error.find_size() if error.find_size else find_download_size(error.source)
        yield f"fetch {key}: {error.what}, {f'{size / 1e6:.0f} MB' if size else 'size unknown'}, {address}"
    yield (f"disk: about {plan.num_bytes / 1e9:.2f} GB to write, {plan.num_free_bytes / 1e9:.2f} GB free -> {outputs}")
    for problem in plan.problems:
        yield f"missing: {problem}"


def _count_done(folder: Path) -> int:
    """Return the number of images with a result in a folder, as its records say."""
    num_done = 0
    # A stage whose images have no records of their own is done as a whole.
    if not (folder / "batches").is_dir():
        finished = StageFolder(folder)
        return int(finished.manifest.get("images", 0)) if finished.is_complete else 0
    for file in (folder / "batches").glob("*.json"):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            num_done += len(record["ids"]) - len(record["failed"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return num_done
