"""Annotations of one's own in COCO's format, as annotation tools export them."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from moduseg.datasets.base import Dataset, require_folder
from moduseg.datasets.coco_json import CocoIndex, read_index
from moduseg.datasets.image_files import index_images, walk_images
from moduseg.datasets.io import check_image_range
from moduseg.datasets.labels import Label
from moduseg.errors import DataError, MissingError, suggest


@dataclass(frozen=True)
class CocoExportOptions:
    """Where the annotations and images are, and how they are read.

    Args:
        annotations: file of the split `train`; its categories are the classes of both splits.
        images: folder of its images, in any sub-folders; `None` is the folder of the annotation file.
        val_annotations: file of the split `val`; `None` is the same file.
        val_images: folder of its images; `None` is `images`, or the folder of `val_annotations`.
        crowd: `count` gives regions of many objects their class, `ignore` makes them 255.
        labels: where image-level labels come from: `instances`, the annotated categories, or the values of `Dataset`.
        image_range: values of 16-bit pictures that become black and white, or `auto`; 0 and 65535 if omitted.
    """

    annotations: str
    images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    crowd: Literal["count", "ignore"] = "count"
    labels: str = "instances"
    image_range: tuple[int, ...] | str | None = None

    def locate(self, split: str) -> tuple[Path, Path]:
        """Return the annotation file and the folder of images of a split, `train` or `val`."""
        is_val = split == "val" and self.val_annotations is not None
        file = Path(str(self.val_annotations) if is_val else self.annotations).expanduser()
        folder = self.val_images if split == "val" and self.val_images is not None else self.images
        return file, file.parent if folder is None else Path(folder).expanduser()


class CocoExport(Dataset):
    """Images and objects of a file in COCO's format with categories of its own.

    A `file_name` of the annotations is looked up below the folder of images. Where a tool wrote a path of another
    machine, its longest end that names a file there counts, and a bare name also stands for a file in a sub-folder.
    The id of an image is its path in that folder without suffix. Masks are rasterised from the outlines, the smaller
    object on top.

    Args:
        options: where the files are, and how they are read.
        split: `train` or `val`.

    Raises:
        ValueError: another split.
    """

    name = "coco_json"
    extra_sources = ("instances",)

    def __init__(self, options: CocoExportOptions, split: str) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split: got {split!r}, expected train or val; set dataset.val_annotations=<file>")
        if not options.annotations:
            raise ValueError("annotations: got '', expected a file in COCO's format; set dataset.annotations=<file>")
        self._annotations, folder = options.locate(split)
        super().__init__(str(folder), split, options.labels)
        self.options = options
        self.image_range = check_image_range(options.image_range)
        self._lock = threading.Lock()
        self._index: CocoIndex | None = None

    @property
    def index(self) -> CocoIndex:
        """The annotations, read on first use and once, with the class ids of the split `train`.

        Raises:
            MissingError: there is no annotation file.
            DataError: it cannot be used, or the split `val` has a category that `train` has not.
        """
        with self._lock:  # stages load images in several threads
            if self._index is None:
                index, train_file = _read_annotations(self._annotations), self.options.locate("train")[0]
                if train_file != self._annotations:
                    index = _adopt_classes(index, _read_annotations(train_file).class_names)
                self._index = index
            return self._index

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Image files by id."""
        require_folder(self.root, "dataset.images", "the images of the annotation file")
        return index_images(walk_images(self.root))

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Row in the index by image id, in the order of the index.

        Raises:
            DataError: two images of the file have the same id.
        """
        names, ends = self.index.ids, defaultdict(list)
        for image_id in self._files:
            ends[PurePosixPath(image_id).name].append(image_id)
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            image_id = _match_name(name, self._files, ends)
            if image_id in rows:
                raise DataError(
                    f"{self._annotations}: got two images that are {image_id!r} below {self.root}, expected each once; "
                    "give each a file_name of its own"
                )
            rows[image_id] = row
        return rows

    def _read_ids(self) -> tuple[list[str], str]:
        ids = list(self._rows)
        if not any(image_id in self._files for image_id in ids):
            raise MissingError(
                f"dataset.images: got '{self.root}', which holds none of the {len(ids)} images of {self._annotations} "
                f"(first {self.index.ids[0]!r}); set dataset.images=<folder>"
                if ids
                else f"{self._annotations}: got no image, expected one or more; export it again with its images"
            )
        return ids, str(self._annotations)

    def _read_classes(self) -> tuple[str, ...]:
        return self.index.class_names

    def _read_annotated(self, image_id: str) -> tuple[tuple[Label, ...], str] | None:
        objects = self.index.objects_of(self._rows[image_id])
        is_counted = ~self.index.crowd[objects] | (self.options.crowd == "count")
        labels = np.unique(self.index.classes[objects][is_counted])
        return tuple(labels[labels > 0].tolist()), str(self._annotations)

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        if image_id not in self._files:
            raise DataError(
                f"image {image_id!r}: no such image below {self.root}, which {self._annotations} names; put it there, "
                "or take it out of the annotations"
            )
        return self._files[image_id]

    @property
    def has_truth(self) -> bool:
        """True if the annotations have outlines; those for detection have boxes alone."""
        return self.index.has_outlines

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        return self._rasterise(image_id)[0] if self.has_truth else None

    def _read_instances(self, image_id: str) -> np.ndarray | None:
        return self._rasterise(image_id)[1] if self.has_truth else None

    def _rasterise(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        return self.index.rasterise(self._rows[image_id], self.options.crowd == "ignore")

    def _truth_sizes(self, image_id: str) -> list[Any]:
        return [int(self.index.checksums[self._rows[image_id]]), self.options.crowd]


def _read_annotations(path: Path) -> CocoIndex:
    if not path.is_file():
        raise MissingError(
            f"dataset.annotations: got '{path}', no such file; expected a JSON file in COCO's format; set "
            "dataset.annotations=<file>"
        )
    return read_index(path, has_own_categories=True)


def _adopt_classes(index: CocoIndex, class_names: tuple[str, ...]) -> CocoIndex:
    """Return the index with class ids of another list.

    Raises:
        DataError: an object has a class that the list does not have.
    """
    ids = np.zeros(len(index.class_names), np.uint8)
    used = set(np.unique(index.classes).tolist())
    for label, name in enumerate(index.class_names):
        if name in class_names:
            ids[label] = class_names.index(name)
        elif label in used:
            close = suggest(name, class_names)
            hint = f"did you mean {close!r}?" if close else "rename it, or add the category to dataset.annotations"
            raise DataError(
                f"{index.path}: got category {name!r}, expected one of the {len(class_names) - 1} categories of the "
                f"training annotations; {hint}"
            )
    return replace(index, classes=ids[index.classes], class_names=class_names)


def _match_name(name: str, files: dict[str, Path], ends: dict[str, list[str]]) -> str:
    """Return the id of the file that a name of the annotations stands for, the name itself if there is none.

    Args:
        name: `file_name` without suffix; possibly a path of another machine.
        files: image files by id.
        ends: ids by the last part of their path.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..") and part[-1] != ":"]
    for start in range(len(parts)):
        if (image_id := "/".join(parts[start:])) in files:
            return image_id
    rest = "/".join(parts)
    matches = [image_id for image_id in ends.get(rest.rpartition("/")[2], ()) if image_id.endswith(f"/{rest}")]
    return matches[0] if len(matches) == 1 else rest or name
