"""The contract of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from moduseg.structures import TokenMap


class Backbone(ABC):
    """Image -> patch tokens; the model is loaded on first use.

    `__init__` takes the settings, as one dataclass `options` or as plain typed arguments, and what the program supplies
    (`device`, `build_part`).
    """

    @property
    @abstractmethod
    def digest(self) -> str:
        """Digest of the weights, known without loading the model."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Channels `C` of a token."""

    @abstractmethod
    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """Return the patch tokens of images, in float32 on the backbone's device.

        An image is padded with black at the bottom and right to a multiple of the patch, before the normalisation
        (docs/method.md, step 3); images of one padded size share a forward pass.

        Args:
            images: `[H, W, 3]` uint8 RGB each, of any sizes.

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
        """
