"""Readers of image-level label files, class lists and id lists."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moduseg.datasets.io import IMAGE_SUFFIXES
from moduseg.datasets.npy_labels import read_npy_labels
from moduseg.errors import DataError, suggest

MAX_CLASSES = 254
"""Foreground classes that fit an 8-bit label map beside background and 255."""

Label = int | str
RawLabels = dict[str, tuple[Label, ...]]
"""Image id -> labels as stored, ids or names; checked image by image, so that a wrong one costs only its own."""
BACKGROUND_NAMES = ("background", "_background_", "__background__")
"""Names, in lower case, that tools give to what is no object."""
LABEL_SUFFIXES = (".json", ".csv", ".npy")
"""Endings of label files."""


@dataclass(frozen=True)
class LabelFile:
    """Image-level labels read from one file.

    Attributes:
        entries: labels by image id, as stored.
        where: the file, for messages.
        source: what results call them: the source that the file states, else its ending (`json`, `csv`, `npy`).
        classes: foreground classes that the file was written for, where it says so (the length of its vectors).
    """

    entries: RawLabels
    where: str
    source: str
    classes: int | None = None


def shorten(value: object, length: int = 80) -> str:
    """Return the beginning of a value's `repr`, on one line, for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: got bytes that are not UTF-8 text, expected text; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}); check the file and its permissions") from error


def read_list(path: Path) -> list[str]:
    """Read the lines of an id list without surrounding spaces; empty lines are skipped.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def check_id(image_id: str, where: str) -> str:
    """Return `image_id` if it names a file inside its folder.

    Raises:
        DataError: empty, absolute, with `..` or other parts that leave the folder, or with control characters.
    """
    parts = image_id.split("/")
    leaves = image_id.startswith("/") or re.match(r"[A-Za-z]:", image_id) or "\\" in image_id
    if leaves or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 for c in image_id):
        raise DataError(
            f"{where}: got image id {shorten(image_id)}, expected a relative path inside the folder without suffix, "
            "such as 'a/b'; correct the list"
        )
    return image_id


def check_ids(ids: Iterable[str], where: str) -> tuple[str, ...]:
    """Return `ids` in their order; each has to be inside the folder and listed once.

    Raises:
        DataError: an id leaves the folder, or is listed twice.
    """
    seen: dict[str, None] = {}
    for image_id in ids:
        if check_id(image_id, where) in seen:
            raise DataError(
                f"{where}: got image id {shorten(image_id)} twice, expected each once; remove or rename one"
            )
        seen[image_id] = None
    return tuple(seen)


def drop_suffix(name: str) -> str:
    """Return the id of an image file name: `a/b.JPG` -> `a/b`; other endings stay."""
    suffix = PurePosixPath(name).suffix
    return name[: -len(suffix)] if suffix.lower() in IMAGE_SUFFIXES else name


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one a line, line number = id, `background` first.

    Raises:
        DataError: no background line, no class, an empty or repeated name, or more than 254 classes.
    """
    return check_classes([line.strip() for line in read_text(path).rstrip().splitlines()], str(path))


def check_classes(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return `names` as a class list, checked as `read_classes` says; `where` is the file, for messages."""
    if not names or names[0] != "background":
        got = shorten(names[0]) if names else "nothing"
        raise DataError(f"{where}: got {got} first, expected 'background'; add it as the first line")
    if not 1 <= len(names) - 1 <= MAX_CLASSES:
        raise DataError(f"{where}: got {len(names) - 1} classes beside background, expected 1..{MAX_CLASSES}")
    for i, name in enumerate(names):
        if not name or name in names[:i] or any(ord(c) < 32 or ord(c) == 127 for c in name):
            raise DataError(
                f"{where}: line {i + 1} is {shorten(name)}, expected a name not used before, without control "
                "characters; correct the line"
            )
    return tuple(names)


def read_label_file(path: Path) -> LabelFile:
    """Read the image-level labels of a `.json`, `.csv` or `.npy` file, ids or names as stored.

    JSON: `{"a/b": ["dog", 3]}` or `{"images": [{"img_id": "a/b", "labels": [1, 3]}]}` (`file_name` without suffix where
    `img_id` is absent; beside `images`, `source` may say where the labels were taken from). CSV: header `image,labels`,
    labels separated by `;` (ids also by spaces); rows of the same image are joined. NPY: a pickled dictionary of 0/1
    vectors (`cls_labels.npy`), see `moduseg.datasets.npy_labels`.

    Raises:
        DataError: not that format; the message names the entry.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        entries, classes = read_npy_labels(path)
        return LabelFile(dict(entries), str(path), "npy", classes)
    if suffix == ".json":
        return LabelFile(*_read_json(path))
    return LabelFile(_read_csv(path), str(path), "csv")


def find_label_file(path: Path, split: str) -> Path | None:
    """Return `path` if it is a label file, the file of `split` in it if it is a folder, `None` if there is none."""
    candidates = (path / f"{split}{suffix}" for suffix in LABEL_SUFFIXES) if path.is_dir() else (path,)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def resolve_labels(raw: Sequence[Label], classes: Sequence[str], image_id: str, where: str) -> tuple[int, ...]:
    """Turn the labels of one image into ascending class ids.

    Args:
        raw: names (a name wins over a number written as text) or ids `1..C`.
        classes: names by id, background first.
        image_id: for the message.
        where: the file, for the message.

    Raises:
        DataError: an unknown name, or an id out of `1..C`.
    """
    ids = set()
    for label in raw:
        if isinstance(label, str):
            if label in classes[1:]:
                label = classes.index(label)
            elif re.fullmatch(r"\d+", label):
                label = int(label)
            else:
                close = suggest(label, classes[1:])
                hint = f"did you mean {close!r}?" if close else "add it to the class list or correct it"
                raise DataError(
                    f"{where}: image {shorten(image_id)} has label {shorten(label)}, expected one of the "
                    f"{len(classes) - 1} class names; {hint}"
                )
        if not 1 <= label < len(classes):
            raise DataError(
                f"{where}: image {shorten(image_id)} has label {shorten(label)}, expected ids 1..{len(classes) - 1} as "
                f"there are {len(classes) - 1} classes beside background; correct it or the class list"
            )
        ids.add(label)
    return tuple(sorted(ids))


def _read_json(path: Path) -> tuple[RawLabels, str, str]:
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}), expected image-level labels; correct the file") from error
    layout = 'expected {"<id>": ["dog", 3]} or {"images": [{"img_id": "<id>", "labels": [1, 3]}]}'
    if not isinstance(data, dict):
        raise DataError(f"{path}: got a {type(data).__name__} at the top, {layout}; correct the file")
    entries: list[tuple[object, object]] = list(data.items())
    source = "json"
    if isinstance(data.get("images"), list) and all(isinstance(entry, dict) for entry in data["images"]):
        source = data.get("source", source)
        if not isinstance(source, str) or not re.fullmatch(r"[a-z0-9_-]{1,40}", source):
            raise DataError(
                f"{path}: got source {shorten(source)}, expected a word such as masks, xml, predicted; correct it"
            )
        entries = [(e.get("img_id", e.get("file_name")), e.get("labels")) for e in data["images"]]
    labels: RawLabels = {}
    for name, values in entries:
        if not isinstance(name, str) or not isinstance(values, list) or not all(map(_is_label, values)):
            raise DataError(f"{path}: entry {shorten(name)} has labels {shorten(values)}, {layout}; correct the entry")
        key = drop_suffix(name)
        labels[key] = (*labels.get(key, ()), *values)
    return labels, str(path), source


def _is_label(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _read_csv(path: Path) -> RawLabels:
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        if not {"image", "labels"} <= set(columns):
            names = " ".join(", ".join(columns).split())[:80] or "none"
            raise DataError(f"{path}: got columns {names}, expected image,labels; write that header line")
        labels: RawLabels = {}
        for row in reader:
            name, text = (row[columns["image"]] or "").strip(), (row[columns["labels"]] or "").strip()
            if not name or row.get(None):
                raise DataError(
                    f"{path}: line {reader.line_num} is not <image>,<labels>; separate labels by ';' and "
                    "quote names with ','"
                )
            numbers = re.fullmatch(r"[\d\s;]+", text)
            pieces = re.split(r"[\s;]+", text) if numbers else text.split(";")
            key = drop_suffix(name.replace("\\", "/").removeprefix("images/"))
            labels[key] = (*labels.get(key, ()), *(piece.strip() for piece in pieces if piece.strip()))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}); correct the file") from error
    return labels


def distinct_names(labels: Mapping[str, Sequence[Label]]) -> list[str] | None:
    """Return the distinct names of a label file in alphabetical order, or `None` if it holds ids."""
    values = {label for entry in labels.values() for label in entry}
    if not values or any(isinstance(v, int) or v.isdigit() for v in values):
        return None
    return sorted(str(v) for v in values)
