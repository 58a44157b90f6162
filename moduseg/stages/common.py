"""What the stages share: the rooms built from one configuration, and the bookkeeping around the loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moduseg import backbones, datasets, proposers, pseudo_masks
from moduseg.backbones.base import Backbone
from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.errors import DataError
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.runtime.artefacts import Artefact, read_json
from moduseg.runtime.devices import Device, resolve_device
from moduseg.runtime.engine import Outcome

log = logging.getLogger("moduseg")


class Workspace:
    """One configuration and the objects it names, each built on first use and once.

    Args:
        cfg: the whole configuration.
        splits: splits that are at hand already, in place of those that the configuration describes.
    """

    def __init__(self, cfg: Config, splits: Mapping[str, Dataset] | None = None) -> None:
        self.cfg = cfg
        self._datasets: dict[str, Dataset] = dict(splits or {})
        torch.manual_seed(cfg.runtime.seed)

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
            self._datasets[split] = datasets.build(self.cfg.dataset, split)
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
    if outcome.changed or not artefact.is_complete or artefact.manifest.get("failures") != failures:
        artefact.write_manifest(
            status="complete",
            images=total,
            failed=len(outcome.failed),
            failures=failures,
            seconds=seconds,
            inputs={name: str(path) for name, path in inputs.items()},
            **fields,
        )
    spent = sum(outcome.seconds.values())
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
    """The file of an image inside an artefact; ids keep their sub-folders."""
    return f"{image_id}{suffix}"
