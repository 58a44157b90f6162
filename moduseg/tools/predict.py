"""One's own images labelled with a finished bank: label maps, overlays, polygons for annotation tools."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from moduseg.api import Segmenter
from moduseg.bank.derived import digest_bank, open_bank
from moduseg.config.stored import reconfigure
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import read_image, write_label_png
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.files import FORMAT, digest_of, read_json, write_atomic, write_json
from moduseg.pipeline.manifests import safe_name
from moduseg.pipeline.workspace import log
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
from moduseg.report.panel import draw_panel, make_class_legend

FORMATS = ("png", "overlay", "coco", "labelme", "labelstudio")
"""What may be written: `labels/`, `overlays/`, `coco.json`, `labelme/`, `labelstudio.json` with its configuration."""


@dataclass(frozen=True)
class PredictOptions:
    """Keys of the command `predict`.

    Attributes:
        bank: folder of the bank.
        images: folders of images, or single files.
        out: folder to write.
        min_score: proposals that score less are unknown (255 in the label map, no object); the score is a cosine,
            -1 to 1. No limit where left out.
        formats: see `FORMATS`.
        objects: `proposals` (what is visible of one proposal) or `components` (a connected region of one class).
        tolerance: pixels that polygons may lie off; see `moduseg.masks.polygons.mask_polygons`.
        image_url: what Label Studio's addresses of images begin with; the default is its local file storage.
    """

    bank: str
    images: tuple[str, ...]
    out: str = "predictions"
    min_score: float | None = None
    formats: tuple[str, ...] = FORMATS
    objects: Literal["proposals", "components"] = "proposals"
    tolerance: float = 1.0
    image_url: str = "/data/local-files/?d="

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"formats: got {unknown or 'none'}, expected some of {', '.join(FORMATS)}")
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise ValueError(f"min_score: got {self.min_score}, expected a cosine, -1 to 1; try 0.5")
        if self.tolerance < 0:
            raise ValueError(f"tolerance: got {self.tolerance}, expected 0 or more pixels; try 1")


def main(options: PredictOptions, overrides: Sequence[str]) -> int:
    """Label images; 1 if some could not be processed, else 0."""
    return 1 if run(options, overrides)[1] else 0


def run(options: PredictOptions, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, str]]:
    """Label images.

    An image that is done already, with the same bank and settings, is not done again.

    Args:
        options: what to label, and what to write.
        overrides: of the bank's configuration, such as `retrieval.top_k=3`, `runtime.device=cpu`.

    Returns:
        The folder, and the error of each image that could not be processed.

    Raises:
        ArtefactError: no bank, other weights, or a folder that holds predictions made otherwise.
        ConfigError: a value that is not allowed.
        MissingError, DataError: no image, or none that could be processed.
    """
    bank = open_bank(options.bank)
    cfg = reconfigure(bank.info["config"], overrides)
    files = find_images(options.images)
    out = Path(options.out).expanduser()
    decided = {group: cfg.as_dict()[group] for group in ("proposer", "backbone", "bank", "retrieval")}
    key = digest_of(
        {
            "format": FORMAT,
            "bank": digest_bank(bank),
            "config": decided,
            "options": [options.min_score, options.objects, options.tolerance],
        }
    )
    _check_folder(out, key)
    segmenter = Segmenter.from_bank(options.bank, cfg.runtime.device, cfg.as_dict())
    if segmenter.proposer.needs_truth:
        raise ConfigError(
            f"proposer.name: got {cfg.proposer['name']!r}, which needs ground truth, expected one that works on "
            "any image; set proposer=<file>, such as proposer=sam_cpu"
        )
    rarest = min((count for count in bank.counts.values() if count), default=0)
    if cfg.retrieval.top_k > rarest:
        log.warning(
            "predict: %d neighbours vote, but a class of the bank has only %d vectors, which may never win; set "
            "retrieval.top_k to at most %d",
            cfg.retrieval.top_k,
            rarest,
            rarest,
        )
    write_json(out / "manifest.json", {"stage": "predict", "key": key, "status": "running"})
    failed: dict[str, str] = {}
    fresh, start = 0, time.perf_counter()
    for image_id, file in tqdm(files.items(), desc="predict", unit="img", leave=False):
        if _is_done(out, image_id, file, key, options.formats):
            continue
        try:
            _label(segmenter, image_id, file, out, options, key)
            fresh += 1
        except DataError as error:
            failed[image_id] = " ".join(str(error).split())
            (out / safe_name(f"records/{image_id}", ".json")).unlink(missing_ok=True)
    if len(failed) == len(files):
        raise DataError(f"predict: none of {len(files)} images could be processed; first {next(iter(failed.values()))}")
    seconds = time.perf_counter() - start
    found = _write_joint(out, [i for i in files if i not in failed], segmenter.classes, options)
    lines = [json.dumps({"id": i, "error": e}, ensure_ascii=False) + "\n" for i, e in failed.items()]
    write_atomic(out / "failures.jsonl", "".join(lines).encode())
    write_json(
        out / "manifest.json",
        {
            "stage": "predict",
            "key": key,
            "status": "complete",
            "images": len(files),
            "failures": len(failed),
            "objects": found,
            "bank": str(options.bank),
            "classes": list(segmenter.classes),
            "config": cfg.as_dict(),
            "min_score": options.min_score,
        },
    )
    log.info(
        "predict: %d images (%d now, %d done before), %d failed, %d objects, %.1f s -> %s",
        len(files),
        fresh,
        len(files) - fresh - len(failed),
        len(failed),
        found,
        seconds,
        out,
    )
    for message in list(failed.values())[:5]:
        log.warning("  not processed: %s", message)
    return out, failed


def _label(segmenter: Segmenter, image_id: str, file: Path, out: Path, options: PredictOptions, key: str) -> None:
    """Predict one image and write its files, its record last."""
    bytes_before = file.stat().st_size
    image = read_image(file)
    prediction = segmenter.predict(image)
    label_map, objects = split_objects(prediction, options.min_score, options.objects == "components")
    records = [to_record(found, options.tolerance) for found in objects]
    size = (image.shape[0], image.shape[1])
    if "png" in options.formats:
        write_atomic(out / safe_name(f"labels/{image_id}", ".png"), write_label_png(label_map))
    if "overlay" in options.formats:
        legend = [
            ("unknown" if name == "ignored" else name, colour)
            for name, colour in make_class_legend(segmenter.classes, label_map)
        ]
        write_atomic(
            out / safe_name(f"overlays/{image_id}", ".png"),
            draw_panel([(image_id, overlay_labels(image, label_map))], legend),
        )
    if "labelme" in options.formats:
        target = out / safe_name(f"labelme/{image_id}", ".json")
        path = os.path.relpath(file.resolve(), target.parent.resolve()).replace(os.sep, "/")
        write_json(target, to_labelme(path, size, records, segmenter.classes))
    record = {
        "key": key,
        "bytes": bytes_before,
        "file": _relative(file),
        "size": list(size),
        "formats": list(options.formats),
        "objects": records,
    }
    write_atomic(out / safe_name(f"records/{image_id}", ".json"), json.dumps(record).encode())


def _write_joint(out: Path, ids: Sequence[str], classes: Sequence[str], options: PredictOptions) -> int:
    """Write the files that hold all images; how many objects there are."""
    images, tasks, count = [], [], 0
    for image_id in ids:
        record: Mapping[str, Any] = read_json(out / safe_name(f"records/{image_id}", ".json"))
        size = (record["size"][0], record["size"][1])
        images.append((record["file"], size, record["objects"]))
        url = to_url(options.image_url, record["file"])
        tasks.append(to_label_studio_task(url, size, record["objects"], classes))
        count += len(record["objects"])
    if "coco" in options.formats:
        write_json(out / "coco.json", to_coco(images, classes))
    if "labelstudio" in options.formats:
        write_json(out / "labelstudio.json", tasks)
        write_atomic(out / "labelstudio.xml", to_label_studio_config(classes).encode())
    write_atomic(out / "classes.txt", ("\n".join(classes) + "\n").encode())
    return count


def _is_done(out: Path, image_id: str, file: Path, key: str, formats: Sequence[str]) -> bool:
    path = out / safe_name(f"records/{image_id}", ".json")
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record["key"] == key and record["bytes"] == file.stat().st_size and record["file"] == _relative(file)
        written = set(formats) <= set(record["formats"])
    except (ValueError, KeyError, TypeError):
        return False
    names = {"png": ("labels", ".png"), "overlay": ("overlays", ".png"), "labelme": ("labelme", ".json")}
    own = [safe_name(f"{names[f][0]}/{image_id}", names[f][1]) for f in formats if f in names]
    return same and written and all((out / name).is_file() for name in own)


def _check_folder(out: Path, key: str) -> None:
    """Refuse a folder that holds something else."""
    manifest = out / "manifest.json"
    if manifest.is_file():
        held = read_json(manifest)
        if not isinstance(held, dict) or held.get("stage") != "predict" or held.get("key") != key:
            raise ArtefactError(
                f"out: '{out}' holds the result of another bank or other settings; set out=<new folder>, or remove it"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ArtefactError(f"out: '{out}' holds other files; set out=<new folder>")


def _relative(file: Path) -> str:
    """The file as seen from where the command runs, with slashes."""
    return os.path.relpath(file).replace(os.sep, "/")
