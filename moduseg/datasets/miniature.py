"""The embedded world as a data set, drawn on first use."""

from __future__ import annotations

from moduseg.datasets.labels import LabelFile
from moduseg.datasets.voc import VocDataset, VocOptions
from moduseg.miniature.world.scenes import CLASSES, WorldConfig
from moduseg.miniature.world.voc_writer import write_voc


class MiniatureDataset(VocDataset):
    """A world of `moduseg.miniature.world`, written to disk in VOC layout on first use.

    Args:
        split: `train` or `val`.
        root: folder to write to; `None` for `outputs/miniature/world-<seed>-<train>-<val>-<size>`, followed by
            `-mixed-<mixing>` if that is above 0.
        seed: seed of the world; those of `DATASET_SEEDS` are unseen by the miniature models.
        train, val: number of images in each split.
        size: longest side of an image, in pixels.
        mixing: width of the band along outlines in which object and surroundings are dithered into each other, in
            pixels; the ground truth stays what it is at 0.
    """

    name = "miniature"

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        seed: int = 0,
        train: int = 160,
        val: int = 80,
        size: int = 128,
        mixing: float = 0.0,
    ) -> None:
        suffix = f"-mixed-{mixing:g}" if mixing else ""
        root = root or f"outputs/miniature/world-{seed}-{train}-{val}-{size}{suffix}"
        super().__init__(VocOptions(root, suffixes=(".png",)), split)
        if split not in ("train", "val"):
            raise ValueError(f"split: got {split!r}, expected train or val")
        if min(seed, train, val) < 0:
            raise ValueError(f"seed, train, val: got {(seed, train, val)}, expected numbers >= 0; try 0, 160, 80")
        self.seed, self.train, self.val = seed, train, val
        self.config = WorldConfig(size=size, mixing=mixing)

    @property
    def is_written(self) -> bool:
        """Whether the world has been drawn."""
        return (self.root / "image_labels.json").is_file()

    def _read_ids(self) -> tuple[list[str], str]:
        write_voc(self.root, self.seed, train=self.train, val=self.val, config=self.config)
        return super()._read_ids()

    def _read_classes(self) -> tuple[str, ...]:
        return CLASSES

    def _read_labels(self) -> LabelFile | None:
        self._id_set  # noqa: B018  - reading the ids writes the world and its label file
        return super()._read_labels()
