"""The contract of a proposer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from moduseg.structures import Proposals, Sample


class Proposer(ABC):
    """Image -> class-agnostic masks. `__init__` takes plain, typed arguments, checks them, and loads no model."""

    needs_truth: bool = False
    """Whether `propose` reads `sample.semantic` / `sample.instances` (an oracle)."""

    @property
    def digest(self) -> str:
        """What besides the configuration decides the result: the digest of weights, or of the files read."""
        return ""

    @abstractmethod
    def propose(self, sample: Sample) -> Proposals:
        """Masks of one image, on the CPU, at the size of the image; `[0, H, W]` where nothing is found.

        Raises:
            DataError: the image cannot be processed (one line: what, and the remedy).
        """

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        """Masks of several images; models that batch override it."""
        return [self.propose(sample) for sample in samples]
