"""Stage `train_student`: label maps of the training images -> a network that needs neither bank nor proposals."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moduseg import students
from moduseg.config import StudentConfig
from moduseg.config.construct import construct
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import read_index_png
from moduseg.errors import DataError, IncompleteError
from moduseg.files import file_digest, to_json_values
from moduseg.pipeline.batches import BatchJob, BatchRunner, Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision
from moduseg.pipeline.memory import PeakMemory, read_peaks, restart_peaks
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.stages.student_labels import StudentLabels, require_student
from moduseg.students.base import Batch, LabelledImage, Outputs, Student, Studied
from moduseg.students.store import WEIGHTS, StudentDescription, save_student
from moduseg.training.books import CHECKPOINT
from moduseg.training.data import BatchDraw
from moduseg.training.loop import Extras, TrainingResult, fit
from moduseg.training.options import TrainingOptions

_NUM_PREPARED = 64
"""Images that a student looks at before its training, evenly spaced over the split."""
_MAX_HELD_BYTES = 2_000_000_000
"""Decoded images, or their tokens, are kept in memory while they take less than this together."""

_PUT_ASIDE = f".{CHECKPOINT}"
"""Name of the checkpoint while the student is written: a manifest lists no hidden file."""

_FIELDS = ("split", "training", "parameters", "num_bytes", "student_sha256", "config", "supervision")
"""What the manifest says of the training."""


class TrainStudent(Stage[None]):
    """Trains a student on the label maps of the training images.

    The folder holds `student.safetensors`, `student.json`, the log and the curve of the training
    (`docs/training.md`), and `manifest.json`. A training that was interrupted goes on where its last checkpoint is;
    under torchrun all processes train together.
    """

    name = "train_student"
    uses = "train"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `student_labels`."""
        return {"student_labels": StudentLabels(self.work, self._requested_split)}

    def models(self) -> dict[str, HasDigest]:
        """Return what the training starts from."""
        if students.needs_backbone(self.settings.model):
            return {"backbone": self.work.backbone}
        return {"student.model": self.student}

    @property
    def settings(self) -> StudentConfig:
        """The student of the configuration; errors as `require_student`."""
        return require_student(self.cfg)

    @cached_property
    def options(self) -> TrainingOptions:
        """Settings of the training loop."""
        return construct(TrainingOptions, self.settings.training, "student.training")

    @cached_property
    def outputs(self) -> Outputs:
        """What the channels of the network stand for."""
        return Outputs(tuple(self.dataset.classes), self.dataset.has_background)

    @cached_property
    def student(self) -> Student:
        """The student before its training."""
        return students.build(self.settings.model, self.work.device, self.outputs, lambda: self.work.backbone)

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"train student {self.split}"

    def cost(self) -> Hashable:
        """Return the stage's name: no other takes as long."""
        return self.name

    @property
    def has_known_key(self) -> bool:
        """Whether the label maps are there, whose content is part of the key."""
        return StageFolder(self.input_folders["student_labels"].path).is_complete

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{_name_of(self.settings.model)}-{self.settings.labels}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the weights."""
        labels, settings = self.input_folders["student_labels"], self.settings
        sees_tokens = students.needs_backbone(settings.model)
        # Crops: 2 since label maps are resized about the centres of pixels, as images are.
        seen = {"backbone": self.work.backbone_parts()} if sees_tokens else {**self.work.device.key_parts(), "crops": 2}
        return {
            "dataset": self.work.dataset_parts(self.split),
            "labels": [labels.name, labels.manifest.get("content", "")],
            "model": to_json_values(settings.model),
            "digest": self.student.digest,
            "training": self.options.key_parts(),
            **seen,
        }

    def load(self, image_id: str) -> None:
        """Load nothing: a training goes through the images many times, in its own order."""

    def process(self, items: list[None]) -> list[Files]:
        """Return no files: none belongs to a single image."""
        return [{} for _ in items]

    def reads(self, image_id: str) -> list[Path]:
        """Return the files that an image's share in the training is made from."""
        return [self.image_file(image_id), self.input_folders["student_labels"].file("label_map", image_id)]

    def runner(self) -> BatchRunner[None]:
        """Return what trains, in place of what processes images."""
        return _TrainingRunner(self)

    def train(self) -> TrainingResult:
        """Train the student, or read it if that is done; in every process of torchrun."""
        labels = self.input_folders["student_labels"]
        ids = [image_id for image_id in self.dataset.ids if image_id not in labels.failures]
        data = StudentData(self.student, self.dataset, labels, ids, uses_weights=self.settings.confidence)
        prepared = sorted({int(i) for i in np.linspace(0, len(ids) - 1, min(_NUM_PREPARED, len(ids)))})
        self.student.prepare([data.read(index) for index in prepared])

        def compute_loss(network: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
            return {"loss": self.student.compute_loss(network, batch)}

        # An earlier process may have died before the manifest was there; of several ranks one finds the file.
        with suppress(FileNotFoundError):
            (self.artefact.path / _PUT_ASIDE).replace(self.artefact.path / CHECKPOINT)
        extras = Extras(identity=self.artefact.key, title=self.title, rate_factors=self.student.rate_factors)
        return fit(
            self.student.network,
            compute_loss,
            data,
            self.options,
            self.artefact.path,
            device=self.work.device,
            extras=extras,
        )

    def write(self) -> None:
        """Write the trained student."""
        settings = self.settings
        description = StudentDescription(
            model=to_json_values(settings.model),
            backbone=to_json_values(self.cfg.backbone) if students.needs_backbone(settings.model) else None,
            digest=self.student.digest,
            classes=self.outputs.classes,
            has_background=self.outputs.has_background,
        )
        save_student(self.artefact.path, self.student, description)

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Write the student, and return what was trained, for the manifest."""
        if not outcome.changed:
            manifest = self.artefact.manifest
            return {name: manifest[name] for name in _FIELDS if name in manifest}
        self.write()
        with suppress(FileNotFoundError):
            (self.artefact.path / CHECKPOINT).replace(self.artefact.path / _PUT_ASIDE)
        return {
            "split": self.split,
            "training": asdict(self.options),
            "parameters": dict(self.student.describe()),
            "num_bytes": (self.artefact.path / WEIGHTS).stat().st_size,
            "student_sha256": file_digest(self.artefact.path / WEIGHTS),
            "config": self.cfg.as_dict(),
            **name_supervision(self.input_folders["student_labels"].manifest.get("supervision")),
        }

    def report(self, outcome: Outcome) -> None:
        """Remove the checkpoint: the manifest vouches for the student's own file now."""
        (self.artefact.path / _PUT_ASIDE).unlink(missing_ok=True)


class _TrainingRunner(BatchRunner[None]):
    """Trains in place of processing images one by one.

    Args:
        stage: what is trained.
    """

    def __init__(self, stage: TrainStudent) -> None:
        job = BatchJob[None]((), stage.load, stage.process, 1, title=stage.title)
        super().__init__(stage.artefact, job, stage.work.shard)
        self._stage = stage
        self._seconds: dict[str, float] = {}
        self._memory: PeakMemory = {}

    def run_shard(self, run_batches: Any = None) -> int:
        """Train, unless the folder holds the finished student; return the number of images that took part now.

        Of a job array the first task trains: tasks share images, and the images of a training cannot be divided so.
        """
        if self.artefact.is_intact(self.shard.verify) or self._stage.cfg.runtime.shard.index:
            return 0
        restart_peaks()
        start, cpu_start = time.perf_counter(), time.process_time()
        result = self._stage.train()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        self._seconds = {"wall": max(result.seconds, wall), "work": result.seconds, "cpu": cpu}
        self._memory = read_peaks()
        # The numbers of all ranks are added up, and these had the same images.
        return len(self._stage.dataset.ids) if self._stage.work.peers.is_leader else 0

    def collect(self, processed_now: int = 0) -> Outcome:
        """Return that the folder is to be written, if a training ended just now.

        Raises:
            IncompleteError: this is a later task of a job array, and the first one has not trained yet.
        """
        is_done = self.artefact.is_intact(self.shard.verify)
        if not is_done and self._stage.cfg.runtime.shard.index:
            raise IncompleteError(
                f"{self.artefact.stage}: shard 0 trains alone and is not done; when it is, run any shard again -> "
                f"{self.artefact.path}"
            )
        outcome, manifest = super()._summarise(processed_now), self.artefact.manifest
        outcome.changed = not is_done
        outcome.seconds = self._seconds or dict(manifest.get("seconds", {}))
        outcome.memory = self._memory or dict(manifest.get("memory", {}))
        return outcome

    def needs_merge(self, outcome: Outcome) -> bool:
        """Return whether the student has yet to be written."""
        return not self.artefact.is_intact(self.shard.verify)


class StudentData:
    """The training images with their label maps, as a training goes through them.

    Args:
        student: makes examples of images.
        dataset: the training split.
        labels: the folder of `student_labels`.
        ids: of the images that take part.
        uses_weights: whether pixels count by their confidence.

    Raises:
        DataError: no image takes part.
    """

    def __init__(
        self, student: Student, dataset: Dataset, labels: StageFolder, ids: list[str], *, uses_weights: bool
    ) -> None:
        if not ids:
            raise DataError(f"{dataset.name} {dataset.split}: got no image with a label map, expected one or more")
        self._student, self._dataset, self._labels = student, dataset, labels
        self._ids, self._uses_weights = ids, uses_weights
        self._held: dict[int, Studied] = {}
        self._num_held_bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    def name_of(self, item: int) -> str:
        """Return the id of an image."""
        return self._ids[item]

    def load(self, draw: BatchDraw) -> Batch:
        """Return the examples of a step as one batch."""
        examples = [
            self._student.make_example(self._study(item), np.random.default_rng(seed))
            for item, seed in zip(draw.items, draw.seeds, strict=True)
        ]
        return self._student.collate(examples)

    def read(self, item: int) -> LabelledImage:
        """Return an image with its label map."""
        image_id = self._ids[item]
        image = self._dataset.load(image_id, labels=False).image
        weights = None
        if self._uses_weights:
            weights = read_index_png(self._labels.file("confidence", image_id)).astype(np.uint8)
        return LabelledImage(image, self._labels.label_map(image_id), weights)

    def _study(self, item: int) -> Studied:
        """Return what the student makes of an image, from memory if there was room for it."""
        if item in self._held:
            return self._held[item]
        studied = self._student.study(self.read(item))
        # Two threads may both read an image: the second one's is dropped.
        if self._num_held_bytes + studied.num_bytes <= _MAX_HELD_BYTES and item not in self._held:
            self._held[item] = studied
            self._num_held_bytes += studied.num_bytes
        return studied


def _name_of(model: Mapping[str, Any]) -> str:
    """Return what a folder calls a student."""
    return str(model.get("model") or "-".join(str(model[key]) for key in ("name", "size") if key in model))
