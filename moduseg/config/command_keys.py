"""The keys of the commands that have keys of their own, one class a command; imported without torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

MAX_DEMO_PIXELS = 16_000_000
"""Larger pictures are refused by the demo."""
FORMATS = ("png", "overlay", "coco", "labelme", "labelstudio")
"""What `predict` may write: `labels/`, `overlays/`, `coco.json`, `labelme/`, `labelstudio.json`."""


@dataclass(frozen=True)
class ConvertOptions:
    """Keys of the command `convert_proposals`.

    Attributes:
        source: folder of maps, `<id>.npz` or `<id>.png`, sub-folders included.
        out: folder to write `<id>.json` to.
    """

    source: str
    out: str


@dataclass(frozen=True)
class Coco150Options:
    """Keys of the command `make_coco150`.

    Attributes:
        coco: folder of the download, with train2017/, val2017/ and annotations/ that has the files panoptic_*.
        out: folder to write to.
    """

    coco: str
    out: str = "data/coco150"


@dataclass(frozen=True)
class AblateOptions:
    """Keys of the command `ablate`.

    Attributes:
        table: name of a file in `configs/table/`.
    """

    table: str = ""


@dataclass(frozen=True)
class ReproduceOptions:
    """Keys of the command `reproduce`.

    Attributes:
        table: name of a file in `configs/reproduce/`.
        dataset: the one data set to run: `voc`, `voc_aug`, `coco`, `ade20k`, `cityscapes` or `miniature`, or of the
            open-vocabulary table a protocol such as `voc21`; all with published figures if omitted.
        row: the one row to run; all if omitted.
        seeds: runs of a row, where the data set can be repeated; the table's number if omitted.
        show: whether to print the command of each row instead of running it.
    """

    table: str = ""
    dataset: str | None = None
    row: str | None = None
    seeds: int | None = None
    show: bool = False


@dataclass(frozen=True)
class MethodsOptions:
    """Keys of the command `methods`.

    Attributes:
        dataset: the one data set to run: `miniature`, `voc`, `voc_aug`, `coco` or `coco2014`.
        worlds: number of drawn worlds of the miniature, 3 if omitted.
        methods: the ones to run, as the table names them; all if omitted.
        table: name of a file in `configs/methods/`.
    """

    dataset: str = "miniature"
    worlds: int | None = None
    methods: tuple[str, ...] = ()
    table: str = "default"


@dataclass(frozen=True)
class SweepOptions:
    """Keys of the command `sweep`.

    Attributes:
        select: a split, or overrides of another run, one at a time, that chooses the best setting.
    """

    select: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewClassOptions:
    """Keys of the command `new_class`.

    Attributes:
        class_: names of the classes to withhold, one after the other; `all` for every class.
        images: how many tagged images are added.
        name: of the table's files.
    """

    class_: tuple[str, ...] = ("all",)
    images: int = 5
    name: str = "new_class"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images: got {self.images}, expected 1 or more; try 5")


@dataclass(frozen=True)
class CompareOptions:
    """Keys of the command `compare`.

    Attributes:
        folders: the two folders, of results (`results.json`) or of PNGs named `<id>.png`.
    """

    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class InfoOptions:
    """Keys of the command `bank info`.

    Attributes:
        bank: folder of the bank, the name of its run, or `latest`.
        class_: a class whose regions are listed, those to look at first on top; all classes are listed if omitted.
        json: whether to print JSON in place of a table.
    """

    bank: str
    class_: str | None = None
    json: bool = False


@dataclass(frozen=True)
class RemoveOptions:
    """Keys of the command `bank remove`.

    Attributes:
        bank: folder of the bank, the name of its run, or `latest`.
        class_: names of classes, which lose their regions and their names.
        image: ids of training images.
        region: rows of the bank, or `<image id>:<class>`.
        out: folder to write; chosen below `runtime.outputs` if omitted.
    """

    bank: str
    class_: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    out: str | None = None


@dataclass(frozen=True)
class MergeOptions:
    """Keys of the command `bank merge`.

    Attributes:
        banks: folders of two or more banks of one backbone.
        prefix: whether the images of each bank get the name of its folder in front.
        out: folder to write; chosen below `runtime.outputs` if omitted.
    """

    banks: tuple[str, ...]
    prefix: bool = False
    out: str | None = None


@dataclass(frozen=True)
class ApplyOptions:
    """Keys of the command `bank apply`.

    Attributes:
        bank: folder of the bank that the report shows.
        corrections: JSON file that the report's page "Bank" saved.
        out: folder to write; chosen below `runtime.outputs` if omitted.
    """

    bank: str
    corrections: str
    out: str | None = None


@dataclass(frozen=True)
class ExportOptions:
    """Keys of the command `bank export`.

    Attributes:
        bank: folder of the bank, the name of its run, or `latest`.
        out: folder for the files.
        format: which program the files are for; .
        outliers: whether the outlier filter of the bank's configuration drops vectors, as it does in searches.
    """

    bank: str
    out: str
    format: Literal["npz", "faiss", "csv", "projector"] = "npz"
    outliers: bool = True


@dataclass(frozen=True)
class ExportStudentOptions:
    """Keys of the command `export_student`.

    Attributes:
        student: folder of a trained student.
        out: ONNX file to write; `student.onnx` in the student's folder if omitted.
        height: of the pictures in pixels, where the file takes one size; else of the picture it is made with.
        width: of the pictures in pixels, likewise.
    """

    student: str
    out: str | None = None
    height: int = 320
    width: int = 320

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 32:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 32 pixels or more; try 320")


@dataclass(frozen=True)
class AddOptions:
    """Keys of the command `bank add`.

    Attributes:
        bank: folder of the bank, the name of its run, or `latest`.
        images: folders of images, or single files. A folder with `images/` inside is taken as data sets of one's own
            are laid out (`labels.csv`, `masks/`).
        tags: class names that all of them show, or a file of labels (`labels.csv`, `.json`). If omitted, the folder's
            own file; if it has none, the new classes.
        new: classes that the bank does not have yet; a tag that is neither a class of the bank nor new is an error.
        masks: folder of label maps `<id>.png` with the ids of the longer class list, used in place of pseudo masks.
        prefix: put before the ids of the images, as `<prefix>/<id>`.
        out: folder of the new bank; chosen below `runtime.outputs` if omitted.
        words: classes that a bank with word values gets by their names alone, without an image.
    """

    bank: str
    images: tuple[str, ...] = ()
    tags: str | None = None
    new: tuple[str, ...] = ()
    masks: str | None = None
    prefix: str | None = None
    out: str | None = None
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.words and (self.images or self.new or self.tags or self.masks):
            raise ValueError(
                f"words: got {'; '.join(self.words)} beside images, expected one of the two; add images on their own"
            )


@dataclass(frozen=True)
class TagOptions:
    """Keys of the command `tag`.

    Attributes:
        images: folder of images, or a folder with `images/` inside, as data sets of one's own are laid out. If omitted,
            the evaluated split of the data set, whose tags are then only compared with its own.
        vocabulary: words of the classes: a file with one class a line, or a list (`dog;cat`); those of the data set if
            omitted.
        out: label file to write; `labels.csv` beside the images if omitted.
    """

    images: str | None = None
    vocabulary: str = ""
    out: str | None = None


@dataclass(frozen=True)
class ShowAttentionOptions:
    """Keys of the command `show_attention`.

    Attributes:
        image: the image file.
        words: what is looked for, as it is written into the prompt.
        out: PNG file to write.
    """

    image: str
    words: tuple[str, ...]
    out: str = "attention.png"

    def __post_init__(self) -> None:
        if not self.words or not all(word.strip() for word in self.words):
            raise ValueError(f"words: got {list(self.words)}, expected one or more, separated by ';'")
        if len(set(self.words)) < len(self.words):
            raise ValueError(f"words: got {list(self.words)}, expected each once")


@dataclass(frozen=True)
class PredictOptions:
    """Keys of the command `predict`.

    Attributes:
        bank: folder of the bank, the name of its run, or `latest`.
        images: folders of images, or single files.
        out: folder to write.
        min_score: proposals that score less are unknown (255 in the label map, no object); the score is a cosine,
            -1 to 1. No limit if omitted.
        formats: what is written, some of these; all if omitted.
        objects: `proposals` (what is visible of one proposal) or `components` (a connected region of one class).
        tolerance: pixels that polygons may lie off the mask; see `moduseg.masks.polygons.find_polygons`.
        image_url: what Label Studio's addresses of images begin with; the default is its local file storage.
        labelstudio_root: folder that Label Studio serves, which its addresses are relative to; they are relative to
            the folders of images if omitted.
    """

    bank: str
    images: tuple[str, ...]
    out: str = "predictions"
    min_score: float | None = None
    formats: tuple[str, ...] = FORMATS
    objects: Literal["proposals", "components"] = "proposals"
    tolerance: float = 1.0
    image_url: str = "/data/local-files/?d="
    labelstudio_root: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"formats: got {unknown or 'none'}, expected some of {', '.join(FORMATS)}")
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise ValueError(f"min_score: got {self.min_score}, expected a cosine, -1 to 1; try 0.5")
        if self.tolerance < 0:
            raise ValueError(f"tolerance: got {self.tolerance}, expected 0 or more pixels; try 1")


@dataclass(frozen=True)
class DemoOptions:
    """Keys of the command `demo_app`.

    Attributes:
        bank: folder of the bank, or of a run of `infer`; `latest` for the last one below `outputs`; `new` to begin
            without one, with the preset for photographs (`experiment=photos_light`).
        host: address to listen on; the default is this machine only. On any other address the page saves nothing, and
            shows no training image outside the bank's folder and `pictures`.
        port: port to listen on; a free one if omitted.
        save_folder: banks are saved below it.
        pictures: folders whose pictures the page may show, beside the bank's own.
        max_pixels: larger pictures are refused.
    """

    bank: str
    host: str = "127.0.0.1"
    port: int | None = None
    save_folder: str = "outputs/saved_banks"
    pictures: tuple[str, ...] = ()
    max_pixels: int = MAX_DEMO_PIXELS

    @property
    def is_public(self) -> bool:
        """Whether other machines can open the page."""
        try:
            return not ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host != "localhost"

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels: got {self.max_pixels}, expected 1 or more; leave it out")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}, expected 1 to 65535; leave it out for a free one")


@dataclass(frozen=True)
class ReportOptions:
    """Keys of the command `report`.

    Attributes:
        run: folder of a run, of `infer`, `evaluate` or `pseudo_masks`.
        predictions: folder of `<id>.png` in place of a run; `dataset=<name>` says what to score them on.
        compare: a second run, or a second folder of `<id>.png`, shown beside the first.
    """

    run: str | None = None
    predictions: str | None = None
    compare: str | None = None
