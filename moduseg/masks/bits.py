"""Masks as bits, for the CPU: with 64 pixels a word, an intersection is an AND and a count of ones.

Packing reads the masks once, at the speed of memory; areas, boxes, intersections and painting then read an eighth of
the bytes. Other devices use matrix products instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

PACKED = ("cpu",)
"""Types of devices whose masks are packed into bits; the others multiply matrices."""
_PAIR_WORDS = 1 << 16
"""Words processed at once for pairs of masks, so that they stay in the cache."""
_ONES_OF = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)
"""Ones in each 16-bit number, for numpy before 2.0."""


@dataclass(frozen=True)
class PackedMasks:
    """Masks of one image, one bit a pixel; each row begins at a word.

    Attributes:
        words: `[N, H, L]` uint64, zero bits fill up a row.
        width: of the image in pixels.
    """

    words: np.ndarray
    width: int

    @classmethod
    def of(cls, masks: Tensor) -> PackedMasks:
        """Pack masks, `[N, H, W]` bool on the CPU."""
        count, height, width = masks.shape
        packed = np.packbits(masks.numpy(), axis=-1)
        if packed.shape[2] % 8 == 0:
            return cls(np.ascontiguousarray(packed).view(np.uint64), width)
        words = np.zeros((count, height, -(-width // 64)), np.uint64)
        words.view(np.uint8)[:, :, : packed.shape[2]] = packed
        return cls(words, width)

    def __len__(self) -> int:
        return len(self.words)

    def select(self, keep: np.ndarray) -> PackedMasks:
        """Return the masks that `keep` (indices) names, in its order."""
        selected = PackedMasks(self.words[keep], self.width)
        if "areas" in self.__dict__:  # counted before
            selected.__dict__["areas"] = self.areas[keep]
        return selected

    @cached_property
    def areas(self) -> np.ndarray:
        """`[N]` int64, pixels in each mask."""
        return self.shared(np.arange(len(self)), np.arange(len(self)))

    @property
    def are_disjoint(self) -> bool:
        """Whether no two masks share a pixel."""
        union = np.bitwise_or.reduce(self.words, axis=0, keepdims=True)
        return int(self.areas.sum()) == int(_ones(union)[0])

    def boxes(self) -> np.ndarray:
        """Return `[N, 4]` int64 top, bottom, left, right: the first row or column with a pixel, and one past the last.

        The first one of an empty mask is greater than its last one.
        """
        rows = np.bitwise_or.reduce(self.words, axis=2)
        columns = np.bitwise_or.reduce(self.words, axis=1)
        return np.stack([*_ends(rows != 0), *_ends(self._pixels(columns).astype(bool))], axis=1)

    def shared(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return `[P]` int64: the pixels that masks `first[p]` and `second[p]` share."""
        step = max(1, _PAIR_WORDS // max(1, self.words[:1].size))
        counts = np.zeros(len(first), np.int64)
        for start in range(0, len(first), step):
            part = slice(start, start + step)
            counts[part] = _ones(self.words[first[part]] & self.words[second[part]])
        return counts

    def shared_with(self, other: PackedMasks) -> np.ndarray:
        """Return `[N, M]` int64: the pixels that each mask shares with each of `other`'s `M` masks of the same size."""
        step = max(1, _PAIR_WORDS // max(1, self.words[:1].size))
        counts = np.zeros((len(self), len(other)), np.int64)
        for start in range(0, len(self), step):
            part = self.words[start : start + step]
            for column, words in enumerate(other.words):
                counts[start : start + step, column] = _ones(part & words)
        return counts

    def paint(self, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return `[H, W]`, type of `labels`: the label of the first mask that covers each pixel, 0 for none.

        Args:
            labels: `[K]` uint8, or a wider integer without negative entries.
            order: `[K]` int64, the masks that have these labels, first to last.
        """
        result = np.zeros((self.words.shape[1], self.width), labels.dtype)
        if not len(order):
            return result
        # No two visible parts share a pixel, so the labels are composed one binary digit at a time. Mask by mask, all
        # of it stays in the cache.
        digits = range(int(labels.max()).bit_length())
        planes = np.zeros((len(digits), *self.words.shape[1:]), np.uint64)
        free = np.full(self.words.shape[1:], ~np.uint64(0))
        visible = np.empty_like(free)
        for index, label in zip(order.tolist(), labels.tolist(), strict=True):
            np.bitwise_and(self.words[index], free, out=visible)
            free ^= visible
            for digit in digits:
                if label >> digit & 1:
                    planes[digit] |= visible
        for digit, plane in zip(digits, planes, strict=True):
            result |= self._pixels(plane).astype(labels.dtype, copy=False) << labels.dtype.type(digit)
        return result

    def _pixels(self, words: np.ndarray) -> np.ndarray:
        """Return `[..., W]` uint8 of 0 and 1 from rows of words, `[..., L]`."""
        return np.unpackbits(words.view(np.uint8), axis=-1, count=self.width)


def _ones(words: np.ndarray) -> np.ndarray:
    """Return `[n]` int64, the ones in each entry of `[n, ...]` uint64."""
    words = words.reshape(len(words), -1) if words.size else np.zeros((len(words), 1), np.uint64)
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return _ONES_OF[words.view(np.uint16)].sum(axis=1, dtype=np.int64)


def _ends(hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and one past the last true position of each row of `hit [N, L]`; `L` and 0 for none."""
    length = hit.shape[1]
    if not length:
        return np.zeros(len(hit), np.int64), np.zeros(len(hit), np.int64)
    is_hit = hit.any(axis=1)
    return np.where(is_hit, hit.argmax(axis=1), length), np.where(is_hit, length - hit[:, ::-1].argmax(axis=1), 0)
