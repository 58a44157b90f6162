"""Pseudo masks that somebody made already: one label PNG for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from moduseg.errors import DataError, MissingError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.runtime.devices import Device
from moduseg.runtime.weights import file_digest
from moduseg.structures import IGNORE_INDEX, Proposals, Sample, ScoreMaps


class FilePseudoMasks(PseudoMaskGenerator):
    """Label maps from a folder, as one-hot scores with the background given.

    Args:
        folder: where the files are; `~` allowed.
        device: where the scores are put.
        classes: class names, background first; ids beyond them are an error.
        pattern: name of an image's file inside `folder`; `{id}` is the image's id.
        filter_labels: pixels of classes outside the image-level labels become background (METHOD, stage 1, step 1).

    Raises:
        ValueError: a pattern without `{id}`.
    """

    def __init__(
        self,
        folder: str,
        device: Device,
        classes: Sequence[str],
        pattern: str = "{id}.png",
        filter_labels: bool = True,
    ) -> None:
        if "{id}" not in pattern:
            raise ValueError(f"pattern: got {pattern!r}, expected a file name with {{id}}; try {{id}}.png")
        self._folder, self._device, self._classes = Path(folder).expanduser(), device, tuple(classes)
        self._pattern, self._filter = pattern, filter_labels

    @property
    def digest(self) -> str:
        """sha256 over names and contents of the folder's files of this pattern's suffix.

        Raises:
            MissingError: there is no such folder.
        """
        self._check_folder()
        total = hashlib.sha256()
        for path in sorted(self._folder.rglob("*" + Path(self._pattern).suffix)):
            if path.is_file():
                total.update(f"{path.relative_to(self._folder).as_posix()}:{file_digest(path)}\n".encode())
        return total.hexdigest()

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """One-hot scores of the image's file.

        Returns:
            Maps of the classes in `labels`; with `filter_labels=false`, of those that the file holds.

        Raises:
            MissingError: there is no such folder.
            DataError: no file for this image, or one that is damaged, not a label map, of another size or with ids
                that are no class.
        """
        self._check_folder()
        path = self._folder / self._pattern.replace("{id}", sample.id)
        array = read_label_map(path, len(self._classes) - 1)
        if array.shape != sample.size:
            raise DataError(f"{path}: got {array.shape} pixels, expected the image's {sample.size}; make it again")
        return one_hot(array, labels if self._filter else None, self._device)

    def _check_folder(self) -> None:
        if not self._folder.is_dir():
            raise MissingError(
                f"pseudo_masks.generator.folder: got {str(self._folder)!r}, no such folder; "
                "set pseudo_masks.generator.folder=<folder of label PNGs>"
            )


def read_label_map(path: Path, num_classes: int) -> np.ndarray:
    """`[H, W]` uint8 class ids of an indexed or 8-bit grey picture.

    Raises:
        DataError: absent, damaged, of another kind, or an id other than 0..num_classes and 255.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; make the label map, or take the image out of the list")
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise DataError(
                    f"{path}: got a {picture.mode} picture, expected one channel of class ids; save it as indexed PNG"
                )
            array = np.array(picture, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not readable as a picture ({error}); make it again") from error
    wrong = sorted({int(v) for v in np.unique(array)} - set(range(num_classes + 1)) - {IGNORE_INDEX})
    if wrong:
        raise DataError(f"{path}: got class ids {wrong[:5]}, expected 0..{num_classes} or 255; check the class list")
    return array


def one_hot(array: np.ndarray, labels: tuple[int, ...] | None, device: Device) -> ScoreMaps:
    """Scores 0 and 1 of an `[H, W]` uint8 label map, background given, 255 ignored.

    Args:
        array: class ids.
        labels: ascending ids to keep, the others become background; `None` keeps all that occur.
        device: where the scores are put.
    """
    label_map = torch.from_numpy(np.array(array, order="C")).to(device.torch_device)
    ignore = label_map == IGNORE_INDEX
    if labels is None:
        labels = tuple(int(c) for c in np.unique(array) if c not in (0, IGNORE_INDEX))
    ids = torch.tensor(labels, dtype=torch.uint8, device=label_map.device)
    scores = (label_map == ids[:, None, None]).float()
    background = (~scores.any(0) & ~ignore).float()
    return ScoreMaps(labels, scores, background, ignore)
