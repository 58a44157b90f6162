"""What the stages share: the rooms built from one configuration, and the bookkeeping around the loop."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from moduseg import backbones, datasets, proposers, pseudo_masks
from moduseg.backbones.base import Backbone
from moduseg.config import Config, RayConfig, ShardConfig
from moduseg.datasets.base import Dataset
from moduseg.datasets.labels import check_id
from moduseg.devices import Device, resolve_device
from moduseg.errors import ConfigError, DataError, IncompleteError
from moduseg.files import read_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Loop, Outcome, Spread
from moduseg.pipeline.peers import Peers
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.base import PseudoMaskGenerator

log = logging.getLogger("moduseg")
Done = dict[tuple[str, str], Path]
"""Stage and split -> the folder of its result."""


class Workspace:
    """One configuration and the objects it names, each built on first use and once.

    Args:
        cfg: the whole configuration.
        splits: splits that are at hand already, in place of those that the configuration describes.
        done: stages that are complete, for a worker that is given part of the next one.
    """

    def __init__(self, cfg: Config, splits: Mapping[str, Dataset] | None = None, done: Done | None = None) -> None:
        self.cfg = cfg
        self.done: Done = dict(done or {})
        self._datasets: dict[str, Dataset] = dict(splits or {})
        self._own_splits = bool(splits)
        shard = cfg.runtime.shard
        self.peers = Peers(shard.index, shard.count, alone=done is not None)
        torch.manual_seed(cfg.runtime.seed)

    def once(self, cfg: Config, stage: str, split: str, make: Callable[[], Path]) -> Path:
        """The folder of a stage's result, made on the first call; a stage that several others need is looked at once.

        Args:
            cfg: what it is made with; another configuration than the workspace's is not remembered.
            stage, split: which result.
            make: makes it.
        """
        if cfg is not self.cfg:
            return make()
        if (stage, split) not in self.done:
            self.done[stage, split] = make()
        return self.done[stage, split]

    @property
    def has_own_splits(self) -> bool:
        """Whether it was given splits, which another process would not have."""
        return self._own_splits

    @property
    def spread(self) -> Spread:
        """The part of each stage that is this process's."""
        runtime, peers = self.cfg.runtime, self.peers
        return Spread(peers.index, peers.count, runtime.workers, runtime.verify, not peers.leads)

    @cached_property
    def device(self) -> Device:
        """Where models and tensors live."""
        return resolve_device(self.cfg.runtime.device, self.cfg.runtime.precision)

    @property
    def outputs(self) -> Path:
        """Root of all artefacts."""
        return Path(self.cfg.runtime.outputs)

    @property
    def train_split(self) -> str:
        """The split that the bank is made of."""
        return str(self.cfg.dataset.get("train_split", "train"))

    @property
    def eval_split(self) -> str:
        """The split that is labelled."""
        return str(self.cfg.dataset.get("val_split", "val"))

    def dataset(self, split: str) -> Dataset:
        """The data set's split."""
        if split not in self._datasets:
            dataset = datasets.build(self.cfg.dataset, split)
            if self.peers.world > 1:  # some are drawn or unpacked when their ids are first read
                self.peers.first(f"dataset/{split}", lambda: dataset.ids)
            self._datasets[split] = dataset
        return self._datasets[split]

    @cached_property
    def proposer(self) -> Proposer:
        """The mask proposer."""
        return proposers.build(self.cfg.proposer, self.device)

    @cached_property
    def train_proposer(self) -> Proposer:
        """The mask proposer of the training images: the same, unless `train_proposer` says otherwise."""
        settings = self.cfg.train_proposer
        return self.proposer if settings is None else proposers.build(settings, self.device)

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of bank and queries."""
        return backbones.build(self.cfg.backbone, self.device)

    @cached_property
    def generator(self) -> PseudoMaskGenerator:
        """The pseudo-mask generator."""
        classes = self.dataset(self.train_split).classes
        return pseudo_masks.build(
            self.cfg.pseudo_masks.generator, device=self.device, backbone=lambda: self.backbone, classes=classes
        )

    def dataset_parts(self, split: str) -> dict[str, Any]:
        """What of the data set decides a result."""
        return {"split": split, "fingerprint": self.dataset(split).fingerprint()}

    def backbone_parts(self) -> dict[str, Any]:
        """What of the backbone decides a result: its configuration, its weights, and the precision it runs in."""
        return {"config": plain(self.cfg.backbone), "digest": self.backbone.digest, "precision": self.device.precision}

    def artefact(self, stage: str, name: str, parts: Mapping[str, Any]) -> Artefact:
        """The folder for a stage's result."""
        return Artefact(self.outputs, self.dataset(self.train_split).name, stage, name, parts)


@dataclass(frozen=True)
class Plan:
    """A stage's loop, ready to run, and the artefacts it reads, by stage."""

    loop: Loop[Any]
    inputs: dict[str, Path] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[str, str]:
        """The images that an earlier stage could not process, with its error."""
        return {i: e for stage, path in self.inputs.items() for i, e in failures_of(path, stage).items()}


def carry_out(work: Workspace, plan: Plan, module: str, merge: Callable[[Outcome], Path], *arguments: str) -> Path:
    """Do this process's share of a stage, and merge when all shares are done.

    Args:
        work: configuration and rooms.
        plan: what to do.
        module: the stage's module, whose `plan(cfg, work, *arguments)` gives the same plan in another process.
        merge: what follows the loop; gives the folder. With torchrun rank 0 calls it and the others wait.
        arguments: further ones of `plan`.

    Raises:
        IncompleteError: other shards of the job array have work left.
    """
    runtime, loop, run = work.cfg.runtime, plan.loop, None
    if runtime.engine == "ray" and not work.has_own_splits:
        from moduseg.pipeline.ray_engine import RayWorkers

        rebuild = partial(_rebuilt, module, _for_worker(work), dict(work.done), *arguments)
        run = partial(RayWorkers(**vars(runtime.ray)).run, rebuild)
    name = f"{loop.artefact.stage}-{loop.artefact.key}"
    return Path(
        work.peers.together(name, lambda: loop.own(run), lambda fresh: str(merge(_gathered(work, loop, fresh))))
    )


def _gathered(work: Workspace, loop: Loop[Any], fresh: int) -> Outcome:
    """What all shards gave; a task of a job array waits `runtime.shard.wait` seconds for the others and the merge."""
    end = time.monotonic() + work.cfg.runtime.shard.wait
    pause = 0.05
    while True:
        over = time.monotonic() >= end
        try:
            outcome = loop.gather(fresh)
            # All could merge, with the same bytes; the first one does, and the others find it done.
            if over or work.peers.index == 0 or not outcome.changed:
                return outcome
        except IncompleteError:
            if over:
                raise
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(2 * pause, 1.0)


def _rebuilt(module: str, cfg: Config, done: Done, *arguments: str) -> Loop[Any]:
    """The loop of a stage in a worker of Ray; see `carry_out`."""
    plan: Plan = importlib.import_module(module).plan(cfg, Workspace(cfg, done=done), *arguments)
    return plan.loop


def _for_worker(work: Workspace) -> Config:
    """The configuration of one worker: the driver's device and precision, nothing spread any further."""
    runtime, device = work.cfg.runtime, work.device
    kind = device.torch_device.type
    if kind != "cpu" and not runtime.ray.gpus:
        raise ConfigError(
            f"runtime.ray.gpus: got 0 with runtime.device={kind}, expected more than 0; set runtime.ray.gpus=1, or "
            "runtime.device=cpu"
        )
    alone = replace(
        runtime, engine="local", shard=ShardConfig(), ray=RayConfig(), device=kind, precision=device.precision
    )
    return replace(work.cfg, runtime=alone)


def plain(value: Any) -> Any:
    """Nested mappings and tuples as dicts and lists, for hashing and JSON."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def failures_of(path: Path, stage: str) -> dict[str, str]:
    """The images that an earlier stage could not process, with its error, for the next stage to leave out."""
    file = path / "failures.jsonl"
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {entry["id"]: f"{stage} failed: {entry['error']}" for entry in entries}


def finish(artefact: Artefact, outcome: Outcome, total: int, inputs: Mapping[str, Path], **fields: Any) -> Path:
    """Write the manifest, say what was done, return the folder.

    Args:
        artefact: the stage's folder.
        outcome: what the loop did.
        total: images of the stage.
        inputs: the artefacts it was made from, by stage.
        fields: more for the manifest.
    """
    failures = len(outcome.failed) + sum(count_failures(path) for path in inputs.values())
    seconds = {step: round(value, 3) for step, value in outcome.seconds.items()}
    if outcome.changed or not artefact.is_whole() or artefact.manifest.get("failures") != failures:
        artefact.write_manifest(
            status="complete",
            images=total,
            failed=len(outcome.failed),
            failures=failures,
            content=outcome.content,
            seconds=seconds,
            inputs={name: str(path) for name, path in inputs.items()},
            **fields,
        )
    spent = wall_seconds(outcome.seconds)
    log.info(
        "%s: %d images (%d now, %d done before), %d failed, %.1f s of work -> %s",
        artefact.stage,
        total,
        outcome.fresh,
        total - outcome.fresh - len(outcome.failed),
        len(outcome.failed),
        spent,
        artefact.path,
    )
    for image_id, error in list(outcome.failed.items())[:5]:
        log.warning("  not processed: %s: %s", image_id, error)
    if len(outcome.failed) > 5:
        log.warning("  and %d more, see %s", len(outcome.failed) - 5, artefact.path / "failures.jsonl")
    return artefact.path


def wall_seconds(seconds: Mapping[str, float]) -> float:
    """The time a stage took, of its seconds by step (of folders older than the clock, the sum of all)."""
    return seconds["wall"] if "wall" in seconds else sum(seconds.values())


def steps_of(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds by step of an artefact and of all that it was made from, each folder (`<stage>/<name>`) once."""
    waiting, seen = [path], set()
    while waiting:
        folder = waiting.pop(0)
        name = f"{folder.parent.name}/{folder.name}"
        if name in seen:
            continue
        seen.add(name)
        if not (folder / "manifest.json").is_file():
            continue  # a bank from elsewhere has no seconds to count
        manifest = read_json(folder / "manifest.json")
        yield name, dict(manifest.get("seconds", {}))
        waiting += [Path(p) for p in manifest.get("inputs", {}).values()]


def count_failures(path: Path) -> int:
    """Images without a result in an artefact and in those it was made from."""
    manifest = read_json(path / "manifest.json")
    return int(manifest.get("failures", 0))


def image_file(dataset: Dataset, image_id: str) -> Path:
    """The image, or a path that does not exist where the data set has none (the loop then records why)."""
    try:
        return dataset.image_path(image_id)
    except DataError:
        return dataset.root / image_id


def safe_name(image_id: str, suffix: str) -> str:
    """The file of an image inside an artefact; ids keep their sub-folders.

    Raises:
        DataError: the id names a place outside.
    """
    return f"{check_id(image_id, 'artefact')}{suffix}"
