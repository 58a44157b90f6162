"""A folder of your own images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from moduseg.datasets.base import Dataset, require_folder
from moduseg.datasets.image_files import index_images, match_masks, walk_images, warn_once
from moduseg.datasets.io import IMAGE_SUFFIXES, check_image_range
from moduseg.datasets.labels import (
    LabelFile,
    check_classes,
    distinct_names,
    drop_suffix,
    read_class_colours,
    read_classes,
    read_label_file,
    read_list,
)
from moduseg.errors import DataError, MissingError

_LAYOUT = "images/ and, if you have them, labels.csv or labels.json, classes.txt, masks/, train.txt, val.txt"


class FolderDataset(Dataset):
    """Images below `images/`, in any sub-folders; `a/b.jpg` has the id `a/b`.

    Image-level labels come from `labels.json` or `labels.csv`, else from `masks/<id>.png` (or `<id>_mask.png`). Class
    names come from `classes.txt` (background first), else they are the names in the label file, in alphabetical order.
    The splits `train` and `val` are the lists `train.txt` and `val.txt`; without its list, `train` is every labelled
    image and `val` every image, less those that the other list names. Any other split needs its list.

    Args:
        root: the folder that holds all of it.
        split: `train`, `val`, or the name of a list.
        labels: where image-level labels come from (the values of `Dataset`).
        image_range: values of 16-bit pictures that become black and white, or `auto`; 0 and 65535 if omitted.

    Raises:
        ValueError: as for `Dataset`, or a range that is none.
    """

    name = "folder"
    masks_optional = True

    def __init__(
        self, root: str, split: str, labels: str = "auto", image_range: tuple[int, ...] | str | None = None
    ) -> None:
        super().__init__(root, split, labels)
        self.image_range = check_image_range(image_range)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Image files by id, in the order of their names."""
        require_folder(self.root, "dataset.root", _LAYOUT)
        folder = self.root / "images"
        require_folder(folder, "dataset.root", _LAYOUT)
        return index_images(walk_images(folder))

    def _read_ids(self) -> tuple[list[str], str]:
        files = self._files
        path = self.root / f"{self.split}.txt"
        if path.is_file():
            listed = [line.removeprefix("images/") for line in read_list(path)]
            return [self._id_of(line) for line in listed], str(path)
        if self.split not in ("train", "val"):
            raise MissingError(
                f"dataset split: got {self.split!r}, no such list {path}; expected train, val or the name of a list; "
                "set dataset.train_split / dataset.val_split (data/README.md)"
            )
        other = self.root / ("val.txt" if self.split == "train" else "train.txt")
        taken = {self._id_of(line.removeprefix("images/")) for line in read_list(other)} if other.is_file() else set()
        ids = [image_id for image_id in files if image_id not in taken]
        if self.split == "train":
            if self.label_file is not None:
                ids = [image_id for image_id in ids if image_id in self.label_file.entries]
                self._warn_of_unmatched_tags(self.label_file)
            elif (self.root / "masks").is_dir():
                ids = [image_id for image_id in ids if self._mask(image_id).is_file()]
            else:
                raise MissingError(
                    f"dataset.root: got '{self.root}' without image-level labels, which the train split needs; "
                    "expected labels.csv, labels.json or masks/; write labels.csv with the header image,labels "
                    "(data/README.md)"
                )
        return ids, str(self.root)

    def _warn_of_unmatched_tags(self, file: LabelFile) -> None:
        names = [name for name in file.entries if name not in self._files]
        if names:
            more = ", ..." if len(names) > 3 else ""
            warn_once(
                f"{file.where}: {len(names)} of {len(file.entries)} names fit no image: {', '.join(names[:3])}{more}"
            )

    def _id_of(self, line: str) -> str:
        # A listed name may carry its suffix; ids that end in one by chance (a file 'x.png.jpg') win over that.
        return line if line in self._files else drop_suffix(line)

    @property
    def class_colours(self) -> dict[str, str]:
        """Colours that lines of `classes.txt` end with, name -> `#rrggbb`."""
        path = self.root / "classes.txt"
        return read_class_colours(path) if path.is_file() else {}

    @property
    def has_classes(self) -> bool:
        """Whether there is `classes.txt` or a label file to take names from."""
        return (self.root / "classes.txt").is_file() or self.label_file is not None

    def _read_classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if path.is_file():
            return read_classes(path)
        require_folder(self.root, "dataset.root", _LAYOUT)
        file = self.label_file
        names = distinct_names(file) if file is not None else None
        if file is None or names is None:
            raise MissingError(
                f"dataset.root: got '{self.root}' without classes.txt, and no label file with names to take them from; "
                "expected class names, one a line, background first; write classes.txt (data/README.md)"
            )
        return check_classes(["background", *names], file.where)

    def _read_labels(self) -> LabelFile | None:
        paths = [self.root / name for name in ("labels.json", "labels.csv") if (self.root / name).is_file()]
        if len(paths) > 1:
            raise DataError(f"{self.root}: got labels.json and labels.csv, expected one of them; set dataset.labels")
        return read_label_file(paths[0]) if paths else None

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        if image_id not in self._files:
            raise DataError(
                f"image {image_id!r}: no file {self.root / 'images' / image_id} with suffix "
                f"{', '.join(IMAGE_SUFFIXES)}; put it there or take the id off the list"
            )
        return self._files[image_id]

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return match_masks(self.root / "masks", self._files)

    def _mask(self, image_id: str) -> Path:
        return self._masks.get(image_id, self.root / "masks" / f"{image_id}.png")

    def mask_path(self, image_id: str) -> Path | None:
        return self._mask(image_id)

    def _truth_folder(self, path: Path) -> Path:
        return self.root / "masks"
