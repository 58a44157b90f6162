"""PASCAL VOC 2012, and every data set in its layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from moduseg.datasets.base import Dataset, find_image, require_folder
from moduseg.datasets.classes import VOC_CLASSES
from moduseg.datasets.labels import (
    Label,
    LabelFile,
    drop_suffix,
    read_class_colours,
    read_classes,
    read_label_file,
    read_list,
)
from moduseg.errors import DataError, MissingError
from moduseg.structures import IGNORE_INDEX

PUBLISHED_SIZES = {"train": 1464, "train_aug": 10582, "val": 1449, "trainval": 2913, "test": 1456}
"""Number of images in the splits that published numbers refer to (docs/method.md, data protocol)."""
LIST_NAMES = {"train_aug": ("train_aug", "trainaug"), "trainaug": ("trainaug", "train_aug")}
"""File names of a split's list, for splits that are spelled in two ways."""


TRUTHS = {"SegmentationClass": "SegmentationClassAug", "SegmentationClassAug": "SegmentationClass"}
"""The devkit's masks and those of SBD, which most published numbers are scored with; each has the other beside it."""


@dataclass(frozen=True)
class VocOptions:
    """Where the files of a folder in VOC layout are.

    Args:
        root: the folder that holds the others.
        image_dir, mask_dir, instance_dir, list_dir: folders below `root`; masks and instances may be absent.
        suffixes: image suffixes, tried in order.
        classes_file: class names below `root`, background first; `None` for VOC's twenty.
        annotation_dir: folder of `<id>.xml` below `root`; may be absent.
        labels: where image-level labels come from (the values of `Dataset`, or `xml`).
        reduce_zero_label: label 0 is ignored (255) in place of being the class background, as the option of this name
            in other tools has it; ids stay 1..C. Predictions then compete without a background.

    Raises:
        ValueError: a suffix without its dot, or none.
    """

    root: str
    image_dir: str = "JPEGImages"
    mask_dir: str = "SegmentationClass"
    instance_dir: str = "SegmentationObject"
    list_dir: str = "ImageSets/Segmentation"
    suffixes: tuple[str, ...] = (".jpg", ".png")
    classes_file: str | None = None
    annotation_dir: str = "Annotations"
    labels: str = "auto"
    reduce_zero_label: bool = False

    def __post_init__(self) -> None:
        if not self.suffixes or not all(suffix.startswith(".") for suffix in self.suffixes):
            raise ValueError(f"suffixes: got {self.suffixes}, expected endings with their dot; try ['.jpg', '.png']")


class VocDataset(Dataset):
    """A folder in VOC layout.

    Image-level labels come from `<root>/image_labels.json` where it exists, else from the masks. `labels=xml` takes the
    objects of `<annotation_dir>/<id>.xml`, difficult ones included, as those who train on image-level labels of VOC do.

    Args:
        options: where the files are.
        split: name of a list in `list_dir`, without `.txt`; `train_aug` is also found as `trainaug.txt`.
    """

    name = "voc"
    extra_sources = ("xml",)

    def __init__(self, options: VocOptions, split: str) -> None:
        super().__init__(options.root, split, options.labels)
        self.options = options
        if options.reduce_zero_label:
            self.has_background = False
            self.name = "voc20" if options.classes_file is None else self.name
        self._annotated: dict[str, tuple[str, ...]] = {}

    def _layout(self) -> str:
        return (
            f"{self.options.image_dir}/, {self.options.list_dir}/<split>.txt and, for truth, {self.options.mask_dir}/"
        )

    @property
    def published_size(self) -> int | None:
        """Number of images in the published split of VOC 2012; `None` for other classes and other lists."""
        if self.options.classes_file is not None or self.name not in ("voc", "voc20"):
            return None
        return PUBLISHED_SIZES.get(self.split.replace("trainaug", "train_aug"))

    @property
    def has_truth(self) -> bool:
        """True if there is semantic ground truth; VOC's test split has none of its own in the common folder."""
        return super().has_truth and (self.split != "test" or self._mask(self.ids[0]).is_file())

    def _read_ids(self) -> tuple[list[str], str]:
        require_folder(self.root, "dataset.root", self._layout())
        require_folder(self.root / self.options.image_dir, "dataset.image_dir", self._layout())
        folder = self._list_folder()
        names = LIST_NAMES.get(self.list_name, (self.list_name,))
        path = next((folder / f"{name}.txt" for name in names if (folder / f"{name}.txt").is_file()), None)
        if path is None:
            available = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
            raise MissingError(
                f"dataset split: got {self.split!r}, no such list {folder / names[0]}.txt; expected one of: "
                f"{available}; set dataset.train_split / dataset.val_split (data/README.md)"
            )
        return [self._id_of(line) for line in read_list(path)], str(path)

    def _list_folder(self) -> Path:
        """Return the folder of the lists."""
        return self.root / self.options.list_dir

    def _id_of(self, line: str) -> str:
        # Lists of the augmented split often read "/JPEGImages/<id>.jpg /SegmentationClassAug/<id>.png"; the devkit's
        # per-class lists have a second column.
        first = line.split()[0]
        prefix = f"{self.options.image_dir}/"
        if first.removeprefix("/").startswith(prefix):
            first = drop_suffix(first.removeprefix("/").removeprefix(prefix))
        return first

    def _read_classes(self) -> tuple[str, ...]:
        if self.options.classes_file is None:
            return VOC_CLASSES
        path = self.root / self.options.classes_file
        require_folder(self.root, "dataset.root", self._layout())
        if not path.is_file():
            raise MissingError(
                f"dataset.classes_file: got {self.options.classes_file!r}, no such file {path}; expected class "
                "names, one a line, background first; set dataset.classes_file=null for VOC's twenty"
            )
        return read_classes(path)

    @property
    def class_colours(self) -> dict[str, str]:
        """Colours that lines of `classes_file` end with, name -> `#rrggbb`."""
        path = self.root / (self.options.classes_file or "")
        return read_class_colours(path) if self.options.classes_file is not None and path.is_file() else {}

    def _read_labels(self) -> LabelFile | None:
        path = self.root / "image_labels.json"
        return read_label_file(path) if path.is_file() else None

    def _read_annotated(self, image_id: str) -> tuple[tuple[Label, ...], str] | None:
        path = self.root / self.options.annotation_dir / f"{image_id}.xml"
        if image_id not in self._annotated:
            require_folder(self.root / self.options.annotation_dir, "dataset.annotation_dir", "<id>.xml of each image")
            if not path.is_file():
                return None
            self._annotated[image_id] = read_voc_xml(path)
        return self._annotated[image_id], str(path)

    def label_names(self, image_id: str) -> tuple[str, ...]:
        """Names under which a label file may list an image; the id comes first."""
        # Some files of labels count VOC's images: 2007_000032 is 2007000032.
        return (image_id, image_id.replace("_", "", 1)) if re.fullmatch(r"\d{4}_\d{6}", image_id) else (image_id,)

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        return find_image(self.root / self.options.image_dir, image_id, self.options.suffixes)

    def mask_path(self, image_id: str) -> Path | None:
        return self._mask(image_id)

    def _mask(self, image_id: str) -> Path:
        return self.root / self.options.mask_dir / f"{image_id}.png"

    def other_mask_path(self, image_id: str) -> Path | None:
        other = TRUTHS.get(self.options.mask_dir)
        return None if other is None else self.root / other / f"{image_id}.png"

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored = super()._read_semantic(image_id)
        if stored is None or self.has_background:
            return stored
        return np.where(stored == 0, np.uint8(IGNORE_INDEX), stored)

    def instance_path(self, image_id: str) -> Path | None:
        return self.root / self.options.instance_dir / f"{image_id}.png"

    def _truth_folder(self, path: Path) -> Path:
        return self.root / self.options.mask_dir


def read_voc_xml(path: Path) -> tuple[str, ...]:
    """Read the distinct object names of a VOC annotation, in the order of the file, without parts of objects.

    Raises:
        DataError: unreadable, not XML, or not an annotation.
    """
    remedy = "expected <annotation> with <object><name>; fetch it again"
    try:
        content = path.read_bytes()
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise DataError(f"{path}: declares entities, which no annotation needs; {remedy}")
        root = ElementTree.fromstring(content)
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}); check the file and its permissions") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not XML ({error}), {remedy}") from error
    names = [(node.findtext("name") or "").strip() for node in root.iterfind("object")]
    if root.tag != "annotation" or not all(names):
        raise DataError(f"{path}: got <{root.tag}> with {names.count('')} unnamed objects, {remedy}")
    return tuple(dict.fromkeys(names))
