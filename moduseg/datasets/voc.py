"""PASCAL VOC 2012, and every data set in its layout."""

from __future__ import annotations

import warnings
from pathlib import Path

from moduseg.datasets.base import Dataset, find_image, require_folder
from moduseg.datasets.labels import RawLabels, read_classes, read_label_file, read_list, without_suffix
from moduseg.errors import MissingError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PUBLISHED_SIZES = {"train": 1464, "train_aug": 10582, "val": 1449}
"""Images in the splits that published numbers refer to (METHOD, data protocol)."""


class VocDataset(Dataset):
    """A folder in VOC layout.

    Image-level labels come from `<root>/image_labels.json` where it exists, else from the masks.

    Args:
        root: the folder that holds the others.
        split: name of a list in `list_dir`, without `.txt`.
        image_dir, mask_dir, instance_dir, list_dir: folders below `root`; masks and instances may be absent.
        suffixes: image suffixes, tried in order.
        classes_file: class names below `root`, background first; `None` for VOC's twenty.
    """

    name = "voc"

    def __init__(
        self,
        root: str,
        split: str,
        image_dir: str = "JPEGImages",
        mask_dir: str = "SegmentationClass",
        instance_dir: str = "SegmentationObject",
        list_dir: str = "ImageSets/Segmentation",
        suffixes: tuple[str, ...] = (".jpg", ".png"),
        classes_file: str | None = None,
    ) -> None:
        super().__init__(root, split)
        if not suffixes or not all(s.startswith(".") for s in suffixes):
            raise ValueError(f"suffixes: got {suffixes}, expected endings with their dot; try ['.jpg', '.png']")
        self.image_dir = image_dir
        self.mask_dir = mask_dir
        self.instance_dir = instance_dir
        self.list_dir = list_dir
        self.suffixes = tuple(suffixes)
        self.classes_file = classes_file

    def _layout(self) -> str:
        return f"{self.image_dir}/, {self.list_dir}/<split>.txt and, for truth, {self.mask_dir}/"

    @property
    def _list_name(self) -> str:
        return self.split

    def _read_ids(self) -> tuple[list[str], str]:
        require_folder(self.root, "dataset.root", self._layout())
        require_folder(self.root / self.image_dir, "dataset.image_dir", self._layout())
        path = self.root / self.list_dir / f"{self._list_name}.txt"
        if not path.is_file():
            found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
            raise MissingError(
                f"dataset split: got {self.split!r}, no such list {path}; expected one of: {found}; set "
                "dataset.train_split / dataset.val_split (data/README.md)"
            )
        ids = [self._id_of(line) for line in read_list(path)]
        expected = PUBLISHED_SIZES.get(self.split)
        if self.classes_file is None and self.name == "voc" and expected not in (None, len(ids)):
            warnings.warn(
                f"{path}: got {len(ids)} images, the published split {self.split!r} has {expected}; results are not "
                "comparable with published ones",
                stacklevel=2,
            )
        return ids, str(path)

    def _id_of(self, line: str) -> str:
        # Lists of the augmented split often read "/JPEGImages/<id>.jpg /SegmentationClassAug/<id>.png"; the devkit's
        # per-class lists have a second column.
        first = line.split()[0]
        prefix = f"{self.image_dir}/"
        if first.removeprefix("/").startswith(prefix):
            first = without_suffix(first.removeprefix("/").removeprefix(prefix))
        return first

    def _read_classes(self) -> tuple[str, ...]:
        if self.classes_file is None:
            return VOC_CLASSES
        path = self.root / self.classes_file
        if not path.is_file():
            raise MissingError(
                f"dataset.classes_file: got {self.classes_file!r}, no such file {path}; expected class names, one a "
                "line, background first; set dataset.classes_file=null for VOC's twenty"
            )
        return read_classes(path)

    def _read_labels(self) -> tuple[RawLabels, str] | None:
        path = self.root / "image_labels.json"
        return (read_label_file(path), str(path)) if path.is_file() else None

    def image_path(self, id: str) -> Path:
        self._check(id)
        return find_image(self.root / self.image_dir, id, self.suffixes)

    def mask_path(self, id: str) -> Path | None:
        return self.root / self.mask_dir / f"{id}.png"

    def instance_path(self, id: str) -> Path | None:
        return self.root / self.instance_dir / f"{id}.png"

    def _truth_folder(self, path: Path) -> Path:
        return self.root / self.mask_dir
