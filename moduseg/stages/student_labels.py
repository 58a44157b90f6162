"""Stage `student_labels`: the label maps that a student learns, from any source, with weights of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moduseg.config import Config, PseudoMasksConfig, StudentConfig
from moduseg.datasets.io import read_index_png, read_label_png, write_grey_png, write_label_png
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.files import digest_of, file_digest
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.stage import Stage
from moduseg.pseudo_masks.labels import add_background
from moduseg.stages.evaluate_masks import LabelOrigin, score_or_draw
from moduseg.stages.infer_training import InferTraining
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.structures import IGNORE_INDEX, ScoreMaps

LABEL_SOURCES = {"ground_truth": "pixel labels (ground truth)", "files": "label maps of a folder"}
"""What results call the labels that a student learns, where these are not made from the image-level labels."""


@dataclass(frozen=True)
class SourceLabels:
    """The label map of one image as its source has it.

    Attributes:
        id: of the image.
        label_map: `[H, W]` uint8, 255 ignore.
        confidence: `[H, W]` uint8, 255 fully sure; `None` without.
        tags: class ids that the image-level labels name; `None` if they decide nothing.
    """

    id: str
    label_map: np.ndarray
    confidence: np.ndarray | None = None
    tags: tuple[int, ...] | None = None


class StudentLabels(Stage[SourceLabels]):
    """Brings the label maps of the training images into one form, whatever they were made by.

    The folder holds `labels/<id>.png`, with `student.confidence` also `scores/<id>.png`, `failures.jsonl` and
    `manifest.json`; if the split has ground truth, also `results.json`, `results.md` and `panels/`.
    """

    name = "student_labels"
    uses = "train"

    @property
    def settings(self) -> StudentConfig:
        """The student of the configuration; errors as `require_student`."""
        return require_student(self.cfg)

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"student labels {self.split}"

    @property
    def _needs_confidence(self) -> bool:
        return self.settings.confidence or self.settings.min_confidence > 0

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return the stage that makes the label maps, if one of this run does."""
        if self.settings.labels == "pseudo_masks":
            return {"pseudo_masks": PseudoMasks(self.work, self._requested_split)}
        if self.settings.labels == "predictions":
            return {"infer_training": InferTraining(self.work, self._requested_split)}
        return {}

    @cached_property
    def _source(self) -> StageFolder | None:
        """The folder of the stage that made the label maps; `None` if they are truth or files."""
        return next(iter(self.input_folders.values()), None)

    @cached_property
    def _folder(self) -> Path:
        """The folder of `labels=files`.

        Raises:
            MissingError: there is none.
        """
        folder = Path(self.settings.folder or "").expanduser()
        if not folder.is_dir():
            raise MissingError(
                f"student.folder: got {self.settings.folder!r}, no such folder; set student.folder=<folder of <id>.png>"
            )
        return folder

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.settings.labels}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        settings = self.settings
        parts: dict[str, Any] = {
            "dataset": self.work.dataset_parts(self.split),
            "labels": settings.labels,
            "source": self._source.name if self._source is not None else "",
            "filter_tags": settings.filter_tags,
        }
        if settings.labels == "files":
            folders = [self._folder, *([self._confidence_folder] if self._needs_confidence else [])]
            parts["source"] = digest_of(
                [
                    [path.relative_to(folder).as_posix(), file_digest(path)]
                    for folder in folders
                    for path in sorted(folder.rglob("*.png"))
                ]
            )
        if self._needs_confidence:
            parts |= {"confidence": settings.confidence, "min_confidence": settings.min_confidence}
        return parts

    def load(self, image_id: str) -> SourceLabels:
        """Return an image's label map as its source has it."""
        confidence = None
        if self._source is None:
            # Nothing has read the image yet: one that is damaged is left out here, and does not end a training.
            height, width = self.dataset.load(image_id, labels=False).image.shape[:2]
            size = height, width
        else:
            size = self.dataset.image_size(image_id)
        if self._source is not None:
            label_map = self._source.label_map(image_id)
        elif self.settings.labels == "files":
            label_map = read_label_png(self._folder / f"{image_id}.png")
        else:
            truth = self.dataset.semantic_of(image_id)
            if truth is None:
                raise DataError(f"{image_id}: no ground truth, which student.labels=ground_truth learns from")
            label_map = truth
        if self._needs_confidence:
            confidence = self._read_confidence(image_id, label_map)
        for name, array in (("label map", label_map), ("confidence", confidence)):
            if array is not None and array.shape != size:
                raise DataError(f"{image_id}: {name} is {array.shape}, expected the image's {size}; make it again")
        highest = int(np.where(label_map == IGNORE_INDEX, 0, label_map).max())
        if highest > self.dataset.num_classes:
            raise DataError(
                f"{image_id}: label map has class id {highest}, expected 0..{self.dataset.num_classes} or 255; check "
                "the class list"
            )
        tags = self.dataset.labels_of(image_id) if self.settings.filter_tags else None
        return SourceLabels(image_id, label_map, confidence, tags)

    @property
    def _confidence_folder(self) -> Path:
        """Where `labels=files` has the confidence of its pixels: beside the label maps, as `infer` writes it."""
        return self._folder.parent / "scores"

    def _read_confidence(self, image_id: str, label_map: np.ndarray) -> np.ndarray:
        """Return `[H, W]` uint8, how sure the label of each pixel is."""
        if self.settings.labels == "ground_truth":
            return np.full(label_map.shape, 255, np.uint8)
        if self.settings.labels == "files":
            return _read_grey(self._confidence_folder / f"{image_id}.png")
        if self._source is None:
            raise ConfigError("student.labels: got a source without a folder")
        if self.settings.labels == "predictions":
            return _read_grey(self._source.file("confidence", image_id))
        scores = self._source.inputs["scores"].scores(image_id)
        return measure_label_share(scores, label_map, self.cfg.pseudo_masks)

    def process(self, items: list[SourceLabels]) -> list[Files]:
        """Return the label maps of several images, and the weights of their pixels if these are asked for."""
        files: list[Files] = []
        for item in items:
            label_map = select_learnt(item, self.settings.min_confidence)
            of_image = {stored_name("label_map", item.id): partial(write_label_png, label_map)}
            if self.settings.confidence and item.confidence is not None:
                of_image[stored_name("confidence", item.id)] = partial(write_grey_png, item.confidence)
            files.append(of_image)
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the image's file and that of its label map."""
        image = self.image_file(image_id)
        if self._source is not None:
            return [image, self._source.file("label_map", image_id)]
        if self.settings.labels == "files":
            return [image, self._folder / f"{image_id}.png"]
        truth = self.dataset.mask_path(image_id)
        return [image] if truth is None else [image, truth]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score the label maps or draw panels of them, and return the split and what they were made from."""
        supervision = None if self._source is None else self._source.manifest.get("supervision")
        origin = LabelOrigin(LABEL_SOURCES.get(self.settings.labels), supervision)
        score_or_draw(self.work, self.artefact, outcome, self.dataset, inputs=self.input_folders, origin=origin)
        return {"split": self.split, **name_supervision(supervision)}


def require_student(cfg: Config) -> StudentConfig:
    """Return the student of a configuration.

    Raises:
        ConfigError: it has none.
    """
    if cfg.student is None:
        raise ConfigError("student: got null, expected a student; pick a file, as student=linear")
    return cfg.student


def _read_grey(path: Path) -> np.ndarray:
    """Return `[H, W]` uint8 of a grey PNG of 8 bits."""
    return read_index_png(path).clip(0, 255).astype(np.uint8)


def select_learnt(item: SourceLabels, min_confidence: float) -> np.ndarray:
    """Return the label map with 255 where nothing is to be learnt.

    Args:
        item: the image's labels. Its background, 0, is named by no tag and is learnt from.
        min_confidence: pixels whose label is less sure become 255; in [0, 1].
    """
    label_map = item.label_map
    if item.tags is not None:
        is_named = np.zeros(256, bool)
        is_named[[0, *item.tags]] = True
        label_map = np.where(is_named[label_map], label_map, np.uint8(IGNORE_INDEX))
    if min_confidence and item.confidence is not None:
        label_map = np.where(item.confidence >= min_confidence * 255, label_map, np.uint8(IGNORE_INDEX))
    return label_map


def measure_label_share(scores: ScoreMaps, label_map: np.ndarray, settings: PseudoMasksConfig) -> np.ndarray:
    """Return how sure the label of each pixel of a pseudo mask is: its share of all scores of the pixel.

    Args:
        scores: of the classes, from which the pseudo mask was made.
        label_map: `[H, W]` uint8, the pseudo mask; what refined it may have given pixels another label than the scores.
        settings: the background's score.

    Returns:
        `[H, W]` uint8, 255 where only the label has a score; 0 where it has none, and where the label is 255.
    """
    rule = settings.background
    # With two thresholds the upper one decides what a class is.
    name = "constant" if rule.rule == "threshold" else rule.rule
    stacked = add_background(scores, name, rule.value).float().clamp(min=0)
    total = stacked.sum(0)
    labels = torch.from_numpy(label_map).to(stacked.device)
    chosen = torch.zeros_like(total)
    for channel, class_id in zip(stacked, (0, *scores.class_ids), strict=True):
        chosen = torch.where(labels == class_id, channel, chosen)
    share = torch.where(total > 0, chosen / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(total))
    return (share * 255).round().to(torch.uint8).cpu().numpy()
