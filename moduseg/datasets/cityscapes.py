"""Cityscapes: nineteen classes of street scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moduseg.datasets.base import Dataset, require_folder
from moduseg.datasets.classes import CITYSCAPES_CLASSES, CITYSCAPES_LABELS
from moduseg.datasets.labels import read_list
from moduseg.errors import DataError, LabelIdError, MissingError
from moduseg.structures import IGNORE_INDEX

PUBLISHED_SIZES = {"train": 2975, "val": 500, "test": 1525}
"""Number of finely annotated images in each split."""
_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
_VOID = 33
"""The largest id of `labelIds` files; 255 stands for id -1 (licence plates)."""
_IDS = np.full(256, IGNORE_INDEX, dtype=np.uint8)
_IDS[list(CITYSCAPES_LABELS)] = np.arange(1, len(CITYSCAPES_LABELS) + 1)


class CityscapesDataset(Dataset):
    """`leftImg8bit/<split>/<city>/*_leftImg8bit.png` and `gtFine/<split>/<city>/*_gtFine_labelIds.png`.

    Ids are `<city>/<city>_<sequence>_<frame>`. The 19 evaluated labels become 1..19 (`trainId + 1`), every other label
    is 255: ground truth has no background (`has_background` is false), since each pixel of a street is something. A
    prediction's 0 only says that no proposal covered the pixel. The strict number counts such a pixel as a miss of its
    true class; the published one left it out, which flatters (docs/method.md, published numbers). There are no objects
    here: `instanceIds` has none for road, sky and their like, which proposals have to find as well.

    Args:
        root: the folder that holds `leftImg8bit/` and `gtFine/`.
        split: `train`, `val` or `test`; the annotations of `test` are blanks, and count as none.
        list_dir: folder of `<split>.txt` with ids, below `root`; `None` takes every image, in the order of their names.
        labels: where image-level labels come from (the values of `Dataset`).

    Raises:
        ValueError: another split.
    """

    name = "cityscapes"
    has_background = False

    def __init__(self, root: str, split: str, list_dir: str | None = None, labels: str = "auto") -> None:
        super().__init__(root, split, labels)
        if split not in PUBLISHED_SIZES:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(PUBLISHED_SIZES)}")
        self._images = self.root / "leftImg8bit" / split
        self._masks = self.root / "gtFine" / split
        self._list = self.root / list_dir / f"{split}.txt" if list_dir else None

    @property
    def published_size(self) -> int | None:
        """Number of finely annotated images in the split."""
        return PUBLISHED_SIZES[self.split]

    def _read_ids(self) -> tuple[list[str], str]:
        layout = "leftImg8bit/<split>/<city>/ and gtFine/<split>/<city>/"
        require_folder(self.root, "dataset.root", layout)
        require_folder(self._images, "dataset.root", layout)
        if self._list is None:
            paths = sorted(self._images.glob(f"*/*{_IMAGE}"))
            return [p.relative_to(self._images).as_posix().removesuffix(_IMAGE) for p in paths], str(self._images)
        if not self._list.is_file():
            raise MissingError(f"dataset.list_dir: no such list {self._list}; expected ids, one a line; leave it null")
        return read_list(self._list), str(self._list)

    def _read_classes(self) -> tuple[str, ...]:
        return CITYSCAPES_CLASSES

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        path = self._images / f"{image_id}{_IMAGE}"
        if not path.is_file():
            raise DataError(f"image {image_id!r}: no file {path}; put it there or take the id off the list")
        return path

    def mask_path(self, image_id: str) -> Path | None:
        return None if self.split == "test" else self._masks / f"{image_id}{_MASK}"

    def _truth_folder(self, path: Path) -> Path:
        return self._masks

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored = super()._read_semantic(image_id)
        if stored is None:
            return None
        counts = np.bincount(stored.ravel(), minlength=256)
        if unknown := [int(i) for i in np.flatnonzero(counts) if _VOID < i < IGNORE_INDEX]:
            raise LabelIdError(
                f"{self.mask_path(image_id)}: image {image_id!r} has label id {unknown[0]}, expected 0..{_VOID} or "
                "255; take the labelIds files of gtFine"
            )
        return _IDS[stored]
