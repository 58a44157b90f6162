"""Words in place of a data set's class list: how they are written, and the data set as they see it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.datasets.base import Dataset
from moduseg.datasets.labels import LabelFile, check_classes, read_text, split_colour
from moduseg.errors import ConfigError, MissingError
from moduseg.structures import IGNORE_INDEX

_BACKGROUND = "background"


@dataclass(frozen=True)
class WordList:
    """Classes by their words.

    Attributes:
        names: of the classes, label 1 first.
        words: the word or words of each class, which compete for its pixels.
        background: words for label 0; with none, a background rule decides what label 0 gets.

    Raises:
        ConfigError: no class, a class without a word, or a name that is empty or repeated.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.words) != len(self.names) or not all(words and all(words) for words in self.words):
            raise ConfigError(
                f"vocabulary: got {self.words} for {self.names}, expected one word or more for each class"
            )
        check_classes(self.classes, "vocabulary")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""
        return (_BACKGROUND, *self.names)

    def as_settings(self) -> dict[str, Any]:
        """Return the words as the settings `class_words` and `background_words` of generators and taggers."""
        pairs = zip(self.names, self.words, strict=True)
        # A single word is text: some generators take no more than one.
        class_words = {name: words[0] if len(words) == 1 else list(words) for name, words in pairs}
        return {"class_words": class_words, "background_words": list(self.background)}


def read_word_list(value: str | Sequence[str]) -> WordList | None:
    """Return the vocabulary that a value of the configuration means.

    A file has one class a line: a word, several words, or `name: word; word` where the name itself is no word. Words
    are separated by `;`, or by `,` in a file without any `;`; a colour (` #rrggbb`) at the end of a line is no word. A
    class called `background` gives the words of label 0. Text that is no file lists classes separated by `;`, and a
    list holds one class an entry; in both, several words of a class are separated by `,`.

    Args:
        value: a file (a path, or a name that ends in `.txt`), text or a list.

    Returns:
        The words; `None` if the value is empty.

    Raises:
        MissingError: no such file.
        ConfigError: no class, or a class without a word.
        DataError: a file that cannot be read, or a name that is repeated.
    """
    if isinstance(value, str):
        path = Path(value).expanduser()
        # Unlike `Path.is_file`, this takes text of any length.
        if os.path.isfile(path):  # noqa: PTH113
            # A class list may name colours, which are no words.
            return _parse_lines([split_colour(line)[0] for line in read_text(path).splitlines()])
        if path.suffix == ".txt":
            raise MissingError(
                f"vocabulary: got '{value}', no such file; expected one class a line, or a list of words"
            )
        value = value.split(";")
    return _parse_lines(value) if any(line.strip() for line in value) else None


def _parse_lines(lines: Sequence[str]) -> WordList:
    """Return the words of lines, empty ones left out."""
    separator = ";" if any(";" in line for line in lines) else ","
    names: list[str] = []
    words_of_class: list[tuple[str, ...]] = []
    background: tuple[str, ...] = ()
    for line in filter(None, map(str.strip, lines)):
        name, colon, text = line.partition(":")
        words = tuple(word.strip() for word in (text if colon else line).split(separator) if word.strip())
        name = name.strip() if colon else (words[0] if words else line)
        if name == _BACKGROUND:
            background = words
            continue
        names.append(name)
        words_of_class.append(words)
    return WordList(tuple(names), tuple(words_of_class), background)


class RewordedDataset(Dataset):
    """A split of a data set with the classes of a vocabulary.

    If the vocabulary has exactly the names of the data set's classes, in any order, ground truth and tags have its
    ids. Otherwise there is neither: the label maps hold other classes than the data set's truth.

    Args:
        dataset: the split.
        words: the vocabulary.
    """

    masks_optional = True

    def __init__(self, dataset: Dataset, words: WordList) -> None:
        super().__init__(str(dataset.root), dataset.split)
        self.name, self.has_background, self.image_range = dataset.name, dataset.has_background, dataset.image_range
        self._dataset, self._words = dataset, words

    def _read_ids(self) -> tuple[list[str], str]:
        return list(self._dataset.ids), self._dataset.name

    def _read_classes(self) -> tuple[str, ...]:
        return self._words.classes

    def image_path(self, image_id: str) -> Path:
        return self._dataset.image_path(image_id)

    def mask_path(self, image_id: str) -> Path | None:
        return self._dataset.mask_path(image_id) if self._new_ids is not None else None

    def prepare_image(self, image: np.ndarray) -> np.ndarray:
        """Return the part of a stored picture that the data set is about."""
        return self._dataset.prepare_image(image)

    def image_size(self, image_id: str) -> tuple[int, int]:
        """Read the `(height, width)` of an image as `load` gives it."""
        return self._dataset.image_size(image_id)

    @property
    def class_colours(self) -> dict[str, str]:
        """Colours of one's own of those classes that the vocabulary has too, name -> `#rrggbb`."""
        return {name: colour for name, colour in self._dataset.class_colours.items() if name in self._words.names}

    @property
    def is_written(self) -> bool:
        """Whether reading the ids writes nothing."""
        return self._dataset.is_written

    @property
    def has_truth(self) -> bool:
        """True if the classes are the data set's and it has ground truth."""
        return self._new_ids is not None and self._dataset.has_truth

    @property
    def label_source(self) -> str:
        """Where image-level labels come from: that of the data set, or `none` where classes are others."""
        return self._dataset.label_source if self._new_ids is not None else "none"

    @property
    def label_file(self) -> LabelFile | None:
        """None: labels are those of the data set."""
        return None

    def labels_of(self, image_id: str) -> tuple[int, ...] | None:
        """Return the ascending ids of an image's labels in the vocabulary; `None` if they are unknown."""
        labels = None if self._new_ids is None else self._dataset.labels_of(image_id)
        return None if labels is None else tuple(sorted(int(i) for i in self._new_ids[list(labels)]))  # type: ignore[index]

    def semantic_of(self, image_id: str) -> np.ndarray | None:
        """Read the ground truth in the ids of the vocabulary: `[H, W]` uint8, 0..C and 255; `None` if it has none."""
        semantic = None if self._new_ids is None else self._dataset.semantic_of(image_id)
        return None if semantic is None or self._new_ids is None else self._new_ids[semantic]

    def instances_of(self, image_id: str) -> np.ndarray | None:
        """Read the ground-truth objects of an image, which have no classes."""
        return self._dataset.instances_of(image_id)

    @cached_property
    def _new_ids(self) -> np.ndarray | None:
        """`[256]` uint8, the vocabulary's id of each of the data set's; `None` if the classes are others."""
        if not self._dataset.has_classes:
            return None
        classes = self._dataset.classes
        if set(classes[1:]) != set(self._words.names):
            return None
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[0] = 0
        table[1 : len(classes)] = [1 + self._words.names.index(name) for name in classes[1:]]
        return table
