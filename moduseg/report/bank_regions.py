"""Find and draw the regions of a bank: the part of the training image with the region outlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import cv2
import numpy as np

from moduseg import datasets
from moduseg.bank.edit import files_of
from moduseg.bank.store import Bank
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import ImageRange, check_image_range, read_image, read_label_png
from moduseg.datasets.labels import check_id
from moduseg.errors import DataError, ModusegError
from moduseg.files import read_json
from moduseg.report.overlay import find_outlines, resize_image, resize_labels

_MARGIN = 0.15
"""Margin around a region, as a share of its longer side."""
_SURROUNDINGS_BRIGHTNESS = 0.45
_MAX_DEPTH = 20
"""Generations of source banks in which label maps are searched for."""


@dataclass(frozen=True)
class PictureLimits:
    """Which training images may be shown, see `RegionPictures`.

    Attributes:
        picture_folders: folders whose pictures may be shown.
        is_public: whether others see the pictures.
    """

    picture_folders: Sequence[Path] = ()
    is_public: bool = False


class RegionPictures:
    """Finds the training images and pseudo masks behind a bank, and draws its regions.

    Training images are found through the bank's data set, or are files that the bank names; regions are those of the
    pseudo masks. If an image is gone, its regions have no picture; if a pseudo mask is gone, no outline.

    A bank may come from a stranger, who could name any picture of this machine. So files that it names are shown only
    if they are below the bank's folder, `picture_folders`, or the current folder (unless the home folder is below it).

    Args:
        folder: of the bank.
        bank: its content.
        size: longer side of a picture, in pixels.
        picture_folders: folders whose pictures may be shown.
        is_public: whether others see the pictures: then those of the data set and of the current folder are shown only
            if they are below the bank's folder or `picture_folders` as well.
    """

    def __init__(
        self,
        folder: Path,
        bank: Bank,
        size: int = 160,
        *,
        picture_folders: Sequence[Path] = (),
        is_public: bool = False,
    ) -> None:
        self._folder, self._bank, self._size = folder, bank, size
        self._is_public = is_public
        folders = [folder, *picture_folders, *([] if is_public else _find_current_folder())]
        self._allowed = [allowed.expanduser().resolve() for allowed in folders]
        self._read = lru_cache(maxsize=32)(self._read_image)

    def draw(self, image_id: str, class_name: str) -> np.ndarray | None:
        """Draw the region of a class in an image, `[h, w, 3]` uint8; `None` if the image is gone."""
        image, mask = self._read(image_id), self._mask(image_id, class_name)
        if image is None:
            return None
        if mask is not None and (mask.shape != image.shape[:2] or not mask.any()):
            mask = None
        return draw_region(image, mask, self._size)

    def find_image(self, image_id: str) -> np.ndarray | None:
        """Return a training image, `[H, W, 3]` uint8; `None` if it is gone."""
        return self._read(image_id)

    def find_label_map(self, image_id: str) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """Return the `[H, W]` uint8 pseudo mask of a training image and the class names of its ids; `None` if gone."""
        for folder, classes in self._label_maps if _is_inside(image_id) else ():
            file = folder / f"{image_id}.png"
            if file.is_file():
                return read_label_png(file), classes
        return None

    def _read_image(self, image_id: str) -> np.ndarray | None:
        named = files_of(self._bank).get(image_id)
        try:
            if named is not None:
                return read_image(Path(named), self._image_range) if self._may_show(named) else None
            if self._dataset is None or not _is_inside(image_id):
                return None
            path = self._dataset.image_path(image_id)
            if self._is_public and not self._may_show(path):
                return None
            return self._dataset.prepare_image(read_image(path, self._image_range))
        except ModusegError:
            return None  # the file was moved; a region is listed without its picture

    def _may_show(self, file: str | Path) -> bool:
        """Return whether a file that the bank leads to is below one of the folders that may be shown."""
        try:
            path = Path(file).resolve()
        except (OSError, RuntimeError, TypeError, ValueError):  # a loop of links, no text, or a NUL byte
            return False
        return any(path.is_relative_to(folder) for folder in self._allowed)

    @cached_property
    def _image_range(self) -> ImageRange:
        """Values of 16-bit pictures that become black and white, as the images of the bank were read."""
        try:
            return check_image_range(self._bank.info.get("config", {}).get("dataset", {}).get("image_range"))
        except (TypeError, ValueError):  # a bank from a stranger
            return None

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
        """Folders of label maps with the class names of their ids, those of this bank first."""
        return _find_label_maps(self._folder, _MAX_DEPTH)

    def _mask(self, image_id: str, class_name: str) -> np.ndarray | None:
        for folder, classes in self._label_maps if _is_inside(image_id) else ():
            file = folder / f"{image_id}.png"
            if class_name in classes and file.is_file():
                return np.asarray(read_label_png(file) == classes.index(class_name))
        return None


def _is_inside(image_id: str) -> bool:
    """Return whether an id names a file inside the folder of its images."""
    try:
        check_id(image_id, "bank")
    except DataError:
        return False
    return True


def _find_current_folder() -> list[Path]:
    """Return the current folder, unless everything of the person or the machine is below it."""
    current = Path.cwd()
    try:
        return [] if Path.home().is_relative_to(current) else [current]
    except RuntimeError:  # a user without a home folder
        return [current]


def _find_label_maps(folder: Path, depth: int) -> list[tuple[Path, tuple[str, ...]]]:
    if depth == 0 or not (folder / "bank.json").is_file():
        return []
    classes = tuple(read_json(folder / "bank.json")["classes"])
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    inputs = manifest.get("inputs", {})
    folders = [folder / "labels"] + ([Path(inputs["pseudo_masks"]) / "labels"] if "pseudo_masks" in inputs else [])
    label_maps = [(labels, classes) for labels in folders if labels.is_dir()]
    parents = [Path(inputs["build_bank"])] if "build_bank" in inputs else []
    parents += [Path(source["path"]) for source in manifest.get("derived_from", [])]
    return label_maps + [entry for parent in parents for entry in _find_label_maps(parent, depth - 1)]


def draw_region(image: np.ndarray, mask: np.ndarray | None, size: int) -> np.ndarray:
    """Draw the part of an image around a region: the region outlined, its surroundings dimmed.

    Args:
        image: `[H, W, 3]` uint8.
        mask: `[H, W]` bool, not empty; `None` for the full image.
        size: longer side of the result.
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
        picture[~inside] = (picture[~inside] * _SURROUNDINGS_BRIGHTNESS).astype(np.uint8)
        picture[find_outlines(inside.astype(np.uint8))] = 255
    return picture
