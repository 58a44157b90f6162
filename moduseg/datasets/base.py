"""What every data set offers: images by id, image-level labels, ground truth."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moduseg.datasets.io import ImageRange, read_image, read_index_png, read_label_png, read_size
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

    Construction reads nothing; lists, class names and label files are read on first use.

    Args:
        root: folder of the data set.
        split: name of the part to open.
        labels: where image-level labels come from. `auto`: the data set's own label file, and where it has none the
            masks; `masks`: the classes in the masks; one of `extra_sources`; else a `.json`, `.csv` or `.npy` file, or
            a folder of files named by split, below `root` or absolute.

    Attributes:
        name: short name, used in folder names and results.
        extra_sources: values of `labels` that only this data set knows (`xml`, `instances`).
        has_background: id 0 is a class of the ground truth. Where it is not (ADE20K, Cityscapes), ground truth holds
            `1..C` and 255 only; a predicted 0 says that nothing covered the pixel. Counting it as a miss of the true
            class is the strict number, leaving such pixels out the flattering one (docs/method.md, published numbers).
            The background itself is no class to average over.
        masks_optional: single images may lack ground truth.
        image_range: values of 16-bit pictures that become black and white; see `moduseg.datasets.io.read_image`.

    Raises:
        ValueError: no root or split, or `labels` is none of these.
    """

    name: str = ""
    extra_sources: ClassVar[tuple[str, ...]] = ()
    has_background: bool = True
    masks_optional: ClassVar[bool] = False
    image_range: ImageRange = None

    def __init__(self, root: str, split: str, labels: str = "auto") -> None:
        if not root or not split:
            raise ValueError(f"root, split: got {root!r}, {split!r}, expected a folder and the name of a split")
        if not labels or Path(labels).suffix.lower() not in ("", *LABEL_SUFFIXES):
            raise ValueError(f"labels: got {labels!r}, expected {self._describe_sources()}; try auto")
        self.root = Path(root).expanduser()
        self.split = split
        self.labels = labels

    # What a backend implements ----------------------------------------------------------------------------------------

    @abstractmethod
    def _read_ids(self) -> tuple[list[str], str]:
        """Ids of the split, in order, and the file or folder they come from; `MissingError` where it is absent."""

    @abstractmethod
    def _read_classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""

    def _read_labels(self) -> LabelFile | None:
        """The data set's own file of image-level labels; `None` where there is none."""
        return None

    def _read_annotated(self, image_id: str) -> tuple[tuple[Label, ...], str] | None:
        """Labels of one image from the extra source that `labels` names, and the file that holds them."""
        raise NotImplementedError

    def prepare_image(self, image: np.ndarray) -> np.ndarray:
        """Return the part of a stored picture `[H, W, 3]` uint8 that the data set is about."""
        return image

    def label_names(self, image_id: str) -> tuple[str, ...]:
        """Names under which a label file may list an image; the id comes first."""
        return (image_id,)

    @property
    def list_name(self) -> str:
        """File name, without suffix, of lists and label files of this split."""
        return self.split

    @property
    def published_size(self) -> int | None:
        """Number of images in the split that published numbers refer to; `None` if there is no such number."""
        return None

    @abstractmethod
    def image_path(self, image_id: str) -> Path:
        """Return the image file of `image_id`.

        Raises:
            DataError: there is none, or `image_id` is not one of the split's.
        """

    def mask_path(self, image_id: str) -> Path | None:
        """Return where the semantic ground truth of an image would be; `None` if the data set has none."""
        return None

    def other_mask_path(self, image_id: str) -> Path | None:
        """Return the path that a second published ground truth of an image has; `None` if the data set has but one."""
        return None

    def instance_path(self, image_id: str) -> Path | None:
        """Return where the object ground truth of an image would be; `None` if the data set has none."""
        return None

    # What every data set inherits -------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Image ids of the split, in the list's order; relative paths without suffix, sub-folders allowed.

        A split whose size is not the published one is used, with a warning.

        Raises:
            MissingError: a folder or list is absent.
            DataError: an id leaves the folder, or is listed twice.
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

    @property
    def is_written(self) -> bool:
        """Whether reading the ids writes nothing."""
        return True

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""
        return self._read_classes()

    @property
    def class_colours(self) -> dict[str, str]:
        """Colours of one's own in which classes are shown, name -> `#rrggbb`; label files keep VOC's palette."""
        return {}

    @property
    def has_classes(self) -> bool:
        """Whether the data set names its classes; images alone can still be labelled from a vocabulary."""
        return True

    @property
    def num_classes(self) -> int:
        """Number of foreground classes `C`; label maps hold 0..C and 255."""
        return len(self.classes) - 1

    @property
    def has_truth(self) -> bool:
        """True if at least one image of the split has semantic ground truth.

        VOC's `test` has none, though its folder holds the masks of other splits.
        """
        first = self.mask_path(self.ids[0])
        if first is None or not self._truth_folder(first).is_dir():
            return False
        paths = (self.mask_path(image_id) for image_id in self.ids)
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

    def labels_of(self, image_id: str) -> tuple[int, ...] | None:
        """Return the ascending class ids of an image's labels; `None` if they are unknown.

        Raises:
            DataError: a label is unknown or out of range, or the mask it is read from is damaged.
        """
        self._check(image_id)
        if self._labels_in_masks:
            semantic = self.semantic_of(image_id)
            return None if semantic is None else present_classes(semantic)
        stored = self._read_stored_labels(image_id)
        return None if stored is None else resolve_labels(stored[0], self.classes, image_id, stored[1])

    def semantic_of(self, image_id: str) -> np.ndarray | None:
        """Read the ground truth of an image: `[H, W]` uint8, 0..C and 255; `None` if it has none.

        Raises:
            LabelIdError: it holds an id that is no class.
            DataError: it is damaged.
        """
        self._check(image_id)
        semantic = self._read_semantic(image_id)
        if semantic is not None:
            # Adding 1 in uint8 turns the ignored 255 into 0, so that it cannot be the maximum.
            highest = int((semantic + np.uint8(1)).max(initial=0)) - 1
            if highest > self.num_classes:
                raise LabelIdError(
                    f"{self.mask_path(image_id)}: image {image_id!r} has label id {highest}, expected "
                    f"0..{self.num_classes} or 255 as there are {self.num_classes} classes beside background; "
                    "correct the mask or the class list"
                )
        return semantic

    def instances_of(self, image_id: str) -> np.ndarray | None:
        """Read the ground-truth objects of an image: `[H, W]` int32, 0 for no object; `None` if it has no such file.

        Raises:
            DataError: it is damaged.
        """
        self._check(image_id)
        return self._read_instances(image_id)

    def load(self, image_id: str, *, truth: bool = False, labels: bool = True) -> Sample:
        """Read one image with its image-level labels.

        Args:
            image_id: one of `ids`.
            truth: read semantic and instance ground truth too, if they exist.
            labels: read image-level labels (inference needs none).

        Raises:
            DataError: the image, its labels or its ground truth cannot be used.
        """
        self._check(image_id)
        image = self.prepare_image(read_image(self.image_path(image_id), self.image_range))
        semantic = self.semantic_of(image_id) if truth else None
        instances = self.instances_of(image_id) if truth else None
        for name, array in (("label map", semantic), ("instance map", instances)):
            if array is not None and array.shape != image.shape[:2]:
                raise DataError(
                    f"image {image_id!r}: its {name} has {_format_size(array)}, expected the image's "
                    f"{_format_size(image)} (EXIF orientation applied); make it again at that size"
                )
        if not labels:
            tags = None
        elif semantic is not None and self._labels_in_masks:
            tags = present_classes(semantic)
        else:
            tags = self.labels_of(image_id)
        return Sample(image_id, image, tags, semantic, instances)

    def image_size(self, image_id: str) -> tuple[int, int]:
        """Read the `(height, width)` of an image from its header.

        Raises:
            DataError: the image is absent or unreadable.
        """
        return read_size(self.image_path(image_id))

    def fingerprint(self) -> str:
        """Return the hexadecimal sha256 of what decides results but is not configured.

        Ids, classes, image-level labels and the sizes in bytes of masks count. Paths and times do not, so copies on
        other machines agree. Images do not count either: the loop of the stages repeats the batch of one that changed.
        """
        rows = []
        for image_id in self.ids:
            try:
                stored = None if self._labels_in_masks else self._read_stored_labels(image_id)
            except DataError:
                stored = None  # the stage that reads this image reports the error
            tags = None if stored is None else sorted(str(label) for label in stored[0])
            rows.append([image_id, *self._truth_sizes(image_id), tags])
        # Earlier results, which had no range of values, keep their keys.
        image_range = [] if self.image_range is None else [self.image_range]
        # A view of the same files without their background is another truth.
        views = [] if self.has_background is type(self).has_background else [self.has_background]
        content = json.dumps([self.classes if self.has_classes else (), self.label_source, rows, *image_range, *views])
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def label_file(self) -> LabelFile | None:
        """The file that image-level labels are read from; `None` if they come from elsewhere.

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
                f"{self.root}; expected {self._describe_sources()}; set dataset.labels=auto, or run "
                "scripts/prepare_data.py"
            )
        return read_label_file(path)

    @property
    def _labels_in_masks(self) -> bool:
        return self.labels not in self.extra_sources and self.label_file is None

    def _read_stored_labels(self, image_id: str) -> tuple[tuple[Label, ...], str] | None:
        """Read the labels of one image as stored, and the file that holds them."""
        if self.labels in self.extra_sources:
            return self._read_annotated(image_id)
        file = self.label_file
        key = next((key for key in self.label_names(image_id) if file is not None and key in file.entries), None)
        if file is None or key is None:
            return None
        if file.classes not in (None, self.num_classes):
            raise DataError(
                f"{file.where}: got vectors of {file.classes} entries, expected {self.num_classes} as there are "
                f"{self.num_classes} classes beside background; take the file that belongs to {self.name}"
            )
        return file.entries[key], file.locate(key)

    def _truth_sizes(self, image_id: str) -> list[Any]:
        """JSON values that change whenever the ground truth of an image does."""
        return [_num_bytes(path) for path in (self.mask_path(image_id), self.instance_path(image_id))]

    @classmethod
    def _describe_sources(cls) -> str:
        names = ", ".join(("auto", "masks", *cls.extra_sources))
        return f"{names}, a {', '.join(LABEL_SUFFIXES)} file, or a folder of them named by split"

    @cached_property
    def _id_set(self) -> frozenset[str]:
        return frozenset(self.ids)

    def _check(self, image_id: str) -> None:
        if image_id not in self._id_set:
            raise DataError(f"image {image_id!r}: not in split {self.split!r} of {self.name}; see the data set's ids")

    def _truth_folder(self, path: Path) -> Path:
        return path.parent

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        path = self.mask_path(image_id)
        if path is None or not path.is_file():
            return None
        return read_label_png(path)

    def _read_instances(self, image_id: str) -> np.ndarray | None:
        path = self.instance_path(image_id)
        if path is None or not path.is_file():
            return None
        instances = read_index_png(path)
        # In VOC's 8-bit object maps 255 is the contour of objects, not an object.
        return np.where(instances == IGNORE_INDEX, 0, instances) if instances.max(initial=0) <= 255 else instances


def present_classes(semantic: np.ndarray) -> tuple[int, ...]:
    """Return the ascending foreground ids of a label map (`[H, W]` uint8), without 255."""
    counts = np.bincount(semantic.ravel(), minlength=256)
    return tuple(int(c) for c in np.flatnonzero(counts) if 0 < c < IGNORE_INDEX)


def find_image(folder: Path, image_id: str, suffixes: tuple[str, ...]) -> Path:
    """Return `folder/image_id` with the first suffix that exists.

    Raises:
        DataError: none does.
    """
    for suffix in suffixes:
        path = folder / (image_id + suffix)
        if path.is_file():
            return path
    raise DataError(
        f"image {image_id!r}: no file {folder / image_id} with suffix {', '.join(suffixes)}; put it there or take the "
        "id off the list"
    )


def require_folder(path: Path, key: str, layout: str) -> None:
    """Check that a folder exists.

    Args:
        path: the folder.
        key: configuration key that names it, for the message.
        layout: what the folder should hold, for the message.

    Raises:
        MissingError: there is no such folder.
    """
    if not path.is_dir():
        raise MissingError(
            f"{key}: got '{path}', no such folder; expected {layout} (data/README.md); set {key}=<folder>"
        )


def _format_size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} pixels"


def _num_bytes(path: Path | None) -> int | None:
    return path.stat().st_size if path is not None and path.is_file() else None
