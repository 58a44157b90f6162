"""Pictures of the regions of a bank: the part of the training image, with the region outlined."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

import cv2
import numpy as np

from moduseg import datasets
from moduseg.bank.edit import files_of
from moduseg.bank.store import Bank
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import read_image, read_label_png
from moduseg.errors import ModusegError
from moduseg.files import read_json
from moduseg.report.overlay import outlines, resize_image, resize_labels

_MARGIN = 0.15
"""What is shown around a region, as a share of its longer side."""
_DIMMED = 0.45
_MAX_DEPTH = 20
"""Banks made of banks made of banks: how far back label maps are looked for."""


class RegionPictures:
    """Pictures of a bank's regions, found through the folders it was made from.

    Training images are found through the bank's data set, or are files that the bank names; regions are those of the
    pseudo masks. Where these are no longer at hand, there is no picture, or one without outline.

    Args:
        folder: of the bank.
        bank: what is in it.
        size: longest side of a picture, in pixels.
    """

    def __init__(self, folder: Path, bank: Bank, size: int = 160) -> None:
        self._folder, self._bank, self._size = folder, bank, size
        self._given: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._read = lru_cache(maxsize=32)(self._read_image)

    def give(self, image_id: str, class_name: str, image: np.ndarray, mask: np.ndarray) -> None:
        """Say what a region is that no folder holds: `[H, W, 3]` uint8 and `[H, W]` bool."""
        self._given[image_id, class_name] = (image, mask)

    def picture(self, image_id: str, class_name: str) -> np.ndarray | None:
        """`[h, w, 3]` uint8 of the region of a class in an image; `None` where the image is not at hand."""
        image, mask = self._given.get((image_id, class_name), (None, None))
        if image is None:
            image, mask = self._read(image_id), self._mask(image_id, class_name)
        if image is None:
            return None
        if mask is not None and (mask.shape != image.shape[:2] or not mask.any()):
            mask = None
        return region_picture(image, mask, self._size)

    def image(self, image_id: str) -> np.ndarray | None:
        """`[H, W, 3]` uint8 of a training image; `None` where it is not at hand."""
        return self._read(image_id)

    def label_map(self, image_id: str) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """`[H, W]` uint8 pseudo mask of a training image and the class names of its ids; `None` where there is none."""
        for folder, classes in self._label_maps:
            file = folder / f"{image_id}.png"
            if file.is_file():
                return read_label_png(file), classes
        return None

    def _read_image(self, image_id: str) -> np.ndarray | None:
        named = files_of(self._bank).get(image_id)
        try:
            if named is not None:
                return read_image(Path(named))
            dataset = self._dataset
            return None if dataset is None else read_image(dataset.image_path(image_id))
        except ModusegError:
            return None  # the picture was moved; what is said of the region stands without it

    @cached_property
    def _dataset(self) -> Dataset | None:
        config = dict(self._bank.info.get("config", {}).get("dataset", {}))
        split = str(self._bank.info.get("split", ""))
        try:
            dataset = datasets.build(config, split)
            return dataset if dataset.ids else None
        except ModusegError:
            return None

    @cached_property
    def _label_maps(self) -> list[tuple[Path, tuple[str, ...]]]:
        """Folders of label maps with the class names of their ids, the bank's own first."""
        found: list[tuple[Path, tuple[str, ...]]] = []
        _collect(self._folder, found, _MAX_DEPTH)
        return found

    def _mask(self, image_id: str, class_name: str) -> np.ndarray | None:
        for folder, classes in self._label_maps:
            file = folder / f"{image_id}.png"
            if class_name in classes and file.is_file():
                return np.asarray(read_label_png(file) == classes.index(class_name))
        return None


def _collect(folder: Path, found: list[tuple[Path, tuple[str, ...]]], depth: int) -> None:
    if depth == 0 or not (folder / "bank.json").is_file():
        return
    classes = tuple(read_json(folder / "bank.json")["classes"])
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    inputs = manifest.get("inputs", {})
    own = [folder / "labels"] + ([Path(inputs["pseudo_masks"]) / "labels"] if "pseudo_masks" in inputs else [])
    found.extend((place, classes) for place in own if place.is_dir())
    parents = [Path(inputs["build_bank"])] if "build_bank" in inputs else []
    parents += [Path(source["path"]) for source in manifest.get("derived_from", [])]
    for parent in parents:
        _collect(parent, found, depth - 1)


def region_picture(image: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
    """The part of an image around a region, the rest dimmed, the region outlined.

    Args:
        image: `[H, W, 3]` uint8.
        mask: `[H, W]` bool with a pixel at least; `None` for the whole image.
        size: longest side of the result.
    """
    height, width = image.shape[:2]
    top, bottom, left, right = 0, height, 0, width
    if mask is not None:
        x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        margin = max(4, round(_MARGIN * max(w, h)))
        top, bottom = max(0, y - margin), min(height, y + h + margin)
        left, right = max(0, x - margin), min(width, x + w + margin)
    part = image[top:bottom, left:right]
    scale = size / max(part.shape[:2])
    shown = (max(1, round(part.shape[0] * scale)), max(1, round(part.shape[1] * scale)))
    picture = resize_image(np.ascontiguousarray(part), shown).copy()
    if mask is not None:
        inside = resize_labels(np.ascontiguousarray(mask[top:bottom, left:right]), shown)
        picture[~inside] = (picture[~inside] * _DIMMED).astype(np.uint8)
        picture[outlines(inside.astype(np.uint8))] = 255
    return picture
