"""Images named one by one with their tags: what a command hands over, without a folder layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moduseg.datasets.base import Dataset
from moduseg.datasets.io import IMAGE_SUFFIXES
from moduseg.datasets.labels import LabelFile
from moduseg.errors import DataError, MissingError


class TaggedImages(Dataset):
    """Images by id, with tags and, as there are, label maps. It is made in code; no configuration names it.

    Args:
        name: data set that artefacts are filed under.
        split: what folders of artefacts are called.
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

    def image_path(self, id: str) -> Path:
        self._check(id)
        return self._files[id]

    def mask_path(self, id: str) -> Path | None:
        return self._masks.get(id)

    @property
    def has_truth(self) -> bool:
        """Whether an image has a label map."""
        return any(path.is_file() for path in self._masks.values())


def find_images(places: Sequence[str | Path]) -> dict[str, Path]:
    """Image files by id, in the order of ids.

    Args:
        places: folders, whose images count with their sub-folders and are called by their path inside it without
            suffix; and single files, which are called by their name without suffix.

    Raises:
        MissingError: a place that is not there, or no image in any.
        DataError: two files of one id, or a file that is no image by its name.
    """
    found: dict[str, Path] = {}

    def take(image_id: str, path: Path) -> None:
        if found.get(image_id, path) != path:
            raise DataError(
                f"{path}: got image id {image_id!r} twice (also {found[image_id]}), expected each once; rename one"
            )
        found[image_id] = path

    for place in (Path(p).expanduser() for p in places):
        if place.is_dir():
            for parent, folders, names in os.walk(place, followlinks=True):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
                    if path.suffix.lower() in IMAGE_SUFFIXES:
                        take(path.relative_to(place).as_posix().removesuffix(path.suffix), path)
        elif place.is_file():
            if place.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(f"images: got {place}, expected a file that ends in {', '.join(IMAGE_SUFFIXES)}")
            take(place.stem, place)
        else:
            raise MissingError(f"images: got '{place}', no such file or folder; name images or a folder of them")
    if not found:
        raise MissingError(
            f"images: got {', '.join(str(p) for p in places) or 'nothing'}, which holds no image; expected files that "
            f"end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return dict(sorted(found.items()))
