"""COCO's `instances_*.json` as an index: small arrays about every object, outlines left in the file.

The file of 118,287 images holds 450 MB, and ten times that as Python objects. It is read once, one object after the
other. The index keeps the position of each object in the file, so that memory does not grow with the outlines.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.datasets.classes import COCO_CATEGORIES, COCO_CONTIGUOUS
from moduseg.datasets.io import MAX_PIXELS
from moduseg.datasets.labels import drop_suffix
from moduseg.errors import DataError
from moduseg.masks.rle import encode_polygons, read_runs
from moduseg.structures import IGNORE_INDEX

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_FIELDS = ("images", "annotations", "categories")


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
        classes: `[M]` uint8, contiguous ids 1..80.
        crowd: `[M]` bool, whether it is a region of many objects.
        checksums: `[N]` int64, over the bytes of all objects of the image.
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
            `[H, W]` uint8, 0 where there is no object, 1..80, 255; and `[H, W]` int32, 0 or the object's number.

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
            raise DataError(f"{where} cannot be rasterised ({why}); fetch the annotations again") from error
        return np.flatnonzero(np.repeat(np.arange(len(runs)) % 2 == 1, runs))


def read_index(path: Path) -> CocoIndex:
    """Read an annotation file into an index.

    Raises:
        DataError: unreadable, not COCO's instances format, or with categories that are not COCO's eighty.
    """
    remedy = "expected COCO's instances_<split>.json; fetch it again"
    try:
        # Latin-1 gives one character for each byte, so that positions in the text are positions in the file.
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}), {remedy}") from error
    try:
        return _build_index(path, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, IndexError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: not COCO's instances format ({why or type(error).__name__}), {remedy}") from error


def _build_index(path: Path, text: str) -> CocoIndex:
    images: dict[int, tuple[str, int, int]] = {}
    owners, offsets, lengths, categories, crowd, sums = [], [], [], [], [], []
    seen = set()
    for field, start, stop, value in _iterate_elements(text):
        seen.add(field)
        if start is None:
            continue
        if field == "categories":
            if COCO_CATEGORIES.get(value["id"]) != value["name"]:
                raise ValueError(f"category {value['id']} is {value['name']!r}, one of COCO's eighty was expected")
        elif field == "images":
            name = _decode_utf8(value["file_name"])
            if value["id"] in images:
                raise ValueError(f"image {value['id']} is listed twice")
            height, width = value["height"], value["width"]
            is_size = type(height) is int and type(width) is int and min(height, width) > 0
            if not is_size or height * width > MAX_PIXELS:
                raise ValueError(f"image {value['id']!r} is {height!r} x {width!r}")
            images[value["id"]] = (drop_suffix(name), height, width)
        elif value["category_id"] not in COCO_CONTIGUOUS:
            raise ValueError(f"annotation {value.get('id')!r} has category {value['category_id']!r}")
        else:
            owners.append(value["image_id"])
            offsets.append(start)
            lengths.append(stop - start)
            categories.append(COCO_CONTIGUOUS[value["category_id"]])
            crowd.append(bool(value.get("iscrowd", 0)))
            sums.append(zlib.crc32(text[start:stop].encode("latin-1")))
    if missing := [field for field in _FIELDS if field not in seen]:
        raise ValueError(f"no {missing[0]!r}")
    numbers = sorted(images)
    rows = {number: row for row, number in enumerate(numbers)}
    if unknown := next((owner for owner in owners if owner not in rows), None):
        raise ValueError(f"an annotation of image {unknown!r}, which is not listed")
    row_of = np.array([rows[owner] for owner in owners], dtype=np.int64)
    order = np.argsort(row_of, kind="stable")
    checksums = np.zeros(len(numbers), dtype=np.int64)
    for row, value in zip(row_of[order].tolist(), np.array(sums, dtype=np.int64)[order].tolist(), strict=True):
        checksums[row] = (int(checksums[row]) * 31 + value) % (1 << 61)
    return CocoIndex(
        path=path,
        ids=tuple(images[number][0] for number in numbers),
        sizes=np.array([images[number][1:] for number in numbers], dtype=np.int32).reshape(-1, 2),
        starts=np.searchsorted(row_of[order], np.arange(len(numbers) + 1)),
        offsets=np.array(offsets, dtype=np.int64)[order],
        lengths=np.array(lengths, dtype=np.int32)[order],
        classes=np.array(categories, dtype=np.uint8)[order],
        crowd=np.array(crowd, dtype=bool)[order],
        checksums=checksums,
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
