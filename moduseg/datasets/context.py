"""PASCAL Context: VOC 2010's images labelled pixel by pixel, in 59 classes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.datasets.classes import CONTEXT_CLASSES, CONTEXT_LABELS
from moduseg.datasets.voc import VocDataset, VocOptions
from moduseg.errors import DataError
from moduseg.structures import IGNORE_INDEX

PUBLISHED_SIZES = {"train": 4998, "val": 5104}
"""Number of images in the splits that published numbers refer to; the release itself has 5,105 for `val`."""
_NUM_LABELS = 459
_IDS = np.zeros(1 + _NUM_LABELS, np.uint8)
_IDS[list(CONTEXT_LABELS)] = np.arange(1, len(CONTEXT_CLASSES))


@dataclass(frozen=True)
class ContextOptions(VocOptions):
    """Where the files are: those of VOC 2010, and the release of PASCAL Context.

    Args:
        mask_dir: label maps `<id>.png` of 0..59, as `scripts/prepare_data.py` writes them; need not exist.
        list_dir: `<split>.txt`; where it does not exist, VOC 2010's own lists `ImageSets/Main` are taken.
        release_dir: the release, `<id>.mat` with 459 labels, below `root`; need not exist.
        reduce_zero_label: label 0 (every other label) is ignored in place of being the class background: 59 classes.
    """

    mask_dir: str = "SegmentationClassContext"
    list_dir: str = "ImageSets/SegmentationContext"
    suffixes: tuple[str, ...] = (".jpg",)
    release_dir: str = "trainval"


class ContextDataset(VocDataset):
    """`VOC2010` with `trainval/<id>.mat` of PASCAL Context, or with label maps made of them.

    The 59 most frequent of the release's 459 labels become 1..59 in the alphabetical order of their names, every other
    one 0. Label maps that are not there are made from the release when asked for, with the same result.

    Args:
        options: where the files are.
        split: `train` or `val`.
    """

    name = "context60"
    options: ContextOptions

    def __init__(self, options: ContextOptions, split: str) -> None:
        super().__init__(options, split)
        if options.reduce_zero_label:
            self.name = "context59"

    @property
    def published_size(self) -> int | None:
        """Number of images in the published split."""
        return PUBLISHED_SIZES.get(self.split)

    @property
    def release_folder(self) -> Path:
        """Folder of the release's `<id>.mat`."""
        return self.root / self.options.release_dir

    @property
    def has_truth(self) -> bool:
        """True if there are label maps, or the release that they are made from."""
        return self.release_folder.is_dir() or super().has_truth

    def _list_folder(self) -> Path:
        folder = super()._list_folder()
        return folder if folder.is_dir() else self.root / "ImageSets" / "Main"

    def _read_classes(self) -> tuple[str, ...]:
        return CONTEXT_CLASSES if self.options.classes_file is None else super()._read_classes()

    def convert(self, image_id: str) -> np.ndarray | None:
        """Return the label map of an image from the release, `[H, W]` uint8, 0..59; `None` if it is not there.

        Raises:
            DataError: the file is damaged or holds other labels.
        """
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        file = self.release_folder / f"{image_id}.mat"
        if not file.is_file():
            return None
        try:
            labels = np.asarray(loadmat(file)["LabelMap"])
        except (MatReadError, OSError, ValueError, LookupError, TypeError, NotImplementedError, zlib.error) as error:
            raise DataError(f"{file}: no label map of PASCAL Context ({error!r}); fetch it again") from error
        if labels.ndim != 2 or labels.min(initial=0) < 0 or labels.max(initial=0) > _NUM_LABELS:
            raise DataError(f"{file}: got labels {labels.shape}, expected [H, W] of 0..{_NUM_LABELS}; fetch it again")
        return _IDS[labels]

    def _read_semantic(self, image_id: str) -> np.ndarray | None:
        stored = super()._read_semantic(image_id)
        if stored is not None:
            return stored
        made = self.convert(image_id)
        if made is None or self.has_background:
            return made
        # As `VocDataset` does with what it reads.
        return np.where(made == 0, np.uint8(IGNORE_INDEX), made)

    def _truth_sizes(self, image_id: str) -> list[Any]:
        sizes, file = super()._truth_sizes(image_id), self.release_folder / f"{image_id}.mat"
        # Truth from the release, unless a label map stands in its place.
        return [file.stat().st_size, "mat"] if sizes[0] is None and file.is_file() else sizes
