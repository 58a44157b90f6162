"""The contract of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from moduseg.structures import TokenMap


class Backbone(ABC):
    """Image -> patch tokens. `__init__` takes plain, typed arguments, checks them, and loads the model on first use."""

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
        """Patch tokens of images of any sizes, `[H, W, 3]` uint8 RGB each, on the backbone's device, in float32.

        An image is padded with black at the bottom and right to a multiple of the patch, before the normalisation
        (METHOD, stage 1, step 3); images of one padded size share a forward pass.
        """
