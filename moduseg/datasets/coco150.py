"""coco150: 100 + 50 photographs of COCO 2017 with semantic masks of its 80 things, for checks on real pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from moduseg.datasets.base import find_image, present_classes
from moduseg.datasets.io import read_image, write_label_png
from moduseg.datasets.labels import read_text
from moduseg.datasets.voc import VocDataset, VocOptions
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.structures import IGNORE_INDEX

SPLITS = ("train2017", "val2017")


class Coco150Dataset(VocDataset):
    """The folder that `scripts/make_coco150.py` writes.

    Args:
        root: the folder.
        split: `train2017` (100 images) or `val2017` (50).
        fold: if set, `val2017` is not touched: every `folds`-th training image from `fold` on is held out,
            `split=val2017` stands for those and `split=train2017` for the others. Use it to choose settings.
        folds: number of folds, 2 or more.

    Raises:
        ValueError: an unknown split, or a fold out of range.
    """

    name = "coco150"

    def __init__(self, root: str, split: str, fold: int | None = None, folds: int = 5) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if folds < 2 or (fold is not None and not 0 <= fold < folds):
            raise ValueError(f"fold, folds: got {fold}, {folds}, expected 2 folds or more and fold in 0..folds-1")
        self.fold, self.folds = fold, folds
        self._is_held_out = split == "val2017"
        part = split if fold is None else "train2017"
        options = VocOptions(
            root,
            image_dir=f"images/{part}",
            mask_dir=f"SegmentationClass/{part}",
            list_dir=".",
            suffixes=(".jpg",),
            classes_file="classes.txt",
        )
        if fold is not None:
            split = f"train2017-{'only' if self._is_held_out else 'without'}-fold-{fold}-of-{folds}"
        super().__init__(options, split)

    @property
    def list_name(self) -> str:
        """Name of the list; folds are cut from `train2017`."""
        return self.split if self.fold is None else "train2017"

    def _read_ids(self) -> tuple[list[str], str]:
        ids, where = super()._read_ids()
        if self.fold is None:
            return ids, where
        return [image_id for i, image_id in enumerate(ids) if (i % self.folds == self.fold) is self._is_held_out], where

    def instance_path(self, image_id: str) -> Path | None:
        return None


def read_coco150_ids() -> dict[str, list[str]]:
    """Return the image ids of each split, in order."""
    return json.loads(resources.files("moduseg.datasets").joinpath("coco150_ids.json").read_text("utf-8"))


def make_coco150(coco: Path, out: Path, ids: dict[str, list[str]] | None = None) -> Path:
    """Write the folder from a COCO 2017 download with panoptic annotations.

    Things get the contiguous ids 1..80 in the order of their category ids, crowds included; stuff is 0; unlabelled
    pixels are 255. Image-level labels are the things in the mask.

    Args:
        coco: holds `train2017/`, `val2017/` (photographs), `annotations/panoptic_<split>.json` and
            `annotations/panoptic_<split>/` (PNG).
        out: folder to write to; files of a former run are written again.
        ids: image ids of each split; those of coco150 if omitted.

    Returns:
        `out`.

    Raises:
        MissingError: a folder or file of the download is absent.
        DataError: an annotation is damaged, or holds segments that its list does not name.
    """
    entries = []
    for split, wanted in (ids if ids is not None else read_coco150_ids()).items():
        panoptic = _read_panoptic(coco, split)
        for folder in (out / "images" / split, out / "SegmentationClass" / split):
            folder.mkdir(parents=True, exist_ok=True)
        for image_id in wanted:
            if image_id not in panoptic.images:
                raise MissingError(
                    f"{coco}/annotations/panoptic_{split}.json: has no image {image_id}; fetch COCO 2017 again"
                )
            file_name, segments = panoptic.images[image_id]
            photograph = find_image(_existing_folder(coco / split), image_id, (".jpg",))
            png = _existing_folder(coco / "annotations" / f"panoptic_{split}") / file_name
            semantic = semantic_from_panoptic(read_image(png), segments, panoptic.contiguous, str(png))
            target = out / "images" / split / f"{image_id}.jpg"
            _write(target, photograph.read_bytes())
            _write(out / "SegmentationClass" / split / f"{image_id}.png", write_label_png(semantic))
            labels = list(present_classes(semantic))
            entries.append({"img_id": image_id, "file_name": f"images/{split}/{image_id}.jpg", "labels": labels})
        _write(out / "classes.txt", "".join(f"{name}\n" for name in panoptic.classes).encode())
        _write(out / f"{split}.txt", "".join(f"{image_id}\n" for image_id in wanted).encode())
    _write(out / "image_labels.json", json.dumps({"images": entries}).encode())
    return out


def semantic_from_panoptic(
    colours: np.ndarray, segments: dict[int, int], contiguous: dict[int, int], where: str
) -> np.ndarray:
    """Make a label map from COCO's panoptic encoding.

    Args:
        colours: `[H, W, 3]` uint8; segment id = R + 256 G + 65536 B, 0 where unlabelled.
        segments: segment id -> category id.
        contiguous: category id -> 1..80 for things; categories not in it are stuff.
        where: the file, for the message.

    Returns:
        `[H, W]` uint8, 0 stuff, 1..80 things, 255 unlabelled.

    Raises:
        DataError: a segment that `segments` does not name.
    """
    segment_ids, inverse = np.unique(colours.astype(np.int64) @ np.array([1, 256, 65536]), return_inverse=True)
    values = np.empty(len(segment_ids), dtype=np.uint8)
    for i, segment in enumerate(segment_ids.tolist()):
        if segment and segment not in segments:
            raise DataError(
                f"{where}: got segment {segment}, which the annotation does not list; fetch COCO 2017 again"
            )
        values[i] = contiguous.get(segments[segment], 0) if segment else IGNORE_INDEX
    return values[inverse].reshape(colours.shape[:2])


@dataclass(frozen=True)
class _Panoptic:
    """One file of panoptic annotations.

    Attributes:
        contiguous: category id -> 1..80, for things.
        classes: class names by contiguous id, background first.
        images: image id -> name of its PNG, and segment id -> category id.
    """

    contiguous: dict[int, int]
    classes: tuple[str, ...]
    images: dict[str, tuple[str, dict[int, int]]]


def _read_panoptic(coco: Path, split: str) -> _Panoptic:
    path = coco / "annotations" / f"panoptic_{split}.json"
    if not path.is_file():
        raise MissingError(f"{path}: no such file; fetch COCO's panoptic annotations of 2017 and unpack them")
    try:
        data = json.loads(read_text(path))
        things = sorted((c["id"], c["name"]) for c in data["categories"] if c["isthing"])
        images = {
            f"{a['image_id']:012d}": (a["file_name"], {s["id"]: s["category_id"] for s in a["segments_info"]})
            for a in data["annotations"]
        }
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not COCO's panoptic format ({error!r}); fetch it again") from error
    contiguous = {category: i for i, (category, _) in enumerate(things, start=1)}
    return _Panoptic(contiguous, ("background", *(name for _, name in things)), images)


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise MissingError(f"{path}: no such folder; fetch that part of COCO 2017 and unpack it there")
    return path


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from error
