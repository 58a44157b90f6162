"""COCO's `instances_*.json`, or anyone's file of that format, as an index: small arrays about every object.

The file of 118,287 images holds 450 MB, and ten times that as Python objects. It is read once, one object after the
other. The outlines stay in the file, and the index keeps where each is, so that memory does not grow with them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.datasets.classes import COCO_CATEGORIES, COCO_CLASSES, COCO_CONTIGUOUS
from moduseg.datasets.io import MAX_PIXELS
from moduseg.datasets.labels import BACKGROUND_NAMES, check_classes, drop_suffix
from moduseg.errors import DataError
from moduseg.masks.rle import encode_polygons, read_runs
from moduseg.structures import IGNORE_INDEX

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_FIELDS = ("images", "annotations", "categories")
_Number = int | str
"""Id of an image or of a category: a number, also where a file has it as text, or another text."""


@dataclass(frozen=True)
class CocoIndex:
    """The objects of one annotation file and their positions in it, images in ascending image id.

    Attributes:
        path: the file.
        ids: `N` image ids of moduseg, file names without suffix.
        sizes: `[N, 2]` int32, `(H, W)`.
        starts: `[N + 1]` int64; the objects of image `i` are `starts[i]` to `starts[i + 1]`, in the order of the file.
        offsets: `[M]` int64, first byte of each object in the file.
        lengths: `[M]` int32, its bytes.
        classes: `[M]` uint8, class ids; 0 for an object of the background.
        crowd: `[M]` bool, whether it is a region of many objects.
        checksums: `[N]` int64, over the bytes of all objects of the image.
        class_names: names by class id, background first.
        has_outlines: whether any object has an outline; files for detection hold boxes alone.
    """

    path: Path
    ids: tuple[str, ...]
    sizes: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    checksums: np.ndarray
    class_names: tuple[str, ...] = COCO_CLASSES
    has_outlines: bool = True

    def objects_of(self, row: int) -> slice:
        """Return the positions of the objects of image `row` in the arrays."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def rasterise(self, row: int, ignore_crowd: bool) -> tuple[np.ndarray, np.ndarray]:
        """Draw the label map and the objects of image `row`, smaller objects on top.

        Size is counted in pixels of the object's own mask; of equal ones the later lies on top.

        Args:
            row: index of the image in `ids`.
            ignore_crowd: whether crowd regions become 255 instead of their class; they then are no object.

        Returns:
            `[H, W]` uint8, class ids, 0 where there is no object, 255; and `[H, W]` int32, 0 or the object's number.

        Raises:
            DataError: the file has changed, or an outline is broken; one line that names the annotation.
        """
        height, width = (int(n) for n in self.sizes[row])
        first = self.objects_of(row).start
        masks = [self._read_mask(i, (height, width)) for i in range(first, self.objects_of(row).stop)]
        semantic = np.zeros(height * width, dtype=np.uint8)
        objects = np.zeros(height * width, dtype=np.int32)
        # A stable sort of the reversed order puts the later of two equal ones last, that is on top.
        for i in sorted(range(len(masks)), key=lambda i: -len(masks[i])):
            is_ignored = ignore_crowd and bool(self.crowd[first + i])
            semantic[masks[i]] = IGNORE_INDEX if is_ignored else self.classes[first + i]
            objects[masks[i]] = 0 if is_ignored else i + 1
        # Outlines count down the columns.
        return (
            np.ascontiguousarray(semantic.reshape(width, height).T),
            np.ascontiguousarray(objects.reshape(width, height).T),
        )

    def _read_mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Read the column-major pixel numbers of one object."""
        where = f"{self.path}: annotation at byte {int(self.offsets[index])}"
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.offsets[index]))
                entry = json.loads(file.read(int(self.lengths[index])))
            where = f"{self.path}: annotation {entry.get('id')!r}"
            segmentation = entry["segmentation"]
            if isinstance(segmentation, list):
                runs = encode_polygons(segmentation, size)
            else:
                if list(segmentation["size"]) != list(size):
                    raise ValueError(f"a mask of {segmentation['size']}, the image is {list(size)} (height, width)")
                runs = read_runs(segmentation["counts"], size[0] * size[1])
        except OSError as error:
            raise DataError(f"{self.path}: unreadable ({error.strerror}); check the file") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise DataError(f"{where} cannot be rasterised ({why}); export them again") from error
        return np.flatnonzero(np.repeat(np.arange(len(runs)) % 2 == 1, runs))


def read_index(path: Path, *, has_own_categories: bool = False) -> CocoIndex:
    """Read an annotation file into an index.

    Args:
        path: the file.
        has_own_categories: the classes are the categories of the file, in the order of their ids, in place of COCO's
            eighty. Ids and sizes may be numbers written as text. A category that is only the `supercategory` of
            others is no class, and the background is class 0.

    Raises:
        DataError: unreadable, not COCO's instances format, or with categories that are not COCO's eighty.
    """
    if has_own_categories:
        remedy = "expected images, annotations and categories as COCO has them; correct the file or export it again"
    else:
        remedy = "expected COCO's instances_<split>.json; fetch it again"
    try:
        # Latin-1 gives one character for each byte, so that positions in the text are positions in the file.
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), {remedy}") from error
    try:
        return _build_index(path, text, has_own_categories)
    except _CategoryError as error:
        raise DataError(
            f"{path}: not COCO's instances format ({error}), expected COCO's eighty categories; a file of one's own "
            f"classes is read with dataset=coco_json dataset.annotations='{path}' dataset.images=<folder>"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, IndexError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{path}: not COCO's instances format ({why or type(error).__name__}), {remedy}") from error


class _CategoryError(ValueError):
    """A category is none of COCO's eighty."""


@dataclass
class _Elements:
    """The elements of the three lists of a file, in its order.

    Attributes:
        images: name, height and width by id.
        categories: name and supercategory by id.
        owners, labels: ids of image and category of each annotation.
        offsets, lengths: its place in the file, in bytes.
        crowd, sums: whether it is a crowd, and its checksum.
        has_outlines: whether any annotation has an outline.
    """

    images: dict[_Number, tuple[str, int, int]] = field(default_factory=dict)
    categories: dict[_Number, tuple[str, str]] = field(default_factory=dict)
    owners: list[_Number] = field(default_factory=list)
    labels: list[_Number] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    has_outlines: bool = False


def _read_elements(text: str, is_lenient: bool) -> _Elements:
    """Read a file; a lenient reading takes numbers that are written as text."""
    elements, seen = _Elements(), set()
    for name, start, stop, value in _iterate_elements(text):
        seen.add(name)
        if start is None:
            continue
        if name == "categories":
            number = _to_number(value["id"], is_lenient)
            if number in elements.categories:
                raise ValueError(f"category {number!r} is listed twice")
            names = (_decode_utf8(value["name"]).strip(), _decode_utf8(str(value.get("supercategory") or "")).strip())
            elements.categories[number] = names
        elif name == "images":
            number = _to_number(value["id"], is_lenient)
            if number in elements.images:
                raise ValueError(f"image {number!r} is listed twice")
            height, width = (_to_number(value[side], is_lenient) for side in ("height", "width"))
            is_size = type(height) is int and type(width) is int and height > 0 and width > 0
            if not is_size or int(height) * int(width) > MAX_PIXELS:
                raise ValueError(f"image {number!r} is {height!r} x {width!r}")
            elements.images[number] = (drop_suffix(_decode_utf8(value["file_name"])), int(height), int(width))
        else:
            elements.owners.append(_to_number(value["image_id"], is_lenient))
            elements.labels.append(_to_number(value["category_id"], is_lenient))
            elements.offsets.append(start)
            elements.lengths.append(stop - start)
            elements.crowd.append(str(value.get("iscrowd") or 0) not in ("0", "False"))
            elements.has_outlines |= bool(value.get("segmentation"))
            elements.sums.append(zlib.crc32(text[start:stop].encode("latin-1")))
    if missing := [name for name in _FIELDS if name not in seen]:
        raise ValueError(f"no {missing[0]!r}")
    return elements


def _to_number(value: Any, is_lenient: bool) -> _Number:
    """Return an id or a length as it is, or with lenience as the whole number that a text or a fraction stands for."""
    if not is_lenient:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else _decode_utf8(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected a number")
    return value


def _number_classes(path: Path, elements: _Elements, has_own: bool) -> tuple[dict[_Number, int], tuple[str, ...]]:
    """Return the class id of each category, and the names of the classes."""
    if not has_own:
        expected: dict[_Number, str] = dict(COCO_CATEGORIES.items())
        for number, (name, _) in elements.categories.items():
            if expected.get(number) != name:
                raise _CategoryError(f"category {number} is {name!r}, one of COCO's eighty was expected")
        return dict(COCO_CONTIGUOUS.items()), COCO_CLASSES
    parents, used = {parent for _, parent in elements.categories.values()}, set(elements.labels)
    class_ids: dict[_Number, int] = {}
    names = ["background"]
    for number in sorted(elements.categories, key=_sort_key):
        name = elements.categories[number][0]
        if name.lower() in BACKGROUND_NAMES:
            class_ids[number] = 0
        elif number in used or name not in parents:
            class_ids[number] = len(names)
            names.append(name)
    return class_ids, check_classes(names, f"{path}: categories")


def _sort_key(number: _Number) -> tuple[bool, _Number]:
    """Order numbers before texts."""
    return isinstance(number, str), number


def _build_index(path: Path, text: str, has_own_categories: bool) -> CocoIndex:
    # Some tools write a byte order mark, whose three bytes are blanks to the parser below.
    text = "   " + text[3:] if text.startswith("\xef\xbb\xbf") else text
    elements = _read_elements(text, has_own_categories)
    class_ids, names = _number_classes(path, elements, has_own_categories)
    numbers = sorted(elements.images, key=_sort_key)
    rows = {number: row for row, number in enumerate(numbers)}
    if (owner := next((owner for owner in elements.owners if owner not in rows), None)) is not None:
        raise ValueError(f"an annotation of image {owner!r}, which is not listed")
    if (label := next((label for label in elements.labels if label not in class_ids), None)) is not None:
        raise ValueError(f"an annotation has category {label!r}, which is not listed")
    row_of = np.array([rows[owner] for owner in elements.owners], dtype=np.int64)
    order = np.argsort(row_of, kind="stable")
    checksums = np.zeros(len(numbers), dtype=np.int64)
    sums = np.array(elements.sums, dtype=np.int64)[order].tolist()
    for row, value in zip(row_of[order].tolist(), sums, strict=True):
        checksums[row] = (int(checksums[row]) * 31 + value) % (1 << 61)
    return CocoIndex(
        path=path,
        ids=tuple(elements.images[number][0] for number in numbers),
        sizes=np.array([elements.images[number][1:] for number in numbers], dtype=np.int32).reshape(-1, 2),
        starts=np.searchsorted(row_of[order], np.arange(len(numbers) + 1)),
        offsets=np.array(elements.offsets, dtype=np.int64)[order],
        lengths=np.array(elements.lengths, dtype=np.int32)[order],
        classes=np.array([class_ids[label] for label in elements.labels], dtype=np.uint8)[order],
        crowd=np.array(elements.crowd, dtype=bool)[order],
        checksums=checksums,
        class_names=names,
        has_outlines=elements.has_outlines,
    )


def _iterate_elements(text: str) -> Iterator[tuple[str, int | None, int, Any]]:
    """Yield `(field, first byte, end, value)` of each element of the three lists in `_FIELDS`.

    A list without elements is announced by `(field, None, 0, None)`, and so is the beginning of every other.
    """
    at = _expect_character(text, _skip_space(text, 0), "{")
    while True:
        key, at = _DECODER.raw_decode(text, _skip_space(text, at))
        at = _skip_space(text, _expect_character(text, _skip_space(text, at), ":"))
        if key not in _FIELDS:
            _, at = _DECODER.raw_decode(text, at)
        else:
            yield key, None, 0, None
            at = _skip_space(text, _expect_character(text, at, "["))
            while text[at] != "]":
                value, end = _DECODER.raw_decode(text, at)
                if not isinstance(value, dict):
                    raise ValueError(f"{key} holds a {type(value).__name__}")
                yield key, at, end, value
                at = _skip_space(text, end)
                if text[at] != "]":
                    at = _skip_space(text, _expect_character(text, at, ","))
            at += 1
        at = _skip_space(text, at)
        if text[at] == "}":
            return
        at = _expect_character(text, at, ",")


def _decode_utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text  # the name was written with escapes and needs no decoding


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _expect_character(text: str, at: int, character: str) -> int:
    if text[at : at + 1] != character:
        raise ValueError(f"got {text[at : at + 1]!r} at byte {at}, expected {character!r}")
    return at + 1
