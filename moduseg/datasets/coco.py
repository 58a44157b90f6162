"""COCO 2014 and 2017 from their instance annotations."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moduseg.datasets.base import Dataset, find_image, require_folder
from moduseg.datasets.classes import COCO_CLASSES
from moduseg.datasets.coco_json import CocoIndex, read_index
from moduseg.datasets.labels import Label, read_list, read_text
from moduseg.errors import ConfigError, DataError, MissingError

PUBLISHED_SIZES = {
    ("train", 2014, False): 82081,
    ("val", 2014, False): 40137,
    ("train", 2014, True): 82783,
    ("val", 2014, True): 40504,
    ("train", 2017, False): 117266,
    ("val", 2017, False): 4952,
    ("train", 2017, True): 118287,
    ("val", 2017, True): 5000,
}
"""Number of images by split, year, and whether those without annotations count (docs/method.md, data protocol)."""
MARKER = "made_from.json"
"""File in a folder of rasterised masks that says how they were made."""


@dataclass(frozen=True)
class CocoOptions:
    """Where the files of COCO are, and how they are read.

    Args:
        root: the folder that holds the others.
        year: 2014 or 2017.
        image_dir: folder of `train2014/` and the others, below `root`.
        annotation_dir: folder of the `instances_*.json`, below `root`.
        mask_dir: folder of the semantic masks, below `root`; need not exist.
        list_dir: folder of `<split><year>.txt` with ids, below `root`; `None` takes the images of the annotations.
        crowd: `count` gives regions of many objects their class, `ignore` makes them 255.
        keep_unannotated: images without any annotation are part of a split.
        labels: where image-level labels come from (the values of `Dataset`), or `instances`, the annotated categories,
            which include those that are hidden in the mask.

    Raises:
        ValueError: a year other than these two.
    """

    root: str
    year: int = 2014
    image_dir: str = "."
    annotation_dir: str = "annotations"
    mask_dir: str = "SegmentationClass"
    list_dir: str | None = None
    crowd: Literal["count", "ignore"] = "count"
    keep_unannotated: bool = False
    labels: str = "auto"

    def __post_init__(self) -> None:
        if self.year not in (2014, 2017):
            raise ValueError(f"year: got {self.year}, expected 2014 or 2017")


class CocoDataset(Dataset):
    """COCO as it unpacks: `train2014/`, `val2014/` and `annotations/instances_{train,val}2014.json`, likewise 2017.

    Semantic masks are read from `<mask_dir>/<split><year>/<id>.png` where they exist, as `scripts/prepare_data.py`
    writes them or others publish them; the rest are rasterised from the annotations when asked for, with the same
    result. Category ids 1..90 become 1..80; where objects overlap the smaller one is on top. Objects (instances) come
    from the annotations alone. With masks, `list_dir` and `labels` set the annotations are opened for nothing else.

    Args:
        options: where the files are, and how they are read.
        split: `train` or `val`, or with `list_dir` the name of a list of images of one of them that begins so.

    Attributes:
        mask_folder: where the masks of this split are, or would be.

    Raises:
        ValueError: an unknown split.
    """

    extra_sources = ("instances",)

    def __init__(self, options: CocoOptions, split: str) -> None:
        super().__init__(options.root, split, options.labels)
        if split not in ("train", "val") and not (options.list_dir and split.startswith(("train", "val"))):
            raise ValueError(
                f"split: got {split!r}, expected train or val, or with dataset.list_dir a list whose name begins so"
            )
        self.options = options
        self.name = f"coco{options.year}"
        self._part = f"{'val' if split.startswith('val') else 'train'}{options.year}"
        self._images = self.root / options.image_dir / self._part
        self.mask_folder = self.root / options.mask_dir / self._part
        self._annotations = self.root / options.annotation_dir / f"instances_{self._part}.json"
        self._list = self.root / options.list_dir / f"{self.list_name}.txt" if options.list_dir else None
        self._lock = threading.Lock()
        self._index: CocoIndex | None = None
        self._last: tuple[str, np.ndarray, np.ndarray] | None = None

    @property
    def list_name(self) -> str:
        """File name, without suffix, of lists and label files of this split: `train2014`."""
        return f"{self.split}{self.options.year}"

    @property
    def published_size(self) -> int | None:
        """Number of images in COCO's split, with or without those that have no annotation."""
        return PUBLISHED_SIZES.get((self.split, self.options.year, self.options.keep_unannotated))

    @property
    def index(self) -> CocoIndex:
        """The annotations, read on first use and once.

        Raises:
            MissingError: there is no annotation file.
            DataError: it is damaged.
        """
        with self._lock:  # stages load images in several threads
            if self._index is None:
                if not self._annotations.is_file():
                    raise MissingError(
                        f"dataset.root: got '{self.root}' without {self._annotations.relative_to(self.root)}; expected "
                        f"annotations_trainval{self.options.year}.zip of COCO unpacked there; fetch it (data/README.md)"
                    )
                self._index = read_index(self._annotations)
            return self._index

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.index.ids)}

    def _read_ids(self) -> tuple[list[str], str]:
        layout = f"{self._part}/ and annotations/instances_{self._part}.json"
        require_folder(self.root, "dataset.root", layout)
        require_folder(self._images, "dataset.root", layout)
        if self._list is not None:
            if not self._list.is_file():
                raise MissingError(
                    f"dataset.list_dir: no such list {self._list}; expected ids, one a line; run "
                    "scripts/prepare_data.py with dataset.list_dir=null, or leave it null"
                )
            return read_list(self._list), str(self._list)
        is_annotated = np.diff(self.index.starts) > 0
        rows = zip(self.index.ids, is_annotated, strict=True)
        chosen = [image_id for image_id, annotated in rows if annotated or self.options.keep_unannotated]
        return chosen, str(self._annotations)

    def _read_classes(self) -> tuple[str, ...]:
        return COCO_CLASSES

    def _read_annotated(self, image_id: str) -> tuple[tuple[Label, ...], str] | None:
        if image_id not in self._rows:
            return None
        objects = self.index.objects_of(self._rows[image_id])
        counted = ~self.index.crowd[objects] | (self.options.crowd == "count")
        return tuple(np.unique(self.index.classes[objects][counted]).tolist()), str(self._annotations)

    def label_names(self, image_id: str) -> tuple[str, ...]:
        """Names under which a label file may list an image; the id comes first."""
        # Label files name an image by its file name, its twelve digits, or its number.
        digits = image_id.rsplit("_", 1)[-1]
        return (image_id, digits, str(int(digits))) if digits.isascii() and digits.isdigit() else (image_id,)

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        return find_image(self._images, image_id, (".jpg",))

    def mask_path(self, image_id: str) -> Path | None:
        path = self.mask_folder / f"{image_id}.png"
        # Some name the mask of COCO_train2014_000000000009 by its twelve digits alone.
        short_path = self.mask_folder / f"{image_id.rsplit('_', 1)[-1]}.png"
        return short_path if not path.is_file() and short_path.is_file() else path

    @property
    def has_truth(self) -> bool:
        """True if there are annotations to rasterise, or a folder of masks."""
        return self._annotations.is_file() or self.mask_folder.is_dir()

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """JSON values of everything that decides the rasterised masks."""
        return {"annotations": self._annotations.name, "crowd": self.options.crowd, "on_top": "smaller"}

    @cached_property
    def _has_masks(self) -> bool:
        """True if there is a folder of masks, made as this configuration says."""
        self.check_marker()
        return self.mask_folder.is_dir()

    def check_marker(self) -> bool:
        """Return whether the folder of masks says how they were made, and refuse masks made in another way.

        Raises:
            ConfigError: the marker is not what `made_from` says.
        """
        path = self.mask_folder / MARKER
        if not path.is_file():
            return False
        text, expected = read_text(path).strip(), json.dumps(self.made_from)
        if text != expected:
            raise ConfigError(
                f"dataset.mask_dir: got '{self.mask_folder}', whose masks were made with {text[:200]}, expected "
                f"{expected}; set dataset.crowd accordingly, choose another dataset.mask_dir, or remove the folder"
            )
        return True

    def rasterise(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Draw the label map `[H, W]` uint8 and the objects `[H, W]` int32 of an image from the annotations.

        Raises:
            DataError: an annotation is broken, or the image is not in the file.
        """
        self._check(image_id)
        if image_id not in self._rows:
            raise DataError(
                f"image {image_id!r}: not in {self._annotations}; take it off the list, or set dataset.year"
            )
        last = self._last
        # A sample asks for the label map and for the objects, one after the other.
        if last is None or last[0] != image_id:
            last = (image_id, *self.index.rasterise(self._rows[image_id], self.options.crowd == "ignore"))
            self._last = last
        return last[1], last[2]

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored = super()._read_semantic(image_id) if self._has_masks else None
        if stored is not None or not self._annotations.is_file():
            return stored
        return self.rasterise(image_id)[0]

    def _read_instances(self, image_id: str) -> np.ndarray | None:
        return self.rasterise(image_id)[1] if self._annotations.is_file() else None

    def _truth_sizes(self, image_id: str) -> list[Any]:
        path = self.mask_path(image_id)
        if self._has_masks and path is not None and path.is_file():
            return [path.stat().st_size, self.options.crowd]
        if not self._annotations.is_file() or image_id not in self._rows:
            return [None, None]
        return [int(self.index.checksums[self._rows[image_id]]), self.options.crowd]
