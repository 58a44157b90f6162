"""Write what a data set needs once: COCO's masks as PNG, image-level labels as JSON, lists of ids.

The files lie below the root of the data set. Each is intact or absent, and one that is there is not written again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moduseg import datasets
from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.datasets.coco import MARKER, CocoDataset
from moduseg.datasets.context import ContextDataset
from moduseg.datasets.io import write_label_png
from moduseg.errors import ArtefactError, ConfigError, DataError, StorageError
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.workspace import log
from moduseg.progress import track

LABELS, LISTS = "image_labels", "lists"
"""Folders below the root of the data set, and values of `dataset.labels` and `dataset.list_dir` that name them."""
_Labels = dict[str, list[int] | None]
"""Class ids of each image; `None` if it has no label."""


def main(cfg: Config) -> int:
    """Prepare both splits of the configuration; 1 if images could not be read, else 0."""
    failed = run(cfg)
    log.info("use the labels with dataset.labels=%s", LABELS)
    return 1 if failed else 0


def run(cfg: Config) -> dict[str, str]:
    """Prepare the training and the evaluated split.

    Returns:
        The error of each image that could not be read, by id; the next run tries it again.

    Raises:
        StorageError: the data set's folder cannot be written to.
        ConfigError: the folder of masks holds masks of other settings, or masks that this command did not make.
    """
    failed: dict[str, str] = {}
    for split in dict.fromkeys((str(cfg.dataset["train_split"]), str(cfg.dataset["val_split"]))):
        dataset = datasets.build(cfg.dataset, split)
        split_failed = _write_masks(dataset) if isinstance(dataset, CocoDataset) else {}
        split_failed |= _convert_masks(dataset) if isinstance(dataset, ContextDataset) else {}
        split_failed |= _write_labels(dataset, skipped=split_failed)
        path = dataset.root / LISTS / f"{dataset.list_name}.txt"
        content = "".join(f"{image_id}\n" for image_id in dataset.ids).encode()
        if not path.is_file() or path.read_bytes() != content:
            _write(path, content)
        log.info("prepare_data: %s %s: %d images listed -> %s", dataset.name, split, len(dataset), path)
        for image_id, error in list(split_failed.items())[:5]:
            log.warning("  left out: %s: %s", image_id, error)
        if len(split_failed) > 5:
            log.warning("  and %d more; scripts/check_data.py names them all", len(split_failed) - 5)
        failed.update(split_failed)
    return failed


def _write_masks(dataset: CocoDataset) -> dict[str, str]:
    """Rasterise the masks that are not there; return the error of each image that failed."""
    folder = dataset.mask_folder
    if not dataset.check_marker():
        if any(folder.glob("*.png")):
            raise ConfigError(
                f"dataset.mask_dir: got '{folder}' with masks that this script did not make, which it leaves alone; "
                "use them as they are, or choose another dataset.mask_dir"
            )
        _write(folder / MARKER, json.dumps(dataset.made_from).encode())
    failed = {}
    absent = [image_id for image_id in dataset.ids if not (folder / f"{image_id}.png").is_file()]
    for image_id in track(absent, f"masks {dataset.list_name}"):
        try:
            _write(folder / f"{image_id}.png", write_label_png(dataset.rasterise(image_id)[0]))
        except DataError as error:
            failed[image_id] = str(error)
    log.info(
        "prepare_data: %s %s: %d masks written, %d were there, %d failed -> %s",
        dataset.name,
        dataset.split,
        len(absent) - len(failed),
        len(dataset) - len(absent),
        len(failed),
        folder,
    )
    return failed


def _convert_masks(dataset: ContextDataset) -> dict[str, str]:
    """Write the label maps of PASCAL Context that are not there; return the error of each image that failed."""
    failed, num_written = {}, 0
    # Label maps are written with their 0, whichever view of them is configured.
    for image_id in track(dataset.ids, f"masks {dataset.list_name}"):
        path = dataset.mask_path(image_id)
        if path is None or path.is_file():
            continue
        try:
            made = dataset.convert(image_id)
        except DataError as error:
            failed[image_id] = str(error)
            continue
        if made is None:
            failed[image_id] = f"{dataset.release_folder / image_id}.mat: no such file; fetch the release again"
            continue
        _write(path, write_label_png(made))
        num_written += 1
    log.info("prepare_data: %s %s: %d masks written, %d failed", dataset.name, dataset.split, num_written, len(failed))
    return failed


def _write_labels(dataset: Dataset, skipped: Collection[str]) -> dict[str, str]:
    """Write `image_labels/<split>.json`; return the error of each image whose labels could not be derived.

    Args:
        dataset: one split.
        skipped: images that failed before, whose labels are not derived.
    """
    path = dataset.root / LABELS / f"{dataset.list_name}.json"
    source, file = dataset.label_source, dataset.label_file
    if source == "none" or (file is not None and Path(file.where).resolve() == path.resolve()):
        log.info("prepare_data: %s %s: no labels to derive (%s)", dataset.name, dataset.split, source)
        return {}
    made_from = {"split": dataset.split, "fingerprint": dataset.fingerprint()}
    if _is_made_from(path, made_from):
        log.info("prepare_data: %s %s: labels were there -> %s", dataset.name, dataset.split, path)
        return {}
    journal = path.with_name(f".{path.stem}.jsonl")
    labels, failed = _derive_labels(dataset, journal, made_from, skipped)
    derived = [image_id for image_id in dataset.ids if labels.get(image_id) is not None]
    images = [{"img_id": image_id, "labels": labels[image_id]} for image_id in derived]
    record: dict[str, Any] = {"source": source, "images": images}
    # Without the record of what it was made from, the next run tries the images that failed again.
    if not failed and not any(image_id in skipped for image_id in dataset.ids):
        record["made_from"] = made_from
    try:
        write_json(path, record)
    except StorageError as error:
        raise _storage_error(path, error.__cause__) from error
    journal.unlink(missing_ok=True)
    log.info(
        "prepare_data: %s %s: labels of %d images from %s, %d failed -> %s",
        dataset.name,
        dataset.split,
        len(images),
        source,
        len(failed),
        path,
    )
    return failed


def _derive_labels(
    dataset: Dataset, journal: Path, made_from: dict[str, str], skipped: Collection[str]
) -> tuple[_Labels, dict[str, str]]:
    """Return the labels of every image, and the error of each that failed.

    Args:
        dataset: one split.
        journal: file that keeps the labels of a run that is killed, a line each, for the next one.
        made_from: what the labels are derived from; a journal of something else is not used.
        skipped: images that are not derived.
    """
    labels = _read_journal(journal, made_from)
    # The journal is written again, because a run that was killed may have left half a line at its end.
    _write(journal, "".join(json.dumps(line) + "\n" for line in (made_from, *labels.items())).encode())
    failed = {}
    try:
        with journal.open("a", encoding="utf-8") as lines:
            for image_id in track(dataset.ids, f"labels {dataset.list_name}"):
                if image_id in labels or image_id in skipped:
                    continue
                try:
                    ids = dataset.labels_of(image_id)
                except DataError as error:
                    failed[image_id] = str(error)
                    continue
                labels[image_id] = None if ids is None else list(ids)
                lines.write(json.dumps([image_id, labels[image_id]]) + "\n")
                lines.flush()
    except OSError as error:
        raise _storage_error(journal, error) from error
    return labels, failed


def _is_made_from(path: Path, made_from: dict[str, str]) -> bool:
    """Return whether the labels in a file were derived from these inputs."""
    try:
        return path.is_file() and bool(read_json(path).get("made_from") == made_from)
    except (ArtefactError, AttributeError):
        return False


def _read_journal(path: Path, made_from: dict[str, str]) -> _Labels:
    """Return the labels that a killed run of the same split derived, without the line that it died in."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return dict(json.loads(line) for line in lines[1:]) if json.loads(lines[0]) == made_from else {}
    except (ValueError, TypeError, IndexError):
        return {}


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except StorageError as error:
        raise _storage_error(path, error.__cause__) from error


def _storage_error(path: Path, cause: BaseException | None) -> StorageError:
    why = getattr(cause, "strerror", None) or cause
    return StorageError(
        f"{path}: cannot be written ({why}); prepare_data writes below dataset.root: free some space or change the "
        "permissions, and run again, what is finished is kept"
    )
