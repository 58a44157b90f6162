"""The interface of a proposer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from moduseg.structures import Proposals, Sample

PromptBox = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; a point is a box without size."""


class Proposer(ABC):
    """Turns an image into class-agnostic masks.

    `__init__` takes plain, typed arguments, or one dataclass `options` and what the program supplies (a device); it
    loads no model.
    """

    needs_truth: bool = False
    """Whether `propose` reads `sample.semantic` / `sample.instances` (an oracle)."""

    sees_image_alone: bool = True
    """Whether masks depend on nothing but the image, the configuration and `digest`, so that they serve wherever the
    image occurs; an oracle and a folder of files look at the image's id."""

    @property
    def digest(self) -> str:
        """The digest of weights or files: what besides the configuration decides the result."""
        return ""

    @property
    def shares_passes(self) -> bool:
        """Whether images share a forward pass, so that the last bits of a result may depend on the others."""
        return type(self).propose_batch is not Proposer.propose_batch

    @abstractmethod
    def propose(self, sample: Sample) -> Proposals:
        """Return the masks of one image, on the CPU, at the size of the image; `[0, H, W]` if there are none.

        Raises:
            DataError: the image cannot be processed (one line: what, and the remedy).
        """

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        """Return the masks of several images; models that batch override this."""
        return [self.propose(sample) for sample in samples]

    def find_region(self, sample: Sample, box: PromptBox) -> np.ndarray | None:
        """Return the region that a person means who drew a box or a point, `[H, W]` bool.

        Args:
            sample: the image.
            box: inside it, its upper left corner first.

        Returns:
            `None` from a proposer that cannot be asked, and where nothing fits; `moduseg.proposers.drawn` knows more.
        """
        return None
