"""ADE20K as the scene parsing challenge of 2016 has it: 150 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moduseg.datasets.base import Dataset, find_image, require_folder
from moduseg.datasets.classes import ADE20K_CLASSES
from moduseg.datasets.labels import read_list
from moduseg.errors import MissingError
from moduseg.structures import IGNORE_INDEX

FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
PUBLISHED_SIZES = {"train": 20210, "val": 2000, "test": 3352}
"""Number of images in each split of the challenge."""


class Ade20kDataset(Dataset):
    """`ADEChallengeData2016`: `images/{training,validation}/*.jpg`, `annotations/{training,validation}/*.png`.

    The files of the challenge hold 1..150, and 0 for "other", which its scores leave out. So ids 1..150 are kept and 0
    becomes 255: ground truth has no background here (`has_background` is false), and a prediction's 0 only says
    that no proposal covered the pixel. There are no object masks in this layout.

    Args:
        root: the folder `ADEChallengeData2016`.
        split: `train`, `val`, or `test` (`images/testing/`, without ground truth).
        list_dir: folder of `<split>.txt` with ids, below `root`; `None` takes every image, in the order of their names.
        labels: where image-level labels come from (the values of `Dataset`).

    Raises:
        ValueError: another split.
    """

    name = "ade20k"
    has_background = False

    def __init__(self, root: str, split: str, list_dir: str | None = None, labels: str = "auto") -> None:
        super().__init__(root, split, labels)
        if split not in FOLDERS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(FOLDERS)}")
        self._images = self.root / "images" / FOLDERS[split]
        self._masks = self.root / "annotations" / FOLDERS[split]
        self._list = self.root / list_dir / f"{split}.txt" if list_dir else None

    @property
    def published_size(self) -> int | None:
        """Number of images in the challenge's split."""
        return PUBLISHED_SIZES[self.split]

    def _read_ids(self) -> tuple[list[str], str]:
        layout = "images/{training,validation}/ and annotations/{training,validation}/"
        require_folder(self.root, "dataset.root", layout)
        require_folder(self._images, "dataset.root", layout)
        if self._list is None:
            return sorted(path.stem for path in self._images.glob("*.jpg")), str(self._images)
        if not self._list.is_file():
            raise MissingError(f"dataset.list_dir: no such list {self._list}; expected ids, one a line; leave it null")
        return read_list(self._list), str(self._list)

    def _read_classes(self) -> tuple[str, ...]:
        return ADE20K_CLASSES

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        return find_image(self._images, image_id, (".jpg",))

    def mask_path(self, image_id: str) -> Path | None:
        return self._masks / f"{image_id}.png"

    def _truth_folder(self, path: Path) -> Path:
        return self._masks

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored = super()._read_semantic(image_id)
        return None if stored is None else np.where(stored == 0, np.uint8(IGNORE_INDEX), stored)
