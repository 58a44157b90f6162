"""The contract of a pseudo-mask generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from torch import Tensor

from moduseg.structures import Proposals, Sample, ScoreMaps


class PseudoMaskGenerator(ABC):
    """Image + image-level labels -> class scores.

    `__init__` takes the settings, as one dataclass `options` or as plain typed arguments, and what the program supplies
    (`device`, `backbone`, `classes`, `build_part`); it loads no model.
    """

    needs_truth: bool = False
    """Whether `generate` reads `sample.semantic` (an oracle)."""
    needs_proposals: bool = False
    """Whether `generate` uses proposals; the caller supplies them."""
    is_fitted: bool = False
    """Whether `fit` has to run over the training set first."""
    fits_proposals: bool = False
    """Whether `fit` uses proposals as well."""

    @property
    def num_fit_passes(self) -> int:
        """How often `fit` goes over the training images, for its progress; 0 if nothing is fitted."""
        return int(self.is_fitted)

    @property
    def digest(self) -> str:
        """Digest of what decides the result besides the configuration: weights, or files."""
        return ""

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Learn from the training set, if `is_fitted`; the tensors are stored and handed to `load_state`.

        Args:
            samples: each call starts a new pass over the training images (with labels, without ground truth).
            num_classes: foreground classes, ids 1..num_classes.
            proposals: returns those of a sample, if `fits_proposals`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not fitted")

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned."""
        raise NotImplementedError(f"{type(self).__name__} is not fitted")

    @abstractmethod
    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None) -> ScoreMaps:
        """Return the scores of the classes in `labels` (ascending ids), background apart, at the size of the image."""
