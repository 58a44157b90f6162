"""Pixel counts of every image of a split, from which all measures are computed: sparse, a few dozen bytes an image.

An image holds a handful of labels, so of its `S x S` confusion a handful of cells is not zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from moduseg.errors import ArtefactError
from moduseg.evaluation.confusion import Uncovered
from moduseg.evaluation.measures import LabelMapCounts, count_labels

FILE = "confusion.safetensors"
"""Name of their file in a stage's folder, beside `results.json`."""
_BLOCK = 256
"""Images whose confusions are unpacked at once, so that memory does not grow with their number."""


@dataclass(frozen=True)
class ImageCounts:
    """One image's counts.

    Attributes:
        confusion: `[S, S]` int64, rows truth.
        boundary: `[3, S]` int64 of `boundary_counts`, or `None`.
        width: `d` of the boundary in pixels, 0 where there is none.
    """

    confusion: np.ndarray
    boundary: np.ndarray | None = None
    width: int = 0


@dataclass
class Sparse:
    """Rows of counts, zeros left out.

    Attributes:
        cells: of each row, the flat indices that are not zero, ascending, uint16.
        values: of each row, the counts there, uint32.
    """

    cells: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def append(self, counts: np.ndarray) -> None:
        """Add a row of any shape; fewer than 2^16 cells, each below 2^32."""
        flat = counts.ravel()
        cells = np.flatnonzero(flat)
        self.cells.append(cells.astype(np.uint16))
        self.values.append(flat[cells].astype(np.uint32))

    def dense(self, rows: slice, width: int) -> np.ndarray:
        """Return some rows unpacked, `[n, width]` int64."""
        cells, values = self.cells[rows], self.values[rows]
        table = np.zeros((len(cells), width), dtype=np.int64)
        for row, index, counts in zip(table, cells, values, strict=True):
            row[index] = counts
        return table

    def pack(self, name: str) -> dict[str, np.ndarray]:
        """Return the table as three arrays for a file."""
        lengths = np.array([len(row) for row in self.cells], dtype=np.uint32)
        return {
            f"{name}.lengths": lengths,
            f"{name}.cells": np.concatenate([np.empty(0, np.uint16), *self.cells]),
            f"{name}.values": np.concatenate([np.empty(0, np.uint32), *self.values]),
        }

    @classmethod
    def unpack(cls, arrays: dict[str, np.ndarray], name: str, rows: int, width: int) -> Sparse:
        """Return the table that `pack` made arrays of; `ValueError` where they do not fit together."""
        lengths, cells, values = (arrays[f"{name}.{part}"] for part in ("lengths", "cells", "values"))
        has_types = (lengths.dtype, cells.dtype, values.dtype) == (np.uint32, np.uint16, np.uint32)
        total = int(lengths.sum(dtype=np.int64))
        if not has_types or lengths.shape != (rows,) or cells.shape != (total,) or values.shape != (total,):
            raise ValueError(f"{name} holds {lengths.shape}, {cells.shape}, {values.shape} for {rows} images")
        if total and int(cells.max()) >= width:
            raise ValueError(f"{name} names cell {int(cells.max())} of {width}")
        ends = np.cumsum(lengths.astype(np.int64))[:-1]
        return cls(np.split(cells, ends) if rows else [], np.split(values, ends) if rows else [])


class SplitCounts:
    """Pixel counts of a split, image by image.

    Args:
        num_labels: labels, background included.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self.ids: list[str] = []
        self.widths: list[int] = []
        self._confusion = Sparse()
        self._boundary: Sparse | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_boundary(self) -> bool:
        """Whether contours were counted."""
        return self._boundary is not None

    def append(self, image_id: str, counts: ImageCounts) -> None:
        """Add an image; all of them with contours, or none.

        Raises:
            ValueError: another number of labels, or contours for some images alone.
        """
        if counts.confusion.shape != (self.num_labels, self.num_labels):
            raise ValueError(f"counts of {image_id!r}: got {counts.confusion.shape}, expected {(self.num_labels,) * 2}")
        if not self.ids and counts.boundary is not None:
            self._boundary = Sparse()
        if (counts.boundary is None) is self.has_boundary:
            raise ValueError(f"counts of {image_id!r}: got contours for some images alone; count them for all or none")
        self.ids.append(image_id)
        self.widths.append(counts.width)
        self._confusion.append(counts.confusion)
        if self._boundary is not None and counts.boundary is not None:
            self._boundary.append(counts.boundary)

    def matrix(self) -> np.ndarray:
        """Return the confusion of the whole split, `[S, S]` int64."""
        total = np.zeros(self.num_labels * self.num_labels, dtype=np.int64)
        for cells, values in zip(self._confusion.cells, self._confusion.values, strict=True):
            total[cells] += values
        return total.reshape(self.num_labels, self.num_labels)

    def cells(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image's confusion, sparse: flat indices (`truth * S + predicted`), ascending, and their counts."""
        return self._confusion.cells[row], self._confusion.values[row]

    def label_counts(self, has_background: bool = True, uncovered: Uncovered = "wrong") -> np.ndarray:
        """Return `moduseg.evaluation.confusion.label_counts` of each image, `[n, 3, S]` int64."""
        counts = self.counts_of(count_labels, has_background, uncovered, has_contours=False)
        return np.zeros((0, 3, self.num_labels), dtype=np.int64) if counts is None else counts

    def counts_of(
        self,
        count: Callable[[LabelMapCounts], np.ndarray | None],
        has_background: bool = True,
        uncovered: Uncovered = "wrong",
        *,
        has_contours: bool = True,
    ) -> np.ndarray | None:
        """Return the pixel counts of each image that a measure is computed from.

        Args:
            count: `counts` of the measure.
            has_background, uncovered: see `moduseg.evaluation.confusion.label_counts`.
            has_contours: whether it may see contours, if they were counted.

        Returns:
            `[n, 3, S]` int64; `None` where the measure does not apply, or without images.
        """
        contours = self.boundary_counts(has_background) if has_contours and self.has_boundary else None
        blocks = []
        for start in range(0, len(self), _BLOCK):
            rows = slice(start, start + _BLOCK)
            dense = self._confusion.dense(rows, self.num_labels**2).reshape(-1, self.num_labels, self.num_labels)
            counts = LabelMapCounts(dense, None if contours is None else contours[rows], has_background, uncovered)
            block = count(counts)
            if block is None:
                return None
            blocks.append(block)
        return np.concatenate(blocks) if blocks else None

    def boundary_counts(self, has_background: bool = True) -> np.ndarray:
        """Return `moduseg.evaluation.boundary.boundary_counts` of each image; zeros for a label 0 that is no class.

        Returns:
            `[n, 3, S]` int64.

        Raises:
            ValueError: contours were not counted.
        """
        if self._boundary is None:
            raise ValueError("boundary: got counts without contours; set evaluation.boundary_width above 0")
        counts = self._boundary.dense(slice(None), 3 * self.num_labels).reshape(-1, 3, self.num_labels)
        if not has_background:
            counts[..., 0] = 0
        return counts

    def select(self, ids: Sequence[str]) -> SplitCounts:
        """Return the counts of some images, in the order of `ids`."""
        row_of = {image_id: row for row, image_id in enumerate(self.ids)}
        chosen = SplitCounts(self.num_labels)
        rows = [row_of[image_id] for image_id in ids]
        chosen.ids = list(ids)
        chosen.widths = [self.widths[i] for i in rows]
        chosen._confusion = _select_rows(self._confusion, rows)
        chosen._boundary = None if self._boundary is None else _select_rows(self._boundary, rows)
        return chosen

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file; equal counts give equal bytes."""
        arrays = {
            "size": np.array([self.num_labels], dtype=np.int64),
            "ids": np.frombuffer(json.dumps(self.ids).encode(), dtype=np.uint8),
            "widths": np.array(self.widths, dtype=np.int64),
            **self._confusion.pack("confusion"),
            **({} if self._boundary is None else self._boundary.pack("boundary")),
        }
        return save_arrays(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> SplitCounts:
        """Read what `to_bytes` wrote.

        Args:
            data: the file's content.
            where: the file, for messages.

        Raises:
            ArtefactError: the content is something else.
        """
        try:
            arrays = load_arrays(data)
            counts = cls(int(arrays["size"].item()))
            ids, widths = json.loads(arrays["ids"].tobytes()), arrays["widths"]
            if (
                not 1 <= counts.num_labels <= 255
                or not isinstance(ids, list)
                or not all(isinstance(i, str) for i in ids)
            ):
                raise ValueError(f"it names {counts.num_labels} labels, and no list of images")
            if widths.shape != (len(ids),) or len(set(ids)) != len(ids):
                raise ValueError(f"it names {len(ids)} images, some twice, and {widths.shape} widths")
            counts.ids, counts.widths = ids, [int(w) for w in widths]
            counts._confusion = Sparse.unpack(arrays, "confusion", len(ids), counts.num_labels**2)
            if "boundary.lengths" in arrays:
                counts._boundary = Sparse.unpack(arrays, "boundary", len(ids), 3 * counts.num_labels)
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(
                f"{where}: not readable as counts ({reason}), expected what evaluation writes; remove the file and run "
                "scripts/infer.py or scripts/evaluate.py again"
            ) from error
        return counts


def _select_rows(table: Sparse, rows: Sequence[int]) -> Sparse:
    return Sparse([table.cells[i] for i in rows], [table.values[i] for i in rows])
