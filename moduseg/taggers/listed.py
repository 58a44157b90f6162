"""Taggers without a model: the data set's own tags, a file of tags, all classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from moduseg.datasets.labels import LabelFile, read_label_file, resolve_labels
from moduseg.errors import DataError, MissingError
from moduseg.files import file_digest
from moduseg.structures import Sample, Tags
from moduseg.taggers.base import Tagger


class GivenTagger(Tagger):
    """The image-level labels of the data set: an oracle where they are read from its masks."""

    needs_labels = True

    def tag(self, sample: Sample) -> Tags:
        """Return the labels of the image.

        Raises:
            DataError: it has none.
        """
        if sample.labels is None:
            raise DataError(
                f"{sample.id}: no image-level labels, which tagger=given needs; add them, or try tagger=all"
            )
        return Tags(sample.labels)


class AllTagger(Tagger):
    """All classes: open-vocabulary segmentation as its protocols have it.

    Args:
        classes: class names, background first.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._tags = Tags(tuple(range(1, len(classes))))

    def tag(self, sample: Sample) -> Tags:
        """Return every class."""
        return self._tags


class FileTagger(Tagger):
    """Tags that another program or a person wrote down.

    Args:
        path: a `.json`, `.csv` or `.npy` file (`moduseg.datasets.labels.read_label_file`), such as the `tags.csv` or
            `labels.csv` of `scripts/tag.py`.
        classes: class names, background first.

    Raises:
        ValueError: an empty path.
    """

    def __init__(self, path: str, classes: Sequence[str]) -> None:
        if not path:
            raise ValueError("path: got an empty text, expected a .json, .csv or .npy file; set tagger.path=<file>")
        self._path, self._classes = Path(path).expanduser(), tuple(classes)

    @property
    def digest(self) -> str:
        """Digest of the file.

        Raises:
            MissingError: no such file.
        """
        if not self._path.is_file():
            remedy = "write it with scripts/tag.py, or set tagger.path=<file>"
            raise MissingError(f"tagger.path: got '{self._path}', no such file; {remedy}")
        return file_digest(self._path)

    @cached_property
    def _file(self) -> LabelFile:
        _ = self.digest
        return read_label_file(self._path)

    def tag(self, sample: Sample) -> Tags:
        """Return the classes that the file names for the image.

        Raises:
            MissingError: no such file.
            DataError: the file has no entry of the image, or one with an unknown class.
        """
        if sample.id not in self._file.entries:
            raise DataError(f"{sample.id}: not in {self._path}; add a row, or take the image off the list")
        entry = self._file.entries[sample.id]
        return Tags(resolve_labels(entry, self._classes, sample.id, self._file.locate(sample.id)))
