"""Images listed one by one with their tags, without a folder layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moduseg.datasets.base import Dataset
from moduseg.datasets.labels import LabelFile


class TaggedImages(Dataset):
    """Images by id, with tags and, for some, label maps. Commands make it in code; no configuration names it.

    Args:
        name: data set that artefacts are filed under.
        split: file name of the split in artefacts.
        classes: class names, background first.
        files: image file of each id, in order.
        tags: ascending class ids of each image; images that are not in it have none.
        masks: label map of the images that have one.
        source: where the tags come from, as results call it.
    """

    masks_optional = True

    def __init__(
        self,
        name: str,
        split: str,
        *,
        classes: Sequence[str],
        files: Mapping[str, Path],
        tags: Mapping[str, Sequence[int]],
        masks: Mapping[str, Path] | None = None,
        source: str = "tags",
    ) -> None:
        super().__init__(".", split)
        self.name = name
        self._names, self._files = tuple(classes), dict(files)
        self._masks, self._source = dict(masks or {}), source
        self._tags = {image_id: tuple(ids) for image_id, ids in tags.items()}

    def _read_ids(self) -> tuple[list[str], str]:
        return list(self._files), "images"

    def _read_classes(self) -> tuple[str, ...]:
        return self._names

    def _read_labels(self) -> LabelFile | None:
        return LabelFile(dict(self._tags), self._source, self._source)

    def image_path(self, image_id: str) -> Path:
        self._check(image_id)
        return self._files[image_id]

    def mask_path(self, image_id: str) -> Path | None:
        return self._masks.get(image_id)

    @property
    def has_truth(self) -> bool:
        """True if at least one image has a label map."""
        return any(path.is_file() for path in self._masks.values())
