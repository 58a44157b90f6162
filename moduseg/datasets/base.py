"""The contract of a data set."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moduseg.datasets.io import read_image, read_index_png, read_label_png, read_size
from moduseg.datasets.labels import (
    LABEL_SUFFIXES,
    Label,
    LabelFile,
    check_ids,
    find_label_file,
    read_label_file,
    resolve_labels,
)
from moduseg.errors import DataError, LabelIdError, MissingError
from moduseg.structures import IGNORE_INDEX, Sample

log = logging.getLogger("moduseg")


class Dataset(ABC):
    """Images by id, with image-level labels and ground truth where they exist.

    Making one reads nothing; lists, class names and label files are read when first asked for.

    Args:
        root: its folder.
        split: which part of it.
        labels: where image-level labels come from. `auto`: the data set's own label file, and where it has none the
            masks; `masks`: the classes in the masks; one of `extra_sources`; else a `.json`, `.csv` or `.npy` file, or
            a folder of files named by split, below `root` or absolute.

    Attributes:
        name: short name, used in folder names and results.
        extra_sources: values of `labels` that only this data set knows (`xml`, `instances`).
        has_background: whether id 0 is a class of the ground truth. Where it is not (ADE20K, Cityscapes), truth holds
            `1..C` and 255 only; a predicted 0 says that nothing covered the pixel. Counting it as a miss of the true
            class is the strict number, leaving such pixels out the flattering one (docs/method.md, published numbers).
            The background itself is no class to average over.
        masks_optional: whether single images may go without ground truth.

    Raises:
        ValueError: no root or split, or `labels` is none of these.
    """

    name: str = ""
    extra_sources: ClassVar[tuple[str, ...]] = ()
    has_background: ClassVar[bool] = True
    masks_optional: ClassVar[bool] = False

    def __init__(self, root: str, split: str, labels: str = "auto") -> None:
        if not root or not split:
            raise ValueError(f"root, split: got {root!r}, {split!r}, expected a folder and the name of a split")
        if not labels or Path(labels).suffix.lower() not in ("", *LABEL_SUFFIXES):
            raise ValueError(f"labels: got {labels!r}, expected {self._known_sources()}; try auto")
        self.root = Path(root).expanduser()
        self.split = split
        self.labels = labels

    # What a backend supplies ------------------------------------------------------------------------------------------

    @abstractmethod
    def _read_ids(self) -> tuple[list[str], str]:
        """Ids of the split, in order, and the file or folder they come from; `MissingError` where it is absent."""

    @abstractmethod
    def _read_classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""

    def _read_labels(self) -> LabelFile | None:
        """The data set's own file of image-level labels; `None` where there is none."""
        return None

    def _read_annotated(self, id: str) -> tuple[tuple[Label, ...], str] | None:
        """Labels of one image from the source that `labels` names, one of `extra_sources`, and the file they are in."""
        raise NotImplementedError

    def label_names(self, id: str) -> tuple[str, ...]:
        """What an image may be called in a label file, first the id."""
        return (id,)

    @property
    def list_name(self) -> str:
        """What files of this split are called, without suffix."""
        return self.split

    @property
    def published_size(self) -> int | None:
        """Images in the split that published numbers refer to; `None` where nobody says."""
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

        A split whose size is not the published one is used, with a warning.
        """
        ids, where = self._read_ids()
        if not ids:
            raise MissingError(
                f"{where}: got no image for split {self.split!r}, expected one or more; see data/README.md"
            )
        expected = self.published_size
        if expected is not None and expected != len(ids):
            log.warning(
                "%s: got %d images, the published split %r of %s has %d; results are not comparable with published "
                "ones",
                where,
                len(ids),
                self.split,
                self.name,
                expected,
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
        """Whether an image of the split has semantic ground truth (others may lack theirs).

        VOC's `test` has none, though its folder holds the masks of other splits.
        """
        first = self.mask_path(self.ids[0])
        if first is None or not self._truth_folder(first).is_dir():
            return False
        paths = (self.mask_path(id) for id in self.ids)
        return any(path is not None and path.is_file() for path in paths)

    @property
    def label_source(self) -> str:
        """Where image-level labels come from: `masks`, `json`, `csv`, `npy`, one of `extra_sources`, or `none`.

        A JSON file that says what it was made from (those of `scripts/prepare_data.py` do) is called by that.
        """
        if self.labels in self.extra_sources:
            return self.labels
        if self.label_file is not None:
            return self.label_file.source
        return "masks" if self.has_truth else "none"

    def __len__(self) -> int:
        return len(self.ids)

    def labels_of(self, id: str) -> tuple[int, ...] | None:
        """Ascending class ids of the image-level labels; `None` where unknown.

        Raises:
            DataError: a label is unknown or out of range, or the mask it is read from is damaged.
        """
        self._check(id)
        if self._labels_in_masks:
            semantic = self.semantic_of(id)
            return None if semantic is None else present_classes(semantic)
        found = self._stored_labels(id)
        return None if found is None else resolve_labels(found[0], self.classes, id, found[1])

    def semantic_of(self, id: str) -> np.ndarray | None:
        """`[H, W]` uint8 ground truth of an image, 0..C and 255; `None` where it has none.

        Raises:
            LabelIdError: it holds an id that is no class.
            DataError: it is damaged.
        """
        self._check(id)
        semantic = self._read_semantic(id)
        if semantic is not None:
            # In uint8 the ignored 255 becomes 0 and every other id one more.
            highest = int((semantic + np.uint8(1)).max(initial=0)) - 1
            if highest > self.num_classes:
                raise LabelIdError(
                    f"{self.mask_path(id)}: image {id!r} has label id {highest}, expected 0..{self.num_classes} "
                    f"or 255 as there are {self.num_classes} classes beside background; correct the mask or the class "
                    "list"
                )
        return semantic

    def instances_of(self, id: str) -> np.ndarray | None:
        """`[H, W]` int32 ground-truth objects of an image, 0 where there is none; `None` where it has no such truth.

        Raises:
            DataError: it is damaged.
        """
        self._check(id)
        return self._read_instances(id)

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
        semantic = self.semantic_of(id) if truth else None
        instances = self.instances_of(id) if truth else None
        for what, array in (("label map", semantic), ("instance map", instances)):
            if array is not None and array.shape != image.shape[:2]:
                raise DataError(
                    f"image {id!r}: its {what} has {_size_text(array)}, expected the image's {_size_text(image)} "
                    "(EXIF orientation applied); make it again at that size"
                )
        if not labels:
            known = None
        elif semantic is not None and self._labels_in_masks:
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
        rows = []
        for id in self.ids:
            try:
                stored = None if self._labels_in_masks else self._stored_labels(id)
            except DataError:
                stored = None  # the loop of the stages says what is wrong with it
            rows.append([id, *self._truth_stamp(id), None if stored is None else sorted(str(v) for v in stored[0])])
        content = json.dumps([self.classes, self.label_source, rows])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def label_file(self) -> LabelFile | None:
        """The file that image-level labels are read from; `None` where they come from elsewhere.

        Raises:
            MissingError: `labels` names a file that is not there.
            DataError: it cannot be used.
        """
        if self.labels == "auto":
            return self._read_labels()
        if self.labels == "masks" or self.labels in self.extra_sources:
            return None
        path = find_label_file(self.root / Path(self.labels).expanduser(), self.list_name)
        if path is None:
            raise MissingError(
                f"dataset.labels: got {self.labels!r}, no such file or folder with {self.list_name}.json below "
                f"{self.root}; expected {self._known_sources()}; set dataset.labels=auto, or run "
                "scripts/prepare_data.py"
            )
        return read_label_file(path)

    @property
    def _labels_in_masks(self) -> bool:
        return self.labels not in self.extra_sources and self.label_file is None

    def _stored_labels(self, id: str) -> tuple[tuple[Label, ...], str] | None:
        """Labels of one image as stored in a file, and that file."""
        if self.labels in self.extra_sources:
            return self._read_annotated(id)
        file = self.label_file
        key = next((key for key in self.label_names(id) if file is not None and key in file.entries), None)
        if file is None or key is None:
            return None
        if file.classes not in (None, self.num_classes):
            raise DataError(
                f"{file.where}: got vectors of {file.classes} entries, expected {self.num_classes} as there are "
                f"{self.num_classes} classes beside background; take the file that belongs to {self.name}"
            )
        return file.entries[key], file.where

    def _truth_stamp(self, id: str) -> list[Any]:
        """What tells whether the ground truth of an image has changed, JSON values."""
        return [_bytes_of(path) for path in (self.mask_path(id), self.instance_path(id))]

    @classmethod
    def _known_sources(cls) -> str:
        words = ", ".join(("auto", "masks", *cls.extra_sources))
        return f"{words}, a {', '.join(LABEL_SUFFIXES)} file, or a folder of them named by split"

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
        return read_label_png(path)

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
