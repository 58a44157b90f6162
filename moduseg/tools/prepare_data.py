"""What a data set needs once: COCO's masks as PNG, image-level labels as JSON, lists of ids.

Written below the root of the data set, each file whole or not at all; what is there already is not done again.
"""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from moduseg import datasets
from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.datasets.coco import MARKER, CocoDataset
from moduseg.datasets.io import write_label_png
from moduseg.errors import ArtefactError, ConfigError, DataError, StorageError
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.workspace import log

LABELS, LISTS = "image_labels", "lists"
"""Folders below the root of the data set; `dataset.labels` and `dataset.list_dir` take these names."""


def main(cfg: Config) -> int:
    """Prepare both splits of the configuration; 1 where images were left out, else 0."""
    failed = run(cfg)
    log.info("use the labels with dataset.labels=%s", LABELS)
    return 1 if failed else 0


def run(cfg: Config) -> dict[str, str]:
    """Prepare the training and the evaluated split.

    Returns:
        The error of each image that could not be read, by id; the next run tries it again.

    Raises:
        StorageError: the data set's folder cannot be written to.
        ConfigError: the folder of masks holds masks of other settings, or of somebody else.
    """
    failed: dict[str, str] = {}
    for split in dict.fromkeys((str(cfg.dataset["train_split"]), str(cfg.dataset["val_split"]))):
        dataset = datasets.build(cfg.dataset, split)
        wrong: dict[str, str] = {}
        if isinstance(dataset, CocoDataset):
            _write_masks(dataset, wrong)
        _write_labels(dataset, wrong)
        path = dataset.root / LISTS / f"{dataset.list_name}.txt"
        content = "".join(f"{id}\n" for id in dataset.ids).encode()
        if not path.is_file() or path.read_bytes() != content:
            _write(path, content)
        log.info("prepare_data: %s %s: %d images listed -> %s", dataset.name, split, len(dataset), path)
        for id, error in list(wrong.items())[:5]:
            log.warning("  left out: %s: %s", id, error)
        if len(wrong) > 5:
            log.warning("  and %d more; scripts/check_data.py names them all", len(wrong) - 5)
        failed.update(wrong)
    return failed


def _write_masks(dataset: CocoDataset, failed: dict[str, str]) -> None:
    """Rasterise the masks that are not there."""
    folder = dataset.mask_folder
    if not dataset.check_marker():
        if any(folder.glob("*.png")):
            raise ConfigError(
                f"dataset.mask_dir: got '{folder}' with masks that this script did not make, which it leaves alone; "
                "use them as they are, or choose another dataset.mask_dir"
            )
        _write(folder / MARKER, json.dumps(dataset.made_from).encode())
    todo = [id for id in dataset.ids if not (folder / f"{id}.png").is_file()]
    for id in tqdm(todo, desc=f"masks {dataset.list_name}", unit="img", leave=False):
        try:
            _write(folder / f"{id}.png", write_label_png(dataset.rasterise(id)[0]))
        except DataError as error:
            failed[id] = str(error)
    log.info(
        "prepare_data: %s %s: %d masks written, %d were there, %d failed -> %s",
        dataset.name,
        dataset.split,
        len(todo) - len(failed),
        len(dataset) - len(todo),
        len(failed),
        folder,
    )


def _write_labels(dataset: Dataset, failed: dict[str, str]) -> None:
    """Write `image_labels/<split>.json`; a journal beside it keeps what a killed run had found."""
    path = dataset.root / LABELS / f"{dataset.list_name}.json"
    source, file = dataset.label_source, dataset.label_file
    if source == "none" or (file is not None and Path(file.where).resolve() == path.resolve()):
        log.info("prepare_data: %s %s: no labels to derive (%s)", dataset.name, dataset.split, source)
        return
    made_from = {"split": dataset.split, "fingerprint": dataset.fingerprint()}
    if _is_made_from(path, made_from):
        log.info("prepare_data: %s %s: labels were there -> %s", dataset.name, dataset.split, path)
        return
    journal = path.with_name(f".{path.stem}.jsonl")
    known = _read_journal(journal, made_from)
    # Written anew, because a killed run may have left half a line at its end.
    _write(journal, "".join(json.dumps(line) + "\n" for line in (made_from, *known.items())).encode())
    wrong = 0
    try:
        with journal.open("a", encoding="utf-8") as notes:
            for id in tqdm(dataset.ids, desc=f"labels {dataset.list_name}", unit="img", leave=False):
                if id in known or id in failed:
                    continue
                try:
                    labels = dataset.labels_of(id)
                except DataError as error:
                    failed[id], wrong = str(error), wrong + 1
                    continue
                known[id] = None if labels is None else list(labels)
                notes.write(json.dumps([id, known[id]]) + "\n")
                notes.flush()
    except OSError as error:
        raise _cannot_write(journal, error) from error
    images = [{"img_id": id, "labels": known[id]} for id in dataset.ids if known.get(id) is not None]
    # Where an image failed, the record of what it was made from is left out, so that the next run tries again.
    record = {"source": source, "images": images}
    write = record if any(id in failed for id in dataset.ids) else {**record, "made_from": made_from}
    try:
        write_json(path, write)
    except StorageError as error:
        raise _cannot_write(path, error.__cause__) from error
    journal.unlink(missing_ok=True)
    log.info(
        "prepare_data: %s %s: labels of %d images from %s, %d failed -> %s",
        dataset.name,
        dataset.split,
        len(images),
        source,
        wrong,
        path,
    )


def _is_made_from(path: Path, made_from: dict[str, str]) -> bool:
    try:
        return path.is_file() and bool(read_json(path).get("made_from") == made_from)
    except (ArtefactError, AttributeError):
        return False


def _read_journal(path: Path, made_from: dict[str, str]) -> dict[str, list[int] | None]:
    """What a killed run of the same split found (`None`: no label known); the line that it died in is left out."""
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
        raise _cannot_write(path, error.__cause__) from error


def _cannot_write(path: Path, cause: BaseException | None) -> StorageError:
    why = getattr(cause, "strerror", None) or cause
    return StorageError(
        f"{path}: cannot be written ({why}); prepare_data writes below dataset.root: free some space or change the "
        "permissions, and run again, what is finished is kept"
    )
