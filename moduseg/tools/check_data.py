"""Whether a data set is what it should be: one table, and every problem in `problems.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moduseg import datasets
from moduseg.config import Config
from moduseg.datasets.base import Dataset, present_classes
from moduseg.datasets.io import label_png_kind, read_image
from moduseg.errors import DataError, LabelIdError
from moduseg.evaluation.tables import markdown_table
from moduseg.files import write_atomic
from moduseg.pipeline.workspace import log

_BROKEN = (
    "images missing", "images unreadable", "masks missing", "masks unreadable", "mask ids out of range",
    "masks of another size than their image", "object maps unusable", "training images without labels",
    "labels unusable",
)  # fmt: skip
_NOTES = (
    "masks not indexed with the VOC palette", "labels that disagree with the mask", "labels of no listed image",
    "classes without a training image", "images listed in both splits",
)  # fmt: skip
CHECKS = (*_BROKEN, *_NOTES)
"""Rows of the table after the number of images. The first are broken where they count anything, the others a note."""
_MASK_CHECKS = frozenset(name for name in CHECKS if "mask" in name or "object" in name)
_DISAGREE = "labels that disagree with the mask"
_AT_ONCE = 256
"""Images handed to the threads at a time, which bounds what waits in memory."""


@dataclass
class SplitReport:
    """What was found in one split.

    Attributes:
        split: its name.
        images: images listed.
        published: images of the published split, `None` where nobody says.
        counts: problems by check; a check that does not apply is left out.
        examples: the first image of each.
    """

    split: str
    images: int
    published: int | None
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def verdict(self, check: str) -> str:
        """`broken`, `note` or `ok`. Labels that disagree with most masks are broken: ids are shifted or mixed up."""
        count = self.counts.get(check, 0)
        if not count:
            return "ok"
        return "broken" if check in _BROKEN or (check == _DISAGREE and 2 * count > self.images) else "note"


@dataclass(frozen=True)
class Report:
    """The table, whether anything in it is broken, and the folder with the table and all problems."""

    table: str
    broken: bool
    path: Path


def main(cfg: Config) -> int:
    """Check both splits, print the table; 1 where something is broken, else 0."""
    report = run(cfg)
    print(report.table, end="")
    log.info("problems: %s", report.path / "problems.jsonl")
    return 1 if report.broken else 0


def run(cfg: Config) -> Report:
    """Read every image, mask and label of the training and the evaluated split.

    Raises:
        MissingError: a folder or list is absent.
        DataError: a list or label file cannot be read at all.
    """
    train, val = (datasets.build(cfg.dataset, str(cfg.dataset[key])) for key in ("train_split", "val_split"))
    splits = [train] if train.split == val.split else [train, val]
    reports, problems = [], []
    for dataset in splits:
        report = SplitReport(dataset.split, len(dataset.ids), dataset.published_size)
        found = list(_check_split(dataset, report, is_train=dataset is train))
        if dataset is val:
            both = sorted(set(train.ids) & set(val.ids))
            found += [("images listed in both splits", id, f"also in {train.split}") for id in both]
        if dataset is train and dataset.label_file is not None:
            listed = {key for part in splits for id in part.ids for key in part.label_names(id)}
            extra = [id for id in dataset.label_file.entries if id not in listed]
            found += [("labels of no listed image", id, dataset.label_file.where) for id in extra]
        for check, id, message in found:
            report.counts[check] = report.counts.get(check, 0) + 1
            report.examples.setdefault(check, id)
            problems.append({"split": dataset.split, "check": check, "id": id, "problem": message})
        reports.append(report)
    table = _table(train, reports)
    path = Path(cfg.runtime.outputs) / train.name / "check_data"
    write_atomic(path / "table.md", table.encode())
    write_atomic(path / "problems.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems).encode())
    return Report(table, any(r.verdict(check) == "broken" for r in reports for check in CHECKS), path)


def _check_split(dataset: Dataset, report: SplitReport, is_train: bool) -> Iterator[tuple[str, str, str]]:
    """Every problem of a split as `(check, image id or class, message)`, in the order of its list."""
    has_truth = dataset.has_truth
    applies = set(CHECKS) if has_truth else set(CHECKS) - _MASK_CHECKS
    if dataset.label_source == "masks":
        applies.discard(_DISAGREE)
    only_train = {"training images without labels", "classes without a training image", "labels of no listed image"}
    applies -= {"images listed in both splits"} if is_train else only_train
    report.counts = {check: 0 for check in CHECKS if check in applies}
    images_of = np.zeros(len(dataset.classes), dtype=np.int64)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(dataset), desc=f"check {dataset.split}", unit="img", leave=False) as progress,
    ):
        for start in range(0, len(dataset), _AT_ONCE):
            ids = dataset.ids[start : start + _AT_ONCE]
            for id, (labels, problems) in zip(ids, pool.map(lambda id: _check_image(dataset, id), ids), strict=True):
                images_of[list(labels or ())] += 1
                yield from ((check, id, message) for check, message in problems if check in applies)
                if is_train and labels is None and not any(check == "labels unusable" for check, _ in problems):
                    yield "training images without labels", id, f"no labels in {dataset.label_source}"
                progress.update()
    if is_train:
        for label in np.flatnonzero(images_of[1:] == 0) + 1:
            yield "classes without a training image", dataset.classes[label], f"class {label}"


def _check_image(dataset: Dataset, id: str) -> tuple[tuple[int, ...] | None, list[tuple[str, str]]]:
    """Image-level labels of one image, and its problems as `(check, message)`."""
    problems: list[tuple[str, str]] = []
    size = None
    try:
        path = dataset.image_path(id)
    except DataError as error:
        problems.append(("images missing", str(error)))
    else:
        try:
            size = read_image(path).shape[:2]
        except DataError as error:
            problems.append(("images unreadable", str(error)))
    semantic = _check_truth(dataset, id, size, problems)
    labels = None
    if dataset.label_source == "masks":
        labels = None if semantic is None else present_classes(semantic)
        if semantic is None and any(check.startswith("mask") for check, _ in problems):
            problems.append(("labels unusable", "its mask, which they are read from, cannot be used"))
        return labels, problems
    try:
        labels = dataset.labels_of(id)
    except DataError as error:
        problems.append(("labels unusable", str(error)))
    if labels is not None and semantic is not None and labels != present_classes(semantic):
        names = [[dataset.classes[i] for i in ids] for ids in (labels, present_classes(semantic))]
        problems.append((_DISAGREE, f"labels {names[0]}, mask {names[1]}"))
    return labels, problems


def _check_truth(
    dataset: Dataset, id: str, size: tuple[int, ...] | None, problems: list[tuple[str, str]]
) -> np.ndarray | None:
    """The ground truth of an image where it can be used; `size` is the image's, where it can be read."""
    semantic = None
    try:
        semantic = dataset.semantic_of(id)
    except LabelIdError as error:
        problems.append(("mask ids out of range", str(error)))
    except DataError as error:
        problems.append(("masks unreadable", str(error)))
    else:
        if semantic is None and not dataset.masks_optional:
            problems.append(("masks missing", f"no file {dataset.mask_path(id)}"))
    if semantic is not None and size not in (None, semantic.shape):
        problems.append(("masks of another size than their image", f"mask {semantic.shape}, image {size} (H, W)"))
    path = dataset.mask_path(id)
    try:
        if semantic is not None and path is not None and path.is_file() and label_png_kind(path) != "voc":
            problems.append(("masks not indexed with the VOC palette", f"{path}: {label_png_kind(path)}"))
        objects = dataset.instances_of(id)
    except DataError as error:
        problems.append(("object maps unusable", str(error)))
    else:
        if objects is not None and size not in (None, objects.shape):
            problems.append(("object maps unusable", f"objects {objects.shape}, image {size} (H, W)"))
    return semantic


def _table(train: Dataset, reports: list[SplitReport]) -> str:
    """The one table: a row for each check, a column for each split."""
    header = [f"{train.name}, labels: {train.label_source}", *(r.split for r in reports), "verdict", "first"]
    off = any(r.published not in (None, r.images) for r in reports)
    rows: list[list[str]] = [
        ["images", *(str(r.images) for r in reports), "ok", ""],
        ["images published", *(str(r.published or "-") for r in reports), "note" if off else "ok", ""],
    ]
    for check in CHECKS:
        verdicts = {r.verdict(check) for r in reports}
        verdict = next(v for v in ("broken", "note", "ok") if v in verdicts)
        first = next((r.examples[check] for r in reports if check in r.examples), "")
        rows.append([check, *(str(r.counts.get(check, "-")) for r in reports), verdict, first])
    return markdown_table(header, rows)
