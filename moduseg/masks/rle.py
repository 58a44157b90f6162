"""COCO's run-length encoding of masks: written from packed bits, checked before it is decoded.

The decoder of pycocotools trusts the string, and then reads and writes beyond the end of its buffers; its encoder keeps
the interpreter's lock, so that no other thread feeds a device meanwhile.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from moduseg.masks.bits import PackedMasks

_MAX_CHARACTERS = 7
"""Characters of one run length in the compressed form: 5 bits each, and counts have 32 bits."""


def decode_counts(text: str) -> np.ndarray:
    """Return the run lengths of COCO's compressed string, `[R]` int64; the first run is of zeros.

    Each number is a sequence of characters from `0` to `o` that carry 5 bits each, lowest first, and one that says
    whether more follow; from the fourth number on it is the difference to the number two before.

    Raises:
        ValueError: a character out of range, an unfinished or over-long number, a negative run length.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError as error:
        raise ValueError("a character out of range") from error
    if not len(codes):
        return np.zeros(0, dtype=np.int64)
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("a character out of range")
    ends = np.flatnonzero((codes & 32) == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("the string stops inside a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= _MAX_CHARACTERS:
        raise ValueError("a number of more than 32 bits")
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * position), starts)
    negative = (codes[ends] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (ends - starts + 1)), 0)
    counts = values.copy()
    counts[1::2] = np.cumsum(values[1::2])
    counts[2::2] = np.cumsum(values[2::2])
    if counts.min() < 0:
        raise ValueError("a negative run length")
    return counts


def encode_masks(packed: PackedMasks) -> list[str]:
    """Return COCO's compressed run lengths of each mask, the strings that pycocotools gives."""
    count, height, _ = packed.words.shape
    pixels = height * packed.width
    changes = find_changes(packed)
    # A run ends before each change, and the last one of a mask with its last pixel.
    mask_of_change = changes // max(pixels, 1)
    num_runs = np.bincount(mask_of_change, minlength=count) + 1
    last_runs = np.cumsum(num_runs) - 1
    ends = np.empty(len(changes) + count, np.int64)
    ends[np.arange(len(changes)) + mask_of_change] = changes
    ends[last_runs] = np.arange(1, count + 1) * pixels
    runs = np.diff(ends, prepend=0)
    # From the fourth run of a mask on, the difference to the run two before is stored.
    position = np.arange(len(runs)) - np.repeat(last_runs + 1 - num_runs, num_runs)
    later = np.flatnonzero(position > 2)
    values = runs.copy()
    values[later] -= runs[later - 2]
    characters, num_characters = _encode_numbers(values)
    text = characters.tobytes().decode("ascii")
    text_ends = np.cumsum(num_characters)[last_runs].tolist()
    return [text[start:stop] for start, stop in pairwise([0, *text_ends])]


def find_changes(packed: PackedMasks) -> np.ndarray:
    """Return where pixels differ from the one before, down the columns; the pixel before the first is no mask's.

    Returns:
        `[P]` int64, ascending, `mask * H * W + column * H + row`.
    """
    words, width = packed.words, packed.width
    height, row_words = words.shape[1:]
    changes = np.empty_like(words)
    np.bitwise_xor(words[:, 1:], words[:, :-1], out=changes[:, 1:])
    # The first pixel of a column follows the last one of the column before.
    first, last = (np.unpackbits(words[:, row].view(np.uint8), axis=1) for row in (0, -1))
    first[:, 1:width] ^= last[:, : width - 1]
    changes[:, 0] = np.packbits(first, axis=1).view(np.uint64)
    filled = np.flatnonzero(changes)
    bits = np.flatnonzero(np.unpackbits(changes.ravel()[filled].view(np.uint8)))
    word = filled[bits >> 6]
    mask_and_row, word_in_row = np.divmod(word, row_words)
    mask, row = np.divmod(mask_and_row, height)
    result = (mask * width + word_in_row * 64 + (bits & 63)) * height + row
    result.sort()
    return result


def _encode_numbers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of numbers, `[R]` int64, as `decode_counts` reads them, and how many each number has."""
    characters = np.zeros((len(values), _MAX_CHARACTERS), np.uint8)
    num_characters = np.zeros(len(values), np.int64)
    unfinished, rest = np.arange(len(values)), values
    for column in range(_MAX_CHARACTERS):
        digits, rest = rest & 31, rest >> 5
        # The highest bit of the last digit is the sign, so what is left must be all zeros or all ones.
        has_more = rest != -(digits >> 4)
        characters[unfinished, column] = (digits | has_more << 5) + 48
        num_characters[unfinished] += 1
        unfinished, rest = unfinished[has_more], rest[has_more]
    return characters[np.arange(_MAX_CHARACTERS) < num_characters[:, None]], num_characters


def read_runs(counts: object, pixels: int) -> np.ndarray:
    """Return checked run lengths, `[R]` int64, first of zeros, of a list of numbers or of a compressed string.

    Args:
        counts: as JSON gives it; nothing about it is assumed.
        pixels: the sum that the run lengths must have.

    Raises:
        ValueError: another sum, or a run length that is out of range or no integer.
    """
    if isinstance(counts, list):
        if not all(type(c) is int and 0 <= c <= pixels for c in counts):
            raise ValueError(f"a run length that is not a whole number from 0 to {pixels}")
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, str):
        runs = decode_counts(counts)
    else:
        raise ValueError(f"'counts' of type {type(counts).__name__}")
    # Each one is checked first: a sum of large numbers could wrap around to the right one.
    if (len(runs) and runs.max() > pixels) or int(runs.sum()) != pixels:
        raise ValueError(f"run lengths that do not sum to {pixels} pixels")
    return runs


def decode_masks(runs: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return masks from their run lengths.

    Args:
        runs: of each mask, run lengths `[R]` int64 column by column, as `read_runs` gives them.
        size: `(H, W)` of the image.

    Returns:
        `[N, H, W]` bool.
    """
    height, width = size
    pixels = height * width
    result = np.zeros((len(runs), height, width), dtype=np.uint8)
    # Every second run is of ones. Its first pixel and the one after its last are marked, in the order of the file.
    ends = [np.cumsum(counts) + index * pixels for index, counts in enumerate(runs)]
    stops = np.concatenate([np.zeros(0, np.int64), *(e[1::2] for e in ends)])
    starts = stops - np.concatenate([np.zeros(0, np.int64), *(counts[1::2] for counts in runs)])
    starts, stops = starts[starts < stops], stops[starts < stops]
    # A run that goes on in the next column is cut there: from here on each begins and ends within one column.
    first_column, last_column = starts // height, (stops - 1) // height
    num_columns = last_column - first_column + 1
    run = np.repeat(np.arange(len(starts)), num_columns)
    column = np.arange(len(run)) - np.repeat(np.cumsum(num_columns) - num_columns - first_column, num_columns)
    top = np.maximum(starts[run] - column * height, 0)
    bottom = np.minimum(stops[run] - column * height, height)
    mask, x = np.divmod(column, width)
    flat = result.reshape(-1)
    # Runs of a mask are disjoint, so no two begin at one pixel, nor end. Where one ends as the next begins, the two
    # marks cancel.
    flat[(mask * height + top) * width + x] = 1
    is_inside = bottom < height
    flat[((mask * height + bottom) * width + x)[is_inside]] ^= 1
    # A pixel is of the mask if an odd number of marks is at it or above.
    for row in range(1, height):
        result[:, row] ^= result[:, row - 1]
    return result.view(bool)


def merge_disjoint_runs(runs: list[np.ndarray], size: tuple[int, int]) -> np.ndarray | None:
    """Return one id map of masks that share no pixel, without decoding any of them.

    Args:
        runs: of each mask, run lengths `[R]` int64 column by column, as `read_runs` gives them.
        size: `(H, W)` of the image.

    Returns:
        `[H, W]` int32, the index of the mask that each pixel belongs to, -1 for none; `None` if two masks share a
        pixel.
    """
    # Every second run is of ones: its length, its end, its mask.
    lengths = np.concatenate([np.zeros(0, np.int64), *(counts[1::2] for counts in runs)])
    ends = np.concatenate([np.zeros(0, np.int64), *(np.cumsum(counts)[1::2] for counts in runs)])
    owners = np.repeat(np.arange(len(runs), dtype=np.int32), [len(counts) // 2 for counts in runs])
    is_filled = lengths > 0
    order = np.argsort(ends[is_filled], kind="stable")
    lengths, ends, owners = lengths[is_filled][order], ends[is_filled][order], owners[is_filled][order]
    gaps = ends - lengths - np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
    if (gaps < 0).any():
        return None
    values = np.full(2 * len(ends) + 1, -1, np.int32)
    values[1::2] = owners
    repeats = np.empty(len(values), np.int64)
    repeats[:-1:2], repeats[1::2] = gaps, lengths
    repeats[-1] = size[0] * size[1] - (ends[-1] if len(ends) else 0)
    return np.ascontiguousarray(np.repeat(values, repeats).reshape(size[1], size[0]).T)


def encode_polygons(polygons: list[Any], size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths, `[R]` int64, first of zeros, of the union of polygons as pycocotools rasterises them.

    Args:
        polygons: as JSON gives them, each `x, y, x, y, ...` in pixels; nothing about them is assumed.
        size: `(H, W)` of the image.

    Raises:
        ValueError: no polygon, one of fewer than three points, one that is no list of numbers, or one so far outside
            or so long that rasterising it would fill the memory.
    """
    from pycocotools import mask as coco

    max_coordinate = 2 * max(size)
    for polygon in polygons:
        has_points = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not has_points or not all(_is_finite(c) and abs(c) <= max_coordinate for c in polygon):
            raise ValueError(
                f"a polygon is {' '.join(str(polygon).split())[:60]}, expected x, y, x, y, ... of three points or "
                f"more, within {max_coordinate} pixels of the image"
            )
        # The rasteriser takes memory in proportion to the outline, whatever lies inside the image.
        points = list(zip(polygon[0::2], polygon[1::2], strict=True))
        if sum(math.dist(p, q) for p, q in pairwise([*points, points[0]])) > 100 * sum(size) + 1000:
            raise ValueError("a polygon's outline is longer than 100 times the image's")
    if not polygons:
        raise ValueError("'segmentation' is an empty list, expected polygons")
    merged = coco.merge(coco.frPyObjects(polygons, *size))
    return decode_counts(merged["counts"].decode("ascii"))


def _is_finite(value: object) -> bool:
    return (type(value) is int and abs(value) < 1 << 62) or (type(value) is float and math.isfinite(value))
