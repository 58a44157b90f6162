"""The contract of a discoverer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from moduseg.structures import Sample, TokenMap

MAX_SEGMENTS = 255
"""Segments of an image at most: a PNG of 8 bits holds their ids, 255 being no segment."""


class Discoverer(ABC):
    """Image -> segments that have no names.

    `__init__` takes the settings, as one dataclass `options` or as plain typed arguments, and what the program supplies
    (`device`); it loads no model.
    """

    @property
    def digest(self) -> str:
        """Digest of what decides the segments besides the configuration and the backbone: weights of its own."""
        return ""

    @abstractmethod
    def find_segments(self, sample: Sample, tokens: TokenMap) -> Tensor:
        """Return the segment of every pixel.

        Args:
            sample: an image; no label of it is read.
            tokens: the backbone's tokens of the image.

        Returns:
            `[H, W]` int64 on the device of its model, ids of at most `MAX_SEGMENTS` segments in any order, 0 or more;
            ids may be missing.

        Raises:
            ConfigError: a setting that the model does not have.
            MissingError, ArtefactError: the weights are not there, or damaged.
        """
