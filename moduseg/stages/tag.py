"""Stage `tags`: images + words -> the classes that each image shows."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moduseg.datasets.base import Dataset
from moduseg.errors import DataError
from moduseg.evaluation.tags import TagQuality, score_tags
from moduseg.files import file_digest, to_json_values, write_atomic, write_json
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, encode_tags, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import log
from moduseg.structures import Sample, Tags

FILE, QUALITY = "tags.csv", "quality.json"
"""The tags of all images, as a label file; and how good they are, where the data set has tags of its own."""


class TagImages(Stage[Sample]):
    """Names the classes of the images of a split by the configuration's tagger.

    The folder holds `tags/<id>.json` (`labels`: ids, `scores`: of every class), `tags.csv` (a label file of all
    images), `quality.json` if the data set has tags to compare with, `failures.jsonl` and `manifest.json`.
    """

    name = "tags"
    uses = "eval"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"tags {self.split}"

    @property
    def dataset(self) -> Dataset:
        """The split, with the classes of the vocabulary."""
        return self.work.reworded_dataset(self.split)

    def models(self) -> dict[str, HasDigest]:
        """Return the tagger."""
        return {"tagger": self.work.tagger}

    def estimate_bytes(self, image_id: str) -> int:
        """Return the bytes of a score for each class."""
        return 12 * self.dataset.num_classes

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.work.tagger_settings['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the tags."""
        parts = {
            "dataset": self.work.dataset_parts(self.split),
            "tagger": to_json_values(self.work.tagger_settings),
            "digest": self.work.tagger.digest,
            **self.work.device.key_parts(),
        }
        if self.work.vocabulary is not None:
            parts["vocabulary"] = to_json_values(self.work.vocabulary.as_settings())
        return parts

    def load(self, image_id: str) -> Sample:
        """Return an image, with its labels if the tagger reads them."""
        return self.dataset.load(image_id, labels=self.work.tagger.needs_labels)

    def process(self, items: list[Sample]) -> list[Files]:
        """Return the tags of several images."""
        return [{stored_name("tags", item.id): partial(encode_tags, self.work.tagger.tag(item))} for item in items]

    def reads(self, image_id: str) -> list[Path]:
        """Return the image's file."""
        return [self.image_file(image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Write the tags of all images as one file, compare them with those of the data set, and return the split."""
        file = self.artefact.path / FILE
        if outcome.changed or not file.is_file():
            folder = StageFolder(self.artefact.path)
            tags = {i: folder.tags(i) for i in self.image_ids() if i not in outcome.failed}
            write_atomic(file, encode_label_csv(tags, self.dataset.classes))
            quality = _score(self.dataset, tags)
            if quality is not None:
                write_json(self.artefact.path / QUALITY, quality.as_dict())
                log.info("tags: %s", quality.describe())
        return {"split": self.split, "tags_sha256": file_digest(file)}


def encode_label_csv(tags: dict[str, Tags], classes: tuple[str, ...]) -> bytes:
    """Return tags as the bytes of a label file `image,labels` with names, those of one image separated by `;`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "labels"))
    writer.writerows((image_id, ";".join(classes[label] for label in t.class_ids)) for image_id, t in tags.items())
    return text.getvalue().encode()


def _score(dataset: Dataset, tags: dict[str, Tags]) -> TagQuality | None:
    """Compare tags with those of the data set, over the images that have some; `None` if none has."""
    rows: list[tuple[Tags, tuple[int, ...]]] = []
    for image_id, image_tags in tags.items():
        try:
            labels = dataset.labels_of(image_id)
        except DataError:  # the image counts for no quality; check_data says what is wrong with its labels
            continue
        if labels is not None:
            rows.append((image_tags, labels))
    if not rows:
        return None
    true, predicted = (torch.zeros(len(rows), dataset.num_classes, dtype=torch.bool) for _ in range(2))
    for row, (image_tags, labels) in enumerate(rows):
        predicted[row, [label - 1 for label in image_tags.class_ids]] = True
        true[row, [label - 1 for label in labels]] = True
    ranked = [image_tags.scores for image_tags, _ in rows if image_tags.scores is not None]
    return score_tags(true, predicted, torch.stack(ranked) if len(ranked) == len(rows) else None)
