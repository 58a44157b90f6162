"""The command `predict` labels images with a finished bank: label maps, overlays, polygons for annotation tools."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.api import Segmenter
from moduseg.bank.derived import digest_bank, open_bank
from moduseg.bank.store import Bank
from moduseg.config import Config, RetrievalConfig
from moduseg.config.command_keys import PredictOptions
from moduseg.config.stored import reconfigure
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import write_grey_png, write_label_png, write_rgb_png
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.files import FORMAT, digest_of, file_digest, read_json, to_json_values, write_atomic, write_json
from moduseg.pipeline.manifests import safe_name
from moduseg.pipeline.records import is_same_file, stamp_file
from moduseg.pipeline.workspace import log
from moduseg.progress import track
from moduseg.report.annotations import (
    split_objects,
    to_coco,
    to_label_studio_config,
    to_label_studio_task,
    to_labelme,
    to_record,
    to_url,
)
from moduseg.report.overlay import overlay_labels
from moduseg.report.panel import draw_legend, make_class_legend
from moduseg.retrieval.ranking import RANKING_FILE
from moduseg.structures import IGNORE_INDEX

_IMAGE_FILES = {
    "png": ("labels", ".png"),
    "overlay": ("overlays", ".png"),
    "confidence": ("scores", ".png"),
    "labelme": ("labelme", ".json"),
    "record": ("records", ".json"),
}
"""Folder and suffix of what is written for each image: formats, and the record that the joint files are made from."""


def main(options: PredictOptions, overrides: Sequence[str]) -> int:
    """Label images; 1 if some could not be processed, else 0."""
    return 1 if run(options, overrides)[1] else 0


def run(options: PredictOptions, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, str]]:
    """Label images. An image that was labelled before with the same bank and settings is not labelled again.

    Args:
        options: what to label, and what to write.
        overrides: of the bank's configuration, such as `retrieval.top_k=3`, `runtime.device=cpu`.

    Returns:
        The folder, and the error of each image that could not be processed, by id.

    Raises:
        ArtefactError: no bank, other weights, or a folder that holds predictions made otherwise.
        ConfigError: a value that is not allowed.
        MissingError, DataError: no image, or none that could be processed.
    """
    bank = open_bank(options.bank)
    cfg = reconfigure(bank.info["config"], overrides)
    files = find_images(options.images)
    segmenter = Segmenter.from_bank(options.bank, cfg.runtime.device, cfg.as_dict())
    key = _predict_key(bank, cfg, options, segmenter)
    folder = _Folder(Path(options.out).expanduser(), key, options, verify=cfg.runtime.verify)
    folder.check()
    for file in files.values():
        served_name(options.labelstudio_root, file, "")  # what lies elsewhere is said before the first image
    _check_proposer(segmenter)
    # `latest` is the last bank of any data set, which need not be the one that is meant.
    log.info("predict: the bank is %s (%s)", options.bank, _describe_classes(segmenter.classes))
    _warn_of_rare_classes(bank, cfg.retrieval)
    folder.write_manifest("running")
    start = time.perf_counter()
    unlabelled = {
        image_id: file for image_id, file in files.items() if not folder.has_image(image_id, file, segmenter.colours)
    }
    failed = _label_images(segmenter, unlabelled, folder)
    if len(failed) == len(files):
        raise DataError(f"predict: none of {len(files)} images could be processed; first {next(iter(failed.values()))}")
    seconds = time.perf_counter() - start
    labelled = {image_id: file for image_id, file in files.items() if image_id not in failed}
    num_objects = folder.write_joint_files(labelled, segmenter)
    lines = [json.dumps({"id": i, "error": e}, ensure_ascii=False) + "\n" for i, e in failed.items()]
    write_atomic(folder.path / "failures.jsonl", "".join(lines).encode())
    folder.write_manifest(
        "complete",
        images=len(files),
        failures=len(failed),
        objects=num_objects,
        bank=str(options.bank),
        classes=list(segmenter.classes),
        config=cfg.as_dict(),
        min_score=options.min_score,
    )
    log.info(
        "predict: %d images (%d now, %d done before), %d failed, %d objects, %.1f s -> %s",
        len(files),
        len(unlabelled) - len(failed),
        len(files) - len(unlabelled),
        len(failed),
        num_objects,
        seconds,
        folder.path,
    )
    for message in list(failed.values())[:5]:
        log.warning("  not processed: %s", message)
    return folder.path, failed


class _Folder:
    """The folder of predictions: what it holds, and what is written to it.

    Args:
        path: the folder.
        key: digest of everything that decides the predictions.
        options: of the command.
        verify: whether images are recognised by their content although size and time of change agree.
    """

    def __init__(self, path: Path, key: str, options: PredictOptions, *, verify: bool = False) -> None:
        self.path, self.key, self.options, self.verify = path, key, options, verify

    def check(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            ArtefactError: it holds other files, or predictions of another key.
        """
        manifest = self.path / "manifest.json"
        if manifest.is_file():
            content = read_json(manifest)
            if not isinstance(content, dict) or content.get("stage") != "predict" or content.get("key") != self.key:
                raise ArtefactError(
                    f"out: '{self.path}' holds the result of another bank or other settings; set out=<new folder>, or "
                    "remove it"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ArtefactError(f"out: '{self.path}' holds other files; set out=<new folder>")

    def file(self, kind: str, image_id: str) -> Path:
        """Return the path of an image's file of a kind, one of `_IMAGE_FILES`."""
        folder, suffix = _IMAGE_FILES[kind]
        return self.path / safe_name(f"{folder}/{image_id}", suffix)

    def has_image(self, image_id: str, file: Path, colours: np.ndarray) -> bool:
        """Return whether an image was labelled with this key, and all that is asked for was written.

        Args:
            image_id: the image.
            file: its file.
            colours: `[256, 3]` uint8, in which overlays show the classes.
        """
        try:
            record = json.loads(self.file("record", image_id).read_text(encoding="utf-8"))
            is_same = (record["key"], record["file"]) == (self.key, _relative_path(file))
            # Earlier versions wrote the size alone.
            is_same &= is_same_file(file, record["stamp" if "stamp" in record else "bytes"], verify=self.verify)
            has_formats = set(self._formats) <= set(record["formats"])
            # Overlays of earlier versions have a frame, and no colours are recorded.
            has_formats &= "overlay" not in self._formats or record.get("colours") == self._name_colours(colours)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        kinds = [kind for kind in self._formats if kind in _IMAGE_FILES]
        return is_same and has_formats and all(self.file(kind, image_id).is_file() for kind in kinds)

    def write_image(self, segmenter: Segmenter, image_id: str, file: Path) -> None:
        """Label one image and write its files, its record last.

        Raises:
            DataError: the image cannot be read.
        """
        stamp = stamp_file(file)
        image = segmenter.read_image(file)
        has_components = self.options.objects == "components"
        prediction, settings = segmenter.predict(image).retrieved, segmenter.cfg.retrieval
        label_map, objects = split_objects(prediction, self.options.min_score, has_components, settings=settings)
        records = [to_record(predicted, self.options.tolerance) for predicted in objects]
        size = (image.shape[0], image.shape[1])
        if "png" in self._formats:
            write_atomic(self.file("png", image_id), write_label_png(label_map))
        if prediction.confidence is not None:
            write_atomic(self.file("confidence", image_id), write_grey_png(prediction.confidence))
        if "overlay" in self._formats:
            picture = write_rgb_png(overlay_labels(image, label_map, segmenter.colours))
            write_atomic(self.file("overlay", image_id), picture)
        if "labelme" in self._formats:
            target = self.file("labelme", image_id)
            path = os.path.relpath(file.resolve(), target.parent.resolve()).replace(os.sep, "/")
            write_json(target, to_labelme(path, size, records, segmenter.classes))
        record = {
            "key": self.key,
            "stamp": stamp,
            "file": _relative_path(file),
            "size": list(size),
            "formats": list(self._formats),
            "colours": self._name_colours(segmenter.colours),
            "objects": records,
        }
        write_atomic(self.file("record", image_id), json.dumps(record).encode())

    def write_joint_files(self, files: Mapping[str, Path], segmenter: Segmenter) -> int:
        """Write the files that hold all images, named as below their folders, and return the number of objects."""
        classes = segmenter.classes
        images, tasks, num_objects = [], [], 0
        for image_id, file in files.items():
            record: Mapping[str, Any] = read_json(self.file("record", image_id))
            size = (record["size"][0], record["size"][1])
            # The end of the path, not the id with its suffix: a file may be named in decomposed Unicode.
            name = "/".join(file.parts[-1 - image_id.count("/") :])
            images.append((name, size, record["objects"]))
            url = to_url(self.options.image_url, served_name(self.options.labelstudio_root, file, name))
            tasks.append(to_label_studio_task(url, size, record["objects"], classes))
            num_objects += len(record["objects"])
        if "coco" in self._formats:
            write_json(self.path / "coco.json", to_coco(images, classes))
        if "labelstudio" in self._formats:
            write_json(self.path / "labelstudio.json", tasks)
            write_atomic(self.path / "labelstudio.xml", to_label_studio_config(classes, segmenter.colours).encode())
        if "overlay" in self._formats:
            ids = np.arange(1, len(classes), dtype=np.uint8)
            unknown = np.array([] if self.options.min_score is None else [IGNORE_INDEX], dtype=np.uint8)
            legend = make_class_legend(classes, ids, unknown, colours=segmenter.colours)
            named = [("unknown" if name == "ignored" else name, colour) for name, colour in legend]
            write_atomic(self.path / "legend.png", write_rgb_png(draw_legend(named)))
        write_atomic(self.path / "classes.txt", ("\n".join(classes) + "\n").encode())
        return num_objects

    def write_manifest(self, status: str, **fields: Any) -> None:
        """Write the manifest, with more fields when the command is complete."""
        write_json(self.path / "manifest.json", {"stage": "predict", "key": self.key, "status": status, **fields})

    @staticmethod
    def _name_colours(colours: np.ndarray) -> str:
        """Return what tells overlays in some colours from those in others."""
        return hashlib.sha256(colours.tobytes()).hexdigest()[:16]

    @property
    def _formats(self) -> tuple[str, ...]:
        return self.options.formats


def _check_proposer(segmenter: Segmenter) -> None:
    if segmenter.proposer.needs_truth:
        raise ConfigError(
            f"proposer.name: got {segmenter.cfg.proposer['name']!r}, which needs ground truth, expected one that works "
            "on any image; set proposer=<file>, such as proposer=sam_cpu"
        )


def _predict_key(bank: Bank, cfg: Config, options: PredictOptions, segmenter: Segmenter) -> str:
    """Return the digest of everything that decides the predictions of an image."""
    groups, config = cfg.as_dict(), bank.info["config"]
    # The bank's digest holds the backbone's, which it is checked against. What came later is left out where it is
    # empty, so that earlier results keep their key.
    weights = {"proposer_digest": digest} if (digest := segmenter.proposer.digest) else {}
    image_range = cfg.dataset.get("image_range")
    reading = {} if image_range is None else {"image_range": image_range}
    later_keys = {*cfg.retrieval.tidying, "confidence"}
    groups["retrieval"] = {key: value for key, value in groups["retrieval"].items() if value or key not in later_keys}
    ranking = {}
    if cfg.retrieval.selection == "learnt" and segmenter.folder is not None:
        ranking = {"ranking": file_digest(segmenter.folder / RANKING_FILE)}
    words = {}
    if cfg.uses_words and (generator := cfg.pseudo_masks.generator) != reconfigure(config, ()).pseudo_masks.generator:
        words = {"words": to_json_values(generator)}
    device = segmenter.device.key_parts()
    return digest_of(
        {
            **weights,
            **reading,
            **({} if device == {"precision": "float32"} else device),
            "format": FORMAT,
            "bank": digest_bank(bank),
            "config": {group: groups[group] for group in ("proposer", "backbone", "bank", "retrieval")},
            "options": [options.min_score, options.objects, options.tolerance],
            **ranking,
            **words,
        }
    )


def _describe_classes(classes: Sequence[str]) -> str:
    """Return the names of the first three classes beside background, and how many more there are."""
    names = classes[1:]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn_of_rare_classes(bank: Bank, settings: RetrievalConfig) -> None:
    """Warn of a class that has too few vectors to win a vote in which each neighbour counts as much as the nearest."""
    if settings.cap_top_k or settings.vote_temperature is not None or settings.answer == "words":
        return
    top_k = settings.top_k
    num_rarest = min((num_vectors for num_vectors in bank.counts.values() if num_vectors), default=0)
    if top_k > num_rarest:
        log.warning(
            "predict: %d neighbours vote, but a class of the bank has only %d vectors, which may never win; set "
            "retrieval.top_k to at most %d",
            top_k,
            num_rarest,
            num_rarest,
        )


def _label_images(segmenter: Segmenter, files: Mapping[str, Path], folder: _Folder) -> dict[str, str]:
    """Label images and write their files; return the error of each that could not be processed."""
    failed: dict[str, str] = {}
    for image_id, file in track(files.items(), "predict"):
        try:
            folder.write_image(segmenter, image_id, file)
        except DataError as error:
            failed[image_id] = " ".join(str(error).split())
            folder.file("record", image_id).unlink(missing_ok=True)
    return failed


def served_name(root: str | None, file: Path, name: str) -> str:
    """Return the path of an image below the folder that Label Studio serves, or `name` if none is set.

    Raises:
        ConfigError: the image lies elsewhere.
    """
    if root is None:
        return name
    folder = Path(root).expanduser()
    for path, base in ((file.absolute(), folder.absolute()), (file.resolve(), folder.resolve())):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    raise ConfigError(
        f"labelstudio_root: got '{root}', which does not hold {file}; expected the folder that Label Studio serves, "
        "with the images below it"
    )


def _relative_path(file: Path) -> str:
    """Return the file as seen from where the command runs, with slashes."""
    return os.path.relpath(file).replace(os.sep, "/")
