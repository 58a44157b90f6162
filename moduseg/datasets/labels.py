"""Readers of image-level label files, class lists and id lists."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
_NO_CLASS_NAMES = (*BACKGROUND_NAMES, "__ignore__")
"""Tags, in lower case, that say nothing about an image's classes; LabelMe writes both kinds."""
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
        lines: line of the file that first names an image, by id; empty where the format has no lines.
    """

    entries: RawLabels
    where: str
    source: str
    classes: int | None = None
    lines: Mapping[str, int] = field(default_factory=dict)

    def locate(self, image_id: str) -> str:
        """Return the file, with the line of an image where there is one, for messages."""
        return f"{self.where}:{self.lines[image_id]}" if image_id in self.lines else self.where


def shorten(value: object, length: int = 80) -> str:
    """Return the beginning of a value's `repr`, on one line, for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def compose_unicode(text: str) -> str:
    """Return a text in composed Unicode, the one form in which names are compared; macOS stores decomposed ones."""
    return unicodedata.normalize("NFC", text)


def fold_name(name: str) -> str:
    """Return what names that differ only in case, spacing or Unicode form have in common."""
    return re.sub(r"[\s_-]+", " ", compose_unicode(name).casefold()).strip()


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark, in composed Unicode.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    try:
        return compose_unicode(path.read_text(encoding="utf-8-sig"))
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
    """Read class names, one a line, line number = id, `background` first; a colour (` #rrggbb`) may end a line.

    LabelMe's list, which begins with `__ignore__` and `_background_`, is read as it means: without the first.

    Raises:
        DataError: no background line, no class, an empty or repeated name, or more than 254 classes.
    """
    names = [split_colour(line)[0] for line in read_text(path).rstrip().splitlines()]
    names = names[1:] if names[:1] == ["__ignore__"] else names
    if names and names[0].lower() in BACKGROUND_NAMES:
        names[0] = "background"
    return check_classes(names, str(path))


def read_class_colours(path: Path) -> dict[str, str]:
    """Read the colours of one's own that a class list names, class name -> `#rrggbb`; empty if there are none.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    entries = (split_colour(line) for line in read_text(path).rstrip().splitlines())
    return {name: colour for name, colour in entries if colour is not None}


def split_colour(line: str) -> tuple[str, str | None]:
    """Return the class name of a line and its colour, `#rrggbb` in lower case, `None` if it ends without one."""
    match = re.fullmatch(r"(.*\S)\s+(#[0-9a-fA-F]{6})", line.strip())
    return (match[1], match[2].lower()) if match else (line.strip(), None)


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
    labels separated by `;` (ids also by spaces or commas); rows of the same image are joined, empty ones skipped.
    Excel's `;` or tabs between columns are recognised by the header. NPY: a pickled dictionary of 0/1
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
    return _read_csv(path)


def find_label_file(path: Path, split: str) -> Path | None:
    """Return `path` if it is a label file, the file of `split` in it if it is a folder, `None` if there is none."""
    candidates = (path / f"{split}{suffix}" for suffix in LABEL_SUFFIXES) if path.is_dir() else (path,)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def resolve_labels(raw: Sequence[Label], classes: Sequence[str], image_id: str, where: str) -> tuple[int, ...]:
    """Turn the labels of one image into ascending class ids.

    Args:
        raw: names (a name wins over a number written as text) or ids `0..C`.
        classes: names by id, background first.
        image_id: for the message.
        where: the file, for the message.

    Returns:
        Ids `1..C`; the background, as a name or as 0, is dropped.

    Raises:
        DataError: an unknown name, or an id out of `0..C`.
    """
    ids = set()
    for label in raw:
        for class_id in _resolve_label(label, classes, f"{where}: image {shorten(image_id)}"):
            ids.add(class_id)
    return tuple(sorted(ids - {0}))


def _resolve_label(label: Label, classes: Sequence[str], where: str) -> list[int]:
    """Return the class ids of one label; 0 where it is the background.

    A name that is no class, but several class names with commas between them, stands for these.
    """
    if isinstance(label, int) or (label not in classes[1:] and re.fullmatch(r"\d+", label)):
        class_id = int(label)
        if not 0 <= class_id < len(classes):
            raise DataError(
                f"{where} has label {shorten(label)}, expected ids 1..{len(classes) - 1} as there are "
                f"{len(classes) - 1} classes beside background; correct it or the class list"
            )
        return [class_id]
    label = compose_unicode(label)
    if label in classes[1:]:
        return [classes.index(label)]
    if label.lower() in _NO_CLASS_NAMES:
        return [0]
    pieces = [piece.strip() for piece in label.split(",") if piece.strip()]
    if len(pieces) > 1 and all(piece in classes[1:] for piece in pieces):
        return [classes.index(piece) for piece in pieces]
    folded = {fold_name(name): name for name in classes[1:]}
    close = folded.get(fold_name(label)) or suggest(label, classes[1:])
    hint = f"did you mean {close!r}?" if close else "add it to the class list or correct it"
    raise DataError(f"{where} has label {shorten(label)}, expected one of the {len(classes) - 1} class names; {hint}")


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
        key = compose_unicode(drop_suffix(name))
        labels[key] = (*labels.get(key, ()), *values)
    return labels, str(path), source


def _is_label(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _read_csv(path: Path) -> LabelFile:
    text = read_text(path)
    # Excel may write a first line "sep=;", which is no row; the delimiter is that of the header.
    marker = re.match(r"sep=.\r?\n", text)
    text = text[marker.end() :] if marker else text
    header = re.sub(r'[\s"]+', lambda match: "\t" if "\t" in match[0] else "", text.lstrip().split("\n", 1)[0].lower())
    delimiter = next((d for d in ",;\t" if {"image", "labels"} <= set(header.split(d))), ",")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    labels: RawLabels = {}
    lines: dict[str, int] = {}
    try:
        rows = ([cell.strip() for cell in row] for row in reader)
        filled_rows = (row for row in rows if any(row))
        columns = [name.lower() for name in next(filled_rows, [])]
        if not {"image", "labels"} <= set(columns):
            names = " ".join(", ".join(columns).split())[:80] or "none"
            raise DataError(f"{path}: got columns {names}, expected image,labels; write that header line")
        for row in filled_rows:
            line = reader.line_num + bool(marker)
            name, tags = _split_row(row, columns, delimiter, f"{path}: line {line}")
            key = drop_suffix(name.replace("\\", "/").removeprefix("images/"))
            labels[key] = (*labels.get(key, ()), *tags)
            lines.setdefault(key, line)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}); correct the file") from error
    return LabelFile(labels, str(path), "csv", lines=lines)


def _split_row(row: list[str], columns: list[str], delimiter: str, where: str) -> tuple[str, list[str]]:
    """Return image and labels of one row that is not empty."""
    row = [*row, *[""] * (len(columns) - len(row))]
    name, text = row[columns.index("image")], row[columns.index("labels")]
    surplus = [cell for cell in row[len(columns) :] if cell]
    # Where ';' separates columns too, the labels of an image are the last cells of its row.
    is_list = delimiter == ";" and columns[-1] == "labels"
    if not name or (surplus and not is_list):
        raise DataError(f"{where} is not <image>,<labels>; separate labels by ';' and quote names with ','")
    text = ";".join([text, *surplus])
    pieces = re.split(r"[\s;,]+", text) if re.fullmatch(r"[\d\s;,]+", text) else text.split(";")
    return name, [piece.strip() for piece in pieces if piece.strip()]


def distinct_names(file: LabelFile) -> list[str] | None:
    """Return the distinct names of a label file in alphabetical order, or `None` if it holds ids.

    The background is no name. Several names with commas between them are not one, if one of them occurs alone.

    Raises:
        DataError: names that differ only in case or spacing, which are one class or two.
    """
    first_image: dict[str, str] = {}
    for image_id, entry in file.entries.items():
        for label in entry:
            if isinstance(label, int) or label.isdigit():
                return None
            first_image.setdefault(compose_unicode(label), image_id)
    for label in [label for label in first_image if "," in label]:
        pieces = [piece.strip() for piece in label.split(",") if piece.strip()]
        if any(piece in first_image for piece in pieces):
            image_id = first_image.pop(label)
            for piece in pieces:
                first_image.setdefault(piece, image_id)
    names = sorted(name for name in first_image if name.lower() not in _NO_CLASS_NAMES)
    variants: dict[str, list[str]] = {}
    for name in names:
        variants.setdefault(fold_name(name), []).append(name)
    doubtful = [name for group in variants.values() if len(group) > 1 for name in group]
    if doubtful:
        places = ", ".join(f"{shorten(name)} ({file.locate(first_image[name])})" for name in doubtful[:5])
        raise DataError(
            f"{file.where}: got names that differ only in case or spacing: {places}; did you mean one class? write it "
            "in one way, or list each in classes.txt"
        )
    return names or None
