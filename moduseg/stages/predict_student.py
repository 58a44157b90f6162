"""Stage `predict_student`: a trained student labels the evaluated split, and is scored like retrieval."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from moduseg import students
from moduseg.config import StudentConfig
from moduseg.datasets.io import write_grey_png, write_label_png
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.stage import Stage
from moduseg.report import build
from moduseg.stages.evaluate_masks import LabelOrigin, score_or_draw
from moduseg.stages.student_labels import LABEL_SOURCES, require_student
from moduseg.stages.train_student import TrainStudent
from moduseg.structures import Sample
from moduseg.students.base import Student, to_label_map
from moduseg.students.store import WEIGHTS, load_student


class PredictStudent(Stage[Sample]):
    """Labels the evaluated split with the student of the configuration, which is trained if it is not there.

    The folder holds `labels/<id>.png`, `scores/<id>.png` (how sure each pixel is), `failures.jsonl` and
    `manifest.json`; if the split has ground truth, also `results.json`, `results.md` and `panels/`.
    """

    name = "predict_student"
    uses = "eval"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `train_student`."""
        return {"train_student": TrainStudent(self.work)}

    @property
    def settings(self) -> StudentConfig:
        """The student of the configuration; errors as `require_student`."""
        return require_student(self.cfg)

    @cached_property
    def student(self) -> Student:
        """The trained student."""
        backbone = (lambda: self.work.backbone) if students.needs_backbone(self.settings.model) else None
        return load_student(self._folder.path, self.work.device, backbone)[0]

    @property
    def _folder(self) -> StageFolder:
        return self.input_folders["train_student"]

    @property
    def has_known_key(self) -> bool:
        """Whether the student is there, whose weights are part of the key."""
        return StageFolder(self._folder.path).is_complete

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"predict student {self.split}"

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self._folder.name.rpartition('-')[0]}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        return {
            "dataset": self.work.dataset_parts(self.split),
            "student": self._folder.name,
            "student_sha256": self._folder.manifest.get("student_sha256", ""),
            "scales": list(self.settings.scales),
            "mirror": self.settings.mirror,
            **self.work.device.key_parts(),
        }

    def load(self, image_id: str) -> Sample:
        """Return an image."""
        return self.dataset.load(image_id, labels=False)

    def process(self, items: list[Sample]) -> list[Files]:
        """Return the label maps of several images, and how sure they are."""
        files: list[Files] = []
        for item in items:
            # One image at a time: the probabilities of all classes at every pixel are large.
            settings = self.settings
            probabilities = self.student.compute_probabilities([item.image], settings.scales, mirror=settings.mirror)
            label_map, confidence = (
                tensor.cpu().numpy() for tensor in to_label_map(probabilities[0], self.student.outputs)
            )
            files.append(_encode(item.id, label_map, confidence))
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and of the student's tensors."""
        return [self.image_file(image_id), self._folder.path / WEIGHTS]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score the label maps and draw panels, unless that is done."""
        supervision = self._folder.manifest.get("supervision")
        origin = LabelOrigin(LABEL_SOURCES.get(self.settings.labels), supervision)
        score_or_draw(self.work, self.artefact, outcome, self.dataset, inputs=self.input_folders, origin=origin)
        return {"split": self.split, "config": self.cfg.as_dict(), **name_supervision(supervision)}

    def report(self, outcome: Outcome) -> None:
        """Write the report."""
        build.write_report_of_run(self.work, self.artefact.path, outcome.changed)


def _encode(image_id: str, label_map: np.ndarray, confidence: np.ndarray) -> Files:
    """Return the files of one image."""
    return {
        stored_name("label_map", image_id): partial(write_label_png, label_map),
        stored_name("confidence", image_id): partial(write_grey_png, confidence),
    }
