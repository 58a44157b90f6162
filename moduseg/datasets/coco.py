"""COCO 2014 and 2017 from their instance annotations."""

from __future__ import annotations

import json
import threading
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
"""Images by split, year, and whether those without annotations count (docs/method.md, data protocol; 2017: COCO's)."""
MARKER = "made_from.json"
"""Says in a folder of rasterised masks how they were made."""


class CocoDataset(Dataset):
    """COCO as it unpacks: `train2014/`, `val2014/` and `annotations/instances_{train,val}2014.json`, likewise 2017.

    Semantic masks are read from `<mask_dir>/<split><year>/<id>.png` where they exist, as `scripts/prepare_data.py`
    writes them or others publish them; the rest are rasterised from the annotations when asked for, with the same
    result. Category ids 1..90 become 1..80; where objects overlap the smaller one is seen. Objects (instances) come
    from the annotations alone. With masks, `list_dir` and `labels` given the annotations are not opened for anything
    else.

    Args:
        root: the folder that holds the others.
        split: `train` or `val`, or with `list_dir` the name of a list of images of one of them that begins so.
        year: 2014 or 2017.
        image_dir: folder of `train2014/` and the others, below `root`.
        annotation_dir: folder of the `instances_*.json`, below `root`.
        mask_dir: folder of the semantic masks, below `root`; need not exist.
        list_dir: folder of `<split><year>.txt` with ids, below `root`; `None` takes the images of the annotations.
        crowd: `count` gives regions of many objects their class, `ignore` makes them 255.
        keep_unannotated: whether images without any annotation are part of a split.
        labels: where image-level labels come from, see `Dataset`; also `instances`, the annotated categories, which
            has those as well that are hidden in the mask.

    Attributes:
        mask_folder: where the masks of this split are, or would be.

    Raises:
        ValueError: a split or year that there is not.
    """

    extra_sources = ("instances",)

    def __init__(
        self,
        root: str,
        split: str,
        year: int = 2014,
        image_dir: str = ".",
        annotation_dir: str = "annotations",
        mask_dir: str = "SegmentationClass",
        list_dir: str | None = None,
        crowd: Literal["count", "ignore"] = "count",
        keep_unannotated: bool = False,
        labels: str = "auto",
    ) -> None:
        super().__init__(root, split, labels)
        if year not in (2014, 2017):
            raise ValueError(f"year: got {year}, expected 2014 or 2017")
        self.part = "val" if split.startswith("val") else "train"
        if split not in ("train", "val") and not (list_dir and split.startswith(("train", "val"))):
            raise ValueError(
                f"split: got {split!r}, expected train or val, or with dataset.list_dir a list whose name begins so"
            )
        self.year, self.crowd, self.keep_unannotated = year, crowd, keep_unannotated
        self.name = f"coco{year}"
        self._images = self.root / image_dir / f"{self.part}{year}"
        self.mask_folder = self.root / mask_dir / f"{self.part}{year}"
        self._annotations = self.root / annotation_dir / f"instances_{self.part}{year}.json"
        self._list = self.root / list_dir / f"{self.list_name}.txt" if list_dir else None
        self._lock = threading.Lock()
        self._index: CocoIndex | None = None
        self._last: tuple[str, np.ndarray, np.ndarray] | None = None

    @property
    def list_name(self) -> str:
        """What files of this split are called: `train2014`."""
        return f"{self.split}{self.year}"

    @property
    def published_size(self) -> int | None:
        """Images in COCO's split, with or without those that have no annotation."""
        return PUBLISHED_SIZES.get((self.split, self.year, self.keep_unannotated))

    @property
    def index(self) -> CocoIndex:
        """The annotations, read on first use and once.

        Raises:
            MissingError: there is no annotation file.
            DataError: it is damaged.
        """
        with self._lock:  # stages load images in a thread
            if self._index is None:
                if not self._annotations.is_file():
                    raise MissingError(
                        f"dataset.root: got '{self.root}' without {self._annotations.relative_to(self.root)}; expected "
                        f"annotations_trainval{self.year}.zip of COCO unpacked there; fetch it (data/README.md)"
                    )
                self._index = read_index(self._annotations)
            return self._index

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.index.ids)}

    def _read_ids(self) -> tuple[list[str], str]:
        layout = f"{self.part}{self.year}/ and annotations/instances_{self.part}{self.year}.json"
        require_folder(self.root, "dataset.root", layout)
        require_folder(self._images, "dataset.root", layout)
        if self._list is not None:
            if not self._list.is_file():
                raise MissingError(
                    f"dataset.list_dir: no such list {self._list}; expected ids, one a line; run "
                    "scripts/prepare_data.py with dataset.list_dir=null, or leave it null"
                )
            return read_list(self._list), str(self._list)
        kept = np.diff(self.index.starts) > 0
        chosen = [id for id, some in zip(self.index.ids, kept, strict=True) if some or self.keep_unannotated]
        return chosen, str(self._annotations)

    def _read_classes(self) -> tuple[str, ...]:
        return COCO_CLASSES

    def _read_annotated(self, id: str) -> tuple[tuple[Label, ...], str] | None:
        if id not in self._rows:
            return None
        found = self.index.objects_of(self._rows[id])
        shown = self.index.classes[found][~self.index.crowd[found] | (self.crowd == "count")]
        return tuple(int(label) for label in np.unique(shown)), str(self._annotations)

    def label_names(self, id: str) -> tuple[str, ...]:
        """What an image may be called in a label file, first the id."""
        # Files of labels know an image by its name, its twelve digits, or its number.
        digits = id.rsplit("_", 1)[-1]
        return (id, digits, str(int(digits))) if digits.isascii() and digits.isdigit() else (id,)

    def image_path(self, id: str) -> Path:
        self._check(id)
        return find_image(self._images, id, (".jpg",))

    def mask_path(self, id: str) -> Path | None:
        path = self.mask_folder / f"{id}.png"
        plain = (
            self.mask_folder / f"{id.rsplit('_', 1)[-1]}.png"
        )  # COCO_train2014_000000000009 is also called 000000000009
        return plain if not path.is_file() and plain.is_file() else path

    @property
    def has_truth(self) -> bool:
        """Whether there are annotations to rasterise, or a folder of masks."""
        return self._annotations.is_file() or self.mask_folder.is_dir()

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """What decides the rasterised masks, JSON values."""
        return {"annotations": self._annotations.name, "crowd": self.crowd, "on_top": "smaller"}

    @cached_property
    def _has_masks(self) -> bool:
        """Whether there is a folder of masks, made as this configuration says."""
        self.check_marker()
        return self.mask_folder.is_dir()

    def check_marker(self) -> bool:
        """Whether the folder of masks says how they were made; refuses masks that were made in another way.

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

    def rasterise(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """Label map `[H, W]` uint8 and objects `[H, W]` int32 of an image from the annotations.

        Raises:
            DataError: an annotation is broken, or the image is not in the file.
        """
        self._check(id)
        if id not in self._rows:
            raise DataError(f"image {id!r}: not in {self._annotations}; take it off the list, or set dataset.year")
        last = self._last
        if last is None or last[0] != id:  # a sample wants both, one after the other
            last = (id, *self.index.rasterise(self._rows[id], self.crowd == "ignore"))
            self._last = last
        return last[1], last[2]

    def _read_semantic(self, id: str) -> np.ndarray | None:
        stored = super()._read_semantic(id) if self._has_masks else None
        if stored is not None or not self._annotations.is_file():
            return stored
        return self.rasterise(id)[0]

    def _read_instances(self, id: str) -> np.ndarray | None:
        return self.rasterise(id)[1] if self._annotations.is_file() else None

    def _truth_stamp(self, id: str) -> list[Any]:
        path = self.mask_path(id)
        if self._has_masks and path is not None and path.is_file():
            return [path.stat().st_size, self.crowd]
        if not self._annotations.is_file() or id not in self._rows:
            return [None, None]
        return [int(self.index.checksums[self._rows[id]]), self.crowd]
