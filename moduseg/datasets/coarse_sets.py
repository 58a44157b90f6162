"""COCO-Stuff-27 and Cityscapes-27: coarse classes, and pictures, by which unsupervised segmentation is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np

from moduseg.datasets.base import Dataset
from moduseg.datasets.cityscapes import CityscapesDataset
from moduseg.datasets.coarse_classes import (
    CITYSCAPES27_CLASSES,
    COCO_STUFF27_CLASSES,
    to_cityscapes27,
    to_coco_stuff27,
)
from moduseg.datasets.coco_stuff import CocoStuffDataset
from moduseg.datasets.io import read_label_png
from moduseg.datasets.pictures import PictureProtocol, cut_picture, plan_square
from moduseg.errors import LabelIdError
from moduseg.structures import IGNORE_INDEX

NUM_LISTED = 2175
"""Images of val2017 on the list that PiCIE made and every later method evaluates on."""


class _PicturesDataset(Dataset):
    """A data set whose images and label maps are those of a protocol.

    Attributes:
        picture: `whole` images; `diffseg`, the middle square at 512 x 512; `picie`, 320 x 320 of the image at a shorter
            side of 320.
    """

    picture: PictureProtocol = "whole"
    _to_coarse: Callable[[np.ndarray], np.ndarray]

    def _set_picture(self, picture: PictureProtocol) -> None:
        """Check and set the protocol of pictures.

        Raises:
            ValueError: an unknown one.
        """
        if picture not in get_args(PictureProtocol):
            raise ValueError(f"picture: got {picture!r}, expected one of {', '.join(get_args(PictureProtocol))}")
        self.picture = picture

    def image_size(self, image_id: str) -> tuple[int, int]:
        """Read the `(height, width)` of an image's picture; errors as `Dataset.image_size`."""
        size = super().image_size(image_id)
        return size if self.picture == "whole" else plan_square(size, self.picture).size

    def fingerprint(self) -> str:
        """Return the sha256 of what decides results but is not configured, and of the pictures."""
        of_images = super().fingerprint()
        return (
            of_images if self.picture == "whole" else hashlib.sha256(f"{of_images} {self.picture}".encode()).hexdigest()
        )

    def prepare_image(self, image: np.ndarray) -> np.ndarray:
        """Return the picture `[h, w, 3]` uint8 of an image."""
        return self._cut(image, is_label_map=False)

    def _cut(self, array: np.ndarray, *, is_label_map: bool) -> np.ndarray:
        """Return the picture of an image, or of a label map of its size."""
        if self.picture == "whole":
            return array
        square = plan_square((array.shape[0], array.shape[1]), self.picture)
        return cut_picture(array, square, is_label_map=is_label_map)

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        path = self.mask_path(image_id)
        if path is None or not path.is_file():
            return None
        try:
            coarse = self._to_coarse(read_label_png(path))
        except LabelIdError as error:
            raise LabelIdError(f"{path}: image {image_id!r}: {error}") from error
        # Coarse ids are 0..26; here 0 is background.
        return self._cut(np.where(coarse == IGNORE_INDEX, coarse, coarse + np.uint8(1)), is_label_map=True)


class Cityscapes27Dataset(_PicturesDataset, CityscapesDataset):
    """Cityscapes with the 27 labels 7..33 of `labelIds` as classes 1..27; every other one is ignored.

    Args:
        root, split, list_dir, labels: those of `CityscapesDataset`.
        picture: which part of an image is seen and scored, see `_PicturesDataset`.

    Raises:
        ValueError: another split or picture.
    """

    name = "cityscapes27"
    _to_coarse = staticmethod(to_cityscapes27)

    def __init__(
        self,
        root: str,
        split: str,
        list_dir: str | None = None,
        labels: str = "auto",
        picture: PictureProtocol = "whole",
    ) -> None:
        super().__init__(root, split, list_dir, labels)
        self._set_picture(picture)

    def _read_classes(self) -> tuple[str, ...]:
        return ("background", *CITYSCAPES27_CLASSES)


class CocoStuff27Dataset(_PicturesDataset, CocoStuffDataset):
    """COCO-Stuff with the 182 stored ids joined to 27 classes 1..27; 255 is ignored.

    Maps that other tools have brought to 0..170 are not read, as they have lost ids that the coarse classes are made
    of.

    Args:
        root, split, image_dir, mask_dir, list_dir, labels: those of `CocoStuffDataset`.
        picture: which part of an image is seen and scored, see `_PicturesDataset`.

    Raises:
        ValueError: another split or picture.
    """

    name = "coco_stuff27"
    _to_coarse = staticmethod(to_coco_stuff27)

    def __init__(
        self,
        root: str,
        split: str,
        *,
        image_dir: str = ".",
        mask_dir: str = "stuffthingmaps",
        list_dir: str | None = None,
        labels: str = "auto",
        picture: PictureProtocol = "whole",
    ) -> None:
        super().__init__(root, split, image_dir=image_dir, mask_dir=mask_dir, list_dir=list_dir, labels=labels)
        self._set_picture(picture)

    @property
    def published_size(self) -> int | None:
        """Number of images on the list of val; no figure is published for `train`."""
        return NUM_LISTED if self.split == "val" else None

    def mask_path(self, image_id: str) -> Path | None:
        """Return where the map of an image would be."""
        return self._maps / f"{image_id}.png"

    def _read_classes(self) -> tuple[str, ...]:
        return ("background", *COCO_STUFF27_CLASSES)
