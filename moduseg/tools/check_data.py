"""Check that a data set is what it should be: one table, and every problem in `problems.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moduseg import datasets
from moduseg.config import Config
from moduseg.datasets.base import Dataset, present_classes
from moduseg.datasets.io import find_dark_range, label_png_kind, read_image, read_label_png
from moduseg.errors import DataError, LabelIdError
from moduseg.evaluation.tables import markdown_table
from moduseg.files import write_atomic
from moduseg.pipeline.workspace import log
from moduseg.progress import Progress

_BROKEN = (
    "images missing", "images unreadable", "masks missing", "masks unreadable", "mask ids out of range",
    "masks of another size than their image", "object maps unusable", "training images without labels",
    "labels unusable",
)  # fmt: skip
_NOTES = (
    "16-bit images that become dark",
    "masks not indexed with the VOC palette", "masks that differ from the other truth",
    "masks without a class", "masks of a single class", "labels that disagree with the mask",
    "labels of no listed image", "classes without a training image", "images listed in both splits",
)  # fmt: skip
CHECKS = (*_BROKEN, *_NOTES)
"""Rows of the table, where they apply to a split. A problem of the first kind means broken, of the others a note."""
_MASK_CHECKS = frozenset(name for name in CHECKS if "mask" in name or "object" in name)
_TRAIN_CHECKS = frozenset(
    ("training images without labels", "classes without a training image", "labels of no listed image")
)
_OTHER_TRUTH = "masks that differ from the other truth"
_NO_CLASS, _SINGLE_CLASS = "masks without a class", "masks of a single class"
_DISAGREE, _IN_BOTH = "labels that disagree with the mask", "images listed in both splits"
_VERDICTS = ("broken", "note", "ok")
"""What a row of the table says, in the order of the rows."""
_MAX_PRINTED = 5
"""Problems that are printed below the table at most."""
_BATCH_SIZE = 256
"""Images handed to the threads at a time, which bounds what waits in memory."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        check: one of `CHECKS`.
        id: the image, or the name of a class.
        message: what is wrong with it.
    """

    check: str
    id: str
    message: str


@dataclass(frozen=True)
class CheckedImage:
    """What was found in one image.

    Attributes:
        labels: its image-level labels, `None` if it has none.
        has_mask: whether it has ground truth that can be read.
        problems: what is wrong with it.
    """

    labels: tuple[int, ...] | None
    has_mask: bool
    problems: list[Problem]


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split.

    Attributes:
        split: its name.
        num_images: images listed.
        num_published: images of the published split, `None` if the data set does not say.
        num_masks: images whose ground truth can be read.
        checks: the checks that apply to it.
        problems: in the order in which they were found.
    """

    split: str
    num_images: int
    num_published: int | None
    num_masks: int
    checks: frozenset[str]
    problems: list[Problem]

    def count(self, check: str) -> int | None:
        """Return the number of problems of a check; `None` if the check does not apply."""
        num_problems = sum(problem.check == check for problem in self.problems)
        return num_problems if num_problems or check in self.checks else None

    def verdict(self, check: str) -> str:
        """Return `broken`, `note` or `ok`.

        Broken are also labels that disagree with most masks, which are shifted or mixed up, and masks of which none has
        a class or all have the same value everywhere, which are no label maps of this data set.
        """
        num_problems = self.count(check)
        if not num_problems:
            return "ok"
        is_broken = check in _BROKEN or (check == _DISAGREE and 2 * num_problems > self.num_images)
        is_broken |= check in (_NO_CLASS, _SINGLE_CLASS) and num_problems == self.num_masks > 1
        return "broken" if is_broken else "note"


@dataclass(frozen=True)
class Report:
    """What was found in a data set.

    Attributes:
        table: Markdown, a row for each check that applies, problems first.
        is_broken: whether anything is broken.
        path: the folder with the table and all problems.
        first_problems: the first five that break it; what both splits have is one.
    """

    table: str
    is_broken: bool
    path: Path
    first_problems: Sequence[Problem]


def main(cfg: Config) -> int:
    """Check both splits and print the table; 1 if something is broken, else 0."""
    report = run(cfg)
    print(report.table, end="")
    for problem in report.first_problems:
        # Most messages begin with a file's path; those that do not are told apart by the image.
        where = "" if problem.id in problem.message else f"{problem.id}: "
        log.warning("%s: %s%s", problem.check, where, problem.message)
    log.info("problems: %s", report.path / "problems.jsonl")
    return 1 if report.is_broken else 0


def run(cfg: Config) -> Report:
    """Read every image, mask and label of the training and the evaluated split.

    Raises:
        MissingError: a folder or list is absent.
        DataError: a list or label file cannot be read at all.
    """
    train, val = (datasets.build(cfg.dataset, str(cfg.dataset[key])) for key in ("train_split", "val_split"))
    splits = [train] if train.split == val.split else [train, val]
    reports = []
    for dataset in splits:
        is_train = dataset is train
        checks = _find_checks(dataset, is_train)
        problems, num_masks = _check_images(dataset, checks, is_train)
        if dataset is val:
            problems += [Problem(_IN_BOTH, i, f"also in {train.split}") for i in sorted(set(train.ids) & set(val.ids))]
        if is_train and dataset.label_file is not None:
            listed = {key for part in splits for image_id in part.ids for key in part.label_names(image_id)}
            unlisted = [name for name in dataset.label_file.entries if name not in listed]
            problems += [Problem("labels of no listed image", name, dataset.label_file.where) for name in unlisted]
        num_images = len(dataset.ids)
        reports.append(SplitReport(dataset.split, num_images, dataset.published_size, num_masks, checks, problems))
    table = _make_table(train, reports)
    path = Path(cfg.runtime.outputs) / train.name / "check_data"
    write_atomic(path / "table.md", table.encode())
    records = [
        {"split": report.split, "check": problem.check, "id": problem.id, "problem": problem.message}
        for report in reports
        for problem in report.problems
    ]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomic(path / "problems.jsonl", "".join(lines).encode())
    broken = [problem for r in reports for problem in r.problems if r.verdict(problem.check) == "broken"]
    return Report(table, bool(broken), path, list(dict.fromkeys(broken))[:_MAX_PRINTED])


def _find_checks(dataset: Dataset, is_train: bool) -> frozenset[str]:
    """Return the checks that apply to a split."""
    checks = set(CHECKS) if dataset.has_truth else set(CHECKS) - _MASK_CHECKS
    if dataset.label_source == "masks":
        checks.discard(_DISAGREE)
    return frozenset(checks - ({_IN_BOTH} if is_train else _TRAIN_CHECKS))


def _check_images(dataset: Dataset, checks: Collection[str], is_train: bool) -> tuple[list[Problem], int]:
    """Return the problems of every image of a split, in the order of its list, then those of its classes.

    The second result is the number of images whose ground truth can be read.
    """
    problems = []
    num_masks = 0
    num_images_of = np.zeros(len(dataset.classes), dtype=np.int64)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress(len(dataset), f"check {dataset.split}") as progress,
    ):
        for start in range(0, len(dataset), _BATCH_SIZE):
            ids = dataset.ids[start : start + _BATCH_SIZE]
            results = pool.map(partial(_check_image, dataset), ids)
            for image_id, checked in zip(ids, results, strict=True):
                num_masks += checked.has_mask
                num_images_of[list(checked.labels or ())] += 1
                problems += [problem for problem in checked.problems if problem.check in checks]
                is_unusable = any(problem.check == "labels unusable" for problem in checked.problems)
                if is_train and checked.labels is None and not is_unusable:
                    message = f"no labels in {dataset.label_source}"
                    problems.append(Problem("training images without labels", image_id, message))
                progress.update()
    if is_train:
        for label in np.flatnonzero(num_images_of[1:] == 0) + 1:
            problems.append(Problem("classes without a training image", dataset.classes[label], f"class {label}"))
    return problems, num_masks


def _check_image(dataset: Dataset, image_id: str) -> CheckedImage:
    """Read one image, its labels and its ground truth, and return what is wrong with them."""
    problems = []
    size = None
    try:
        path = dataset.image_path(image_id)
    except DataError as error:
        problems.append(Problem("images missing", image_id, str(error)))
    else:
        try:
            size = dataset.prepare_image(read_image(path, dataset.image_range)).shape[:2]
            if dataset.image_range is None and (values := find_dark_range(path)) is not None:
                message = f"{path}: its values are {values[0]} to {values[1]}, expected some near 65535"
                problems.append(Problem("16-bit images that become dark", image_id, f"{message}; set image_range"))
        except DataError as error:
            problems.append(Problem("images unreadable", image_id, str(error)))
    semantic, mask_problems = _check_truth(dataset, image_id, size)
    problems += mask_problems
    labels = None
    if dataset.label_source == "masks":
        labels = None if semantic is None else present_classes(semantic)
        if semantic is None and any(problem.check.startswith("mask") for problem in problems):
            message = "its mask, which they are read from, cannot be used"
            problems.append(Problem("labels unusable", image_id, message))
        return CheckedImage(labels, semantic is not None, problems)
    try:
        labels = dataset.labels_of(image_id)
    except DataError as error:
        problems.append(Problem("labels unusable", image_id, str(error)))
    if labels is not None and semantic is not None and labels != present_classes(semantic):
        names = [[dataset.classes[i] for i in ids] for ids in (labels, present_classes(semantic))]
        problems.append(Problem(_DISAGREE, image_id, f"labels {names[0]}, mask {names[1]}"))
    return CheckedImage(labels, semantic is not None, problems)


def _check_truth(
    dataset: Dataset, image_id: str, size: tuple[int, ...] | None
) -> tuple[np.ndarray | None, list[Problem]]:
    """Check the ground truth of an image.

    Args:
        dataset: its data set.
        image_id: the image.
        size: `(height, width)` of the image, `None` if it cannot be read.

    Returns:
        The label map, `None` if it cannot be used, and the problems.
    """
    problems = []
    semantic = None
    try:
        semantic = dataset.semantic_of(image_id)
    except LabelIdError as error:
        problems.append(Problem("mask ids out of range", image_id, str(error)))
    except DataError as error:
        problems.append(Problem("masks unreadable", image_id, str(error)))
    else:
        if semantic is None and not dataset.masks_optional:
            problems.append(Problem("masks missing", image_id, f"no file {dataset.mask_path(image_id)}"))
    if semantic is not None and size not in (None, semantic.shape):
        message = f"mask {semantic.shape}, image {size} (H, W)"
        problems.append(Problem("masks of another size than their image", image_id, message))
    if semantic is not None:
        problems += _check_values(dataset, image_id, semantic)
    path = dataset.mask_path(image_id)
    try:
        if semantic is not None and path is not None and path.is_file() and label_png_kind(path) != "voc":
            message = f"{path}: {label_png_kind(path)}"
            problems.append(Problem("masks not indexed with the VOC palette", image_id, message))
        if semantic is not None and (problem := _compare_truths(dataset, image_id, semantic)) is not None:
            problems.append(problem)
        objects = dataset.instances_of(image_id)
    except DataError as error:
        problems.append(Problem("object maps unusable", image_id, str(error)))
    else:
        if objects is not None and size not in (None, objects.shape):
            problems.append(Problem("object maps unusable", image_id, f"objects {objects.shape}, image {size} (H, W)"))
    return semantic, problems


def _check_values(dataset: Dataset, image_id: str, semantic: np.ndarray) -> list[Problem]:
    """Return a note if a label map holds no class, or nothing but one class.

    Binary masks look so: 255, which they have on the object, means ignored here.
    """
    values = np.flatnonzero(np.bincount(semantic.ravel(), minlength=256)).tolist()
    if not present_classes(semantic):
        message = f"its values are {values}, expected ids 1..{dataset.num_classes} where objects are"
        return [Problem(_NO_CLASS, image_id, f"{message} (0 is background, 255 ignored)")]
    if len(values) == 1:
        return [Problem(_SINGLE_CLASS, image_id, f"every pixel is {values[0]} ({dataset.classes[values[0]]})")]
    return []


def _compare_truths(dataset: Dataset, image_id: str, semantic: np.ndarray) -> Problem | None:
    """Return a note if a second published ground truth lies beside the one in use and differs from it."""
    path = dataset.other_mask_path(image_id)
    if path is None or not path.is_file():
        return None
    other = read_label_png(path)
    if other.shape != semantic.shape:
        return Problem(_OTHER_TRUTH, image_id, f"mask {semantic.shape}, {path} {other.shape} (H, W)")
    num_pixels = int((other != semantic).sum())
    if not num_pixels:
        return None
    return Problem(_OTHER_TRUTH, image_id, f"{num_pixels} of {semantic.size} pixels differ from {path}")


def _make_table(train: Dataset, reports: Sequence[SplitReport]) -> str:
    """Return the table: the number of images, then a row for each check that applies to a split, problems first."""
    header = [f"{train.name}, labels: {train.label_source}", *(r.split for r in reports), "verdict", "first"]
    rows: list[list[str]] = []
    if any(r.num_published is not None for r in reports):
        is_off = any(r.num_published not in (None, r.num_images) for r in reports)
        published = (_write_count(r.num_published) for r in reports)
        rows.append(["images published", *published, "note" if is_off else "ok", ""])
    for check in CHECKS:
        counts = [report.count(check) for report in reports]
        if all(count is None for count in counts):
            continue
        verdicts = {report.verdict(check) for report in reports}
        verdict = next(v for v in _VERDICTS if v in verdicts)
        first = next((p.id for report in reports for p in report.problems if p.check == check), "")
        rows.append([check, *map(_write_count, counts), verdict, first])
    rows.sort(key=lambda row: _VERDICTS.index(row[-2]))
    return markdown_table(header, [["images", *(str(r.num_images) for r in reports), "ok", ""], *rows])


def _write_count(count: int | None) -> str:
    """Return a number as the table shows it; `-` where the row does not apply to the split."""
    return "-" if count is None else str(count)
