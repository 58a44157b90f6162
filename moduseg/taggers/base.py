"""The contract of a tagger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moduseg.structures import Sample, Tags


class Tagger(ABC):
    """Image -> the classes that it shows.

    `__init__` takes the settings, as one dataclass `options` or as plain typed arguments, and what the program supplies
    (`device`, `classes`); it loads no model.
    """

    needs_labels: ClassVar[bool] = False
    """Whether `tag` reads `sample.labels`."""
    runs_model: ClassVar[bool] = False
    """Whether tags cost a model's pass, so that they are stored before they are used."""
    takes_words: ClassVar[bool] = False
    """Whether it compares words, so that a vocabulary sets `class_words` and `background_words`."""

    @property
    def digest(self) -> str:
        """Digest of what decides the tags besides the configuration: weights, or files."""
        return ""

    @abstractmethod
    def tag(self, sample: Sample) -> Tags:
        """Return the classes of an image.

        Raises:
            DataError: nothing says what the image shows.
        """
