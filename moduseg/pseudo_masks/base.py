"""The contract of a pseudo-mask generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from moduseg.errors import ArtefactError, DataError
from moduseg.structures import Proposals, Sample, ScoreMaps

_State = TypeVar("_State")


@dataclass(frozen=True)
class FitImages:
    """The training images of a fit, in passes and by index.

    A call starts a pass over them, which is all that most fits need.

    Attributes:
        ids: of the images, in order.
        load: reads one, with labels and without ground truth; called in several threads.
        iterate: starts a pass and shows its progress.
        folder: where a fit that takes long keeps its checkpoints.
    """

    ids: tuple[str, ...]
    load: Callable[[str], Sample]
    iterate: Callable[[], Iterator[Sample]]
    folder: Path

    def __call__(self) -> Iterator[Sample]:
        """Start a pass over the images."""
        return self.iterate()


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
    is_classifier: bool = False
    """Whether `classify` says which classes an image shows."""
    fits_together: bool = False
    """Whether the processes of torchrun call `fit` together and share its work; else rank 0 fits for all."""
    score_title: str = "class scores"
    """What the maps of `generate` show, for people."""

    @property
    def num_fit_passes(self) -> int:
        """How often `fit` goes over the training images, for its progress; 0 if nothing is fitted."""
        return int(self.is_fitted)

    @property
    def fit_seconds(self) -> float:
        """Seconds on the clock of the last `fit`, those of earlier processes that it went on from included; 0 if it
        begins anew each time.
        """
        return 0.0

    @property
    def digest(self) -> str:
        """Digest of what decides the result besides the configuration: weights, or files."""
        return ""

    @property
    def supervision(self) -> str | None:
        """What beyond tags and words a part of it was trained on, such as `pixel:<data set>`; `None` for nothing that
        has to be said beside every figure.
        """
        return None

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Learn from the training set, if `is_fitted`; the tensors are stored and handed to `load_state`.

        Args:
            samples: each call starts a new pass over the training images (with labels, without ground truth); from
                the pipeline it is `FitImages`.
            num_classes: foreground classes, ids 1..num_classes.
            proposals: returns those of a sample, if `fits_proposals`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not fitted")

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned."""
        raise NotImplementedError(f"{type(self).__name__} is not fitted")

    def count_learnt(self, state: dict[str, Tensor]) -> int:
        """Return how many numbers of what `fit` returned were learnt; all, unless a part of them was there before."""
        return sum(tensor.numel() for tensor in state.values())

    def describe_fit(self) -> dict[str, float]:
        """Return figures of what `load_state` took, by name, which are stored beside it; percent."""
        return {}

    def classify(self, sample: Sample) -> Tensor:
        """Return the probability of each foreground class, `[num_classes]`, if `is_classifier`."""
        raise NotImplementedError(f"{type(self).__name__} does not classify images")

    @abstractmethod
    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None) -> ScoreMaps:
        """Return the scores of the classes in `labels` (ascending ids), background apart, at the size of the image."""


def check_labels(where: str, labels: Sequence[int], num_classes: int) -> None:
    """Raise unless every label is a foreground class.

    Args:
        where: id of the image.
        labels: class ids.
        num_classes: foreground classes, ids 1..num_classes.

    Raises:
        DataError: a label that is no class.
    """
    if wrong := [label for label in labels if not 1 <= label <= num_classes]:
        raise DataError(f"{where}: got labels {wrong}, expected 1..{num_classes}; check the class list")


def get_tags(sample: Sample, num_classes: int) -> tuple[int, ...]:
    """Return the labels of a training image.

    Raises:
        DataError: it has none, or one that is no class.
    """
    if sample.labels is None:
        raise DataError(f"{sample.id}: no image-level labels; add them, or take the image out of the list")
    check_labels(sample.id, sample.labels, num_classes)
    return sample.labels


def check_fit_images(count: float) -> None:
    """Raise DataError if a fit has no image."""
    if not count:
        raise DataError("pseudo_masks.generator: no image to fit on; check the training list and its labels")


def get_fitted(state: _State | None, title: str) -> _State:
    """Return what `load_state` took.

    Args:
        state: `None` before the call.
        title: of the generator, for the message.

    Raises:
        ArtefactError: nothing was fitted.
    """
    if state is None:
        raise ArtefactError(f"{title}: not fitted; call fit and load_state first")
    return state
