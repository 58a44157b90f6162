"""The contract of a data set."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from moduseg.datasets.io import read_image, read_index_png, read_label_png, read_size
from moduseg.datasets.labels import RawLabels, check_ids, resolve_labels
from moduseg.errors import DataError, MissingError
from moduseg.structures import IGNORE_INDEX, Sample


class Dataset(ABC):
    """Images by id, with image-level labels and ground truth where they exist.

    Making one reads nothing; lists, class names and label files are read when first asked for.

    Attributes:
        name: short name, used in folder names and results.
        split: which part of the data set this is.
        root: its folder.
    """

    name: str = ""

    def __init__(self, root: str, split: str) -> None:
        if not root or not split:
            raise ValueError(f"root, split: got {root!r}, {split!r}, expected a folder and the name of a split")
        self.root = Path(root).expanduser()
        self.split = split

    # What a backend supplies ------------------------------------------------------------------------------------------

    @abstractmethod
    def _read_ids(self) -> tuple[list[str], str]:
        """Ids of the split, in order, and the file or folder they come from; `MissingError` where it is absent."""

    @abstractmethod
    def _read_classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""

    def _read_labels(self) -> tuple[RawLabels, str] | None:
        """Image-level labels as stored, and the file they come from; `None` where there is no file."""
        return None

    @abstractmethod
    def image_path(self, id: str) -> Path:
        """The image file of `id`.

        Raises:
            DataError: there is none, or `id` is not one of the split's.
        """

    def mask_path(self, id: str) -> Path | None:
        """Where the semantic ground truth of `id` would be; `None` where the data set has none."""
        return None

    def instance_path(self, id: str) -> Path | None:
        """Where the object ground truth of `id` would be; `None` where the data set has none."""
        return None

    # What every data set does -----------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Image ids of the split, in the list's order; relative paths without suffix, sub-folders allowed.

        Raises:
            MissingError: a folder or list is absent.
            DataError: an id leaves the folder, or is listed twice.
        """
        ids, where = self._read_ids()
        if not ids:
            raise MissingError(
                f"{where}: got no image for split {self.split!r}, expected one or more; see data/README.md"
            )
        return check_ids(ids, where)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""
        return self._read_classes()

    @property
    def num_classes(self) -> int:
        """Foreground classes `C`; label maps hold 0..C and 255."""
        return len(self.classes) - 1

    @property
    def has_truth(self) -> bool:
        """Whether there is a folder of semantic ground truth (single images may still lack theirs)."""
        path = self.mask_path(self.ids[0])
        return path is not None and self._truth_folder(path).is_dir()

    @property
    def label_source(self) -> str:
        """Where image-level labels come from: `json`, `csv`, `masks` or `none`."""
        if self._labels is not None:
            return Path(self._labels[1]).suffix.removeprefix(".").lower()
        return "masks" if self.has_truth else "none"

    def __len__(self) -> int:
        return len(self.ids)

    def labels_of(self, id: str) -> tuple[int, ...] | None:
        """Ascending class ids of the image-level labels; `None` where unknown.

        Raises:
            DataError: a label is unknown or out of range, or the mask it is read from is damaged.
        """
        self._check(id)
        if self._labels is None:
            semantic = self._read_semantic(id)
            return None if semantic is None else present_classes(semantic)
        entry = self._labels[0].get(id)
        return None if entry is None else resolve_labels(entry, self.classes, id, self._labels[1])

    def load(self, id: str, truth: bool = False, labels: bool = True) -> Sample:
        """One image with its image-level labels.

        Args:
            id: one of `ids`.
            truth: whether to read semantic and instance ground truth, where they exist.
            labels: whether to read image-level labels (inference needs none).

        Raises:
            DataError: the image, its labels or its ground truth cannot be used.
        """
        self._check(id)
        image = read_image(self.image_path(id))
        semantic = self._read_semantic(id) if truth else None
        instances = self._read_instances(id) if truth else None
        for what, array in (("label map", semantic), ("instance map", instances)):
            if array is not None and array.shape != image.shape[:2]:
                raise DataError(
                    f"image {id!r}: its {what} has {_size_text(array)}, expected the image's {_size_text(image)} "
                    "(EXIF orientation applied); make it again at that size"
                )
        if not labels:
            known = None
        elif semantic is not None and self._labels is None:
            known = present_classes(semantic)
        else:
            known = self.labels_of(id)
        return Sample(id, image, known, semantic, instances)

    def image_size(self, id: str) -> tuple[int, int]:
        """`(H, W)` of an image, from its header.

        Raises:
            DataError: the image is absent or unreadable.
        """
        return read_size(self.image_path(id))

    def fingerprint(self) -> str:
        """sha256, hexadecimal, of what decides results but is not configured.

        Ids, classes, image-level labels and the sizes in bytes of masks count; paths and times do not, so copies on
        other machines agree. Images are left to the loop of the stages, which redoes the batch of one that changed.
        """
        labels = self._labels[0] if self._labels is not None else {}
        rows = []
        for id in self.ids:
            truth = [_bytes_of(path) for path in (self.mask_path(id), self.instance_path(id))]
            rows.append([id, *truth, sorted(str(v) for v in labels[id]) if id in labels else None])
        content = json.dumps([self.classes, self.label_source, rows])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _labels(self) -> tuple[RawLabels, str] | None:
        return self._read_labels()

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.ids)

    def _check(self, id: str) -> None:
        if id not in self._known:
            raise DataError(f"image {id!r}: not in split {self.split!r} of {self.name}; see the data set's ids")

    def _truth_folder(self, path: Path) -> Path:
        return path.parent

    def _read_semantic(self, id: str) -> np.ndarray | None:
        path = self.mask_path(id)
        if path is None or not path.is_file():
            return None
        semantic = read_label_png(path)
        found = np.flatnonzero(np.bincount(semantic.ravel(), minlength=256)[:IGNORE_INDEX])
        if len(found) and int(found[-1]) > self.num_classes:
            raise DataError(
                f"{path}: image {id!r} has label id {int(found[-1])}, expected 0..{self.num_classes} or 255 as there "
                f"are {self.num_classes} classes beside background; correct the mask or the class list"
            )
        return semantic

    def _read_instances(self, id: str) -> np.ndarray | None:
        path = self.instance_path(id)
        if path is None or not path.is_file():
            return None
        instances = read_index_png(path)
        # 255 is the contour of VOC's 8-bit object maps, not an object.
        return np.where(instances == IGNORE_INDEX, 0, instances) if instances.max(initial=0) <= 255 else instances


def present_classes(semantic: np.ndarray) -> tuple[int, ...]:
    """Ascending foreground ids of a label map (`[H, W]` uint8), 255 left out."""
    counts = np.bincount(semantic.ravel(), minlength=256)
    return tuple(int(c) for c in np.flatnonzero(counts) if 0 < c < IGNORE_INDEX)


def find_image(folder: Path, id: str, suffixes: tuple[str, ...]) -> Path:
    """`folder/id` with the first suffix that exists.

    Raises:
        DataError: none does.
    """
    for suffix in suffixes:
        path = folder / (id + suffix)
        if path.is_file():
            return path
    raise DataError(
        f"image {id!r}: no file {folder / id} with suffix {', '.join(suffixes)}; put it there or take the id off "
        "the list"
    )


def require_folder(path: Path, key: str, layout: str) -> None:
    """`path` is a folder.

    Raises:
        MissingError: it is not; one line with the key, the layout expected and the remedy.
    """
    if not path.is_dir():
        raise MissingError(
            f"{key}: got '{path}', no such folder; expected {layout} (data/README.md); set {key}=<folder>"
        )


def _size_text(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} pixels"


def _bytes_of(path: Path | None) -> int | None:
    return path.stat().st_size if path is not None and path.is_file() else None
