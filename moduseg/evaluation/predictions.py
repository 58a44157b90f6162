"""A folder of label maps that any tool may have written, checked file by file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moduseg.datasets.image_files import match_masks
from moduseg.datasets.io import read_index_png, read_label_png
from moduseg.datasets.png import HEADER_BYTES, INDEXED, parse_png_header
from moduseg.errors import DataError, MissingError
from moduseg.structures import IGNORE_INDEX

_GREY_ALPHA = 4
_MAX_NAMED = 3
"""A message names at most this many files."""


class PredictionFolder:
    """`<folder>/<id>.png` for every image of a split: indexed or grey PNGs that hold class ids.

    Files that fit no image are counted and named in a warning.

    Args:
        folder: where they are.
        ids: the images.
        num_labels: labels, background included: ids may be 0..num_labels-1.

    Raises:
        MissingError: no such folder.
        DataError: images without a file.
    """

    def __init__(self, folder: Path, ids: Sequence[str], num_labels: int) -> None:
        self.folder, self.ids, self.num_labels = folder, tuple(ids), num_labels
        if not folder.is_dir():
            got = "a file" if folder.exists() else "no such folder"
            raise MissingError(
                f"predictions: got '{folder}', {got}; expected a folder of <id>.png; set predictions=<folder>"
            )
        self._files = match_masks(folder, frozenset(self.ids))
        absent = [image_id for image_id in self.ids if not self.path(image_id).is_file()]
        if absent:
            more = f" and {len(absent) - _MAX_NAMED} more" if len(absent) > _MAX_NAMED else ""
            inside = (folder / "labels").is_dir()
            remedy = f"try predictions={folder / 'labels'}" if inside else "write them, or score a split without them"
            raise DataError(
                f"{self.path(absent[0])}: no such file; got predictions for {len(self.ids) - len(absent)} of "
                f"{len(self.ids)} images of the split, expected one <id>.png for each; missing "
                f"{', '.join(absent[:_MAX_NAMED])}{more}; {remedy}"
            )

    @property
    def max_id(self) -> int:
        """The largest class id that a file may hold."""
        return self.num_labels - 1

    def path(self, image_id: str) -> Path:
        """Return the file of an image."""
        return self._files.get(image_id, self.folder / f"{image_id}.png")

    def read(self, image_id: str, expected: tuple[int, int]) -> np.ndarray:
        """Return the class ids of an image.

        Args:
            image_id: one of `ids`.
            expected: `(H, W)` that they must have.

        Returns:
            `[H, W]` uint8 in 0..num_labels-1.

        Raises:
            DataError: the file is no PNG, damaged, a colour picture, of another size, or holds 255 or an id that is no
                class.
        """
        path = self.path(image_id)
        labels = self._read(path)
        if labels.shape != expected:
            raise DataError(
                f"{path}: got {labels.shape[1]} x {labels.shape[0]} pixels, expected {expected[1]} x {expected[0]} as "
                "its image has; resize it with nearest neighbour, or predict at the size of the image"
            )
        if int(labels.max(initial=0)) >= self.num_labels:
            raise DataError(self._wrong_ids(path, labels))
        return labels.astype(np.uint8, copy=False)

    def _read(self, path: Path) -> np.ndarray:
        try:
            with path.open("rb") as file:
                header = parse_png_header(file.read(HEADER_BYTES))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), expected a PNG; check the file") from error
        remedy = "store the class ids as an indexed or 8-bit grey PNG"
        if header is None:
            raise DataError(f"{path}: got a file that is not a PNG, expected class ids 0..{self.max_id}; {remedy}")
        _, _, depth, colour, _ = header
        if colour not in (0, INDEXED, _GREY_ALPHA):
            kind = "RGBA" if colour == 6 else "RGB"
            raise DataError(
                f"{path}: got a colour picture ({kind}), expected class ids 0..{self.max_id}, not colours; {remedy}"
            )
        return read_index_png(path) if depth == 16 else read_label_png(path)

    def _wrong_ids(self, path: Path, labels: np.ndarray) -> str:
        wrong = labels >= self.num_labels
        row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
        value = int(labels[row, column])
        where = f"in {int(wrong.sum())} pixels, the first at row {row}, column {column}"
        allowed = f"expected class ids 0..{self.max_id}"
        if value == IGNORE_INDEX:
            return (
                f"{path}: got {IGNORE_INDEX} (ignored) {where}; {allowed}, a prediction labels every pixel; write 0 "
                "where nothing is predicted"
            )
        return (
            f"{path}: got label id {value} {where}; {allowed} as there are {self.max_id} classes beside background; "
            "map its ids to the data set's (see its class list)"
        )
