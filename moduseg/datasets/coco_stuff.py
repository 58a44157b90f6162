"""COCO 2017 with the maps of things and stuff (COCO-Stuff): 171 classes, or the 80 things before a background."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moduseg.datasets.base import Dataset, find_image, require_folder
from moduseg.datasets.classes import COCO_CATEGORIES, COCO_CLASSES, COCO_STUFF_CLASSES
from moduseg.datasets.labels import read_list
from moduseg.errors import LabelIdError, MissingError
from moduseg.structures import IGNORE_INDEX

PUBLISHED_SIZES = {"train": 118287, "val": 5000}
"""Number of images in each split of 2017."""
_NUM_THINGS, _LAST = 91, 181
"""Stored ids 0..90 are things (category id - 1), those up to the last one stuff; 255 is unlabelled."""
_THINGS = [category - 1 for category in COCO_CATEGORIES]
_STUFF_IDS = np.full(256, IGNORE_INDEX, np.uint8)
_STUFF_IDS[[*_THINGS, *range(_NUM_THINGS, _LAST + 1)]] = np.arange(1, len(COCO_STUFF_CLASSES))
_OBJECT_IDS = np.full(256, IGNORE_INDEX, np.uint8)
_OBJECT_IDS[_NUM_THINGS : _LAST + 1] = 0
_OBJECT_IDS[_THINGS] = np.arange(1, len(COCO_CLASSES))


class CocoStuffDataset(Dataset):
    """`val2017/<id>.jpg` and `stuffthingmaps/val2017/<id>.png`, likewise `train2017`: 80 things, then 91 stuff classes.

    The stored ids 0..181 become 1..171: things by their category ids, then stuff; the eleven ids that no category has
    and 255 are ignored. Ground truth has no background (`has_background` is false). Maps that other tools have already
    brought to 0..170 are read as `<id>_labelTrainIds.png`.

    Args:
        root: the folder that holds the others.
        split: `train` or `val`.
        image_dir: folder of `train2017/` and `val2017/`, below `root`.
        mask_dir: folder of the maps `train2017/` and `val2017/`, below `root`.
        list_dir: folder of `<split>2017.txt` with ids, below `root`; `None` takes every image, in the order of names.
        labels: where image-level labels come from (the values of `Dataset`).

    Raises:
        ValueError: another split.
    """

    name = "coco_stuff"
    has_background = False
    _suffix, _first_id = "_labelTrainIds", 1
    _ids_of_maps = _STUFF_IDS

    def __init__(
        self,
        root: str,
        split: str,
        *,
        image_dir: str = ".",
        mask_dir: str = "stuffthingmaps",
        list_dir: str | None = None,
        labels: str = "auto",
    ) -> None:
        super().__init__(root, split, labels)
        if split not in PUBLISHED_SIZES:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(PUBLISHED_SIZES)}")
        self._images = self.root / image_dir / f"{split}2017"
        self._maps = self.root / mask_dir / f"{split}2017"
        self._list = self.root / list_dir / f"{self.list_name}.txt" if list_dir else None

    @property
    def list_name(self) -> str:
        """File name, without suffix, of lists and label files of this split: `val2017`."""
        return f"{self.split}2017"

    @property
    def published_size(self) -> int | None:
        """Number of images in the split."""
        return PUBLISHED_SIZES[self.split]

    def _read_ids(self) -> tuple[list[str], str]:
        layout = f"{self.list_name}/ and stuffthingmaps/{self.list_name}/"
        require_folder(self.root, "dataset.root", layout)
        require_folder(self._images, "dataset.root", layout)
        if self._list is None:
            return sorted(path.stem for path in self._images.glob("*.jpg")), str(self._images)
        if not self._list.is_file():
            raise MissingError(f"dataset.list_dir: no such list {self._list}; expected ids, one a line; leave it null")
        return read_list(self._list), str(self._list)

    def _read_classes(self) -> tuple[str, ...]:
        return COCO_STUFF_CLASSES

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        return find_image(self._images, image_id, (".jpg",))

    def mask_path(self, image_id: str) -> Path | None:
        path, converted = self._maps / f"{image_id}.png", self._maps / f"{image_id}{self._suffix}.png"
        return converted if converted.is_file() and not path.is_file() else path

    def _truth_folder(self, path: Path) -> Path:
        return self._maps

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored, path = super()._read_semantic(image_id), self.mask_path(image_id)
        if stored is None or path is None:
            return None
        if path.stem.endswith(self._suffix):
            return np.where(stored == IGNORE_INDEX, stored, stored + np.uint8(self._first_id))
        highest = int(stored[stored != IGNORE_INDEX].max(initial=0))
        if highest > _LAST:
            raise LabelIdError(
                f"{path}: image {image_id!r} has label id {highest}, expected 0..{_LAST} or 255; take the maps of "
                "stuffthingmaps_trainval2017.zip"
            )
        return self._ids_of_maps[stored]


class CocoObjectDataset(CocoStuffDataset):
    """The same files with COCO's 80 things as classes 1..80 and all stuff as background; 255 stays ignored.

    Maps that other tools have already brought to 0..80 are read as `<id>_instanceTrainIds.png`. Arguments and errors
    are those of `CocoStuffDataset`.
    """

    name = "coco_object"
    has_background = True
    _suffix, _first_id = "_instanceTrainIds", 0
    _ids_of_maps = _OBJECT_IDS

    def _read_classes(self) -> tuple[str, ...]:
        return COCO_CLASSES
