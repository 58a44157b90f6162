"""How good image-level tags are: precision and recall of those that were named, average precision of their ranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TagQuality:
    """Quality of the tags of a split, percent.

    Attributes:
        num_images: images that were compared.
        precision: share of the tags that are right, over all images; 0 if there are none.
        recall: share of the classes in the images that were named; 0 if there are none.
        mean_average_precision: mean over the classes that occur of the average precision of their scores; `None` if
            nothing was ranked.
    """

    num_images: int
    precision: float
    recall: float
    mean_average_precision: float | None

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**vars(self), "f1": self.f1}

    def describe(self) -> str:
        """Return one line for a person."""
        text = f"precision {self.precision:.1f}, recall {self.recall:.1f}, F1 {self.f1:.1f}"
        ranking = self.mean_average_precision
        return f"{text}{'' if ranking is None else f', mAP {ranking:.1f}'} over {self.num_images} images"


def score_tags(true: Tensor, predicted: Tensor, scores: Tensor | None = None) -> TagQuality:
    """Compare tags with true ones.

    Args:
        true: `[N, C]` bool, classes in each image.
        predicted: `[N, C]` bool, classes named.
        scores: `[N, C]` float, ranking of the classes of each image.

    Raises:
        ValueError: shapes that differ.
    """
    if true.shape != predicted.shape or (scores is not None and scores.shape != true.shape):
        raise ValueError(f"tags: got {tuple(predicted.shape)} for {tuple(true.shape)}, expected one shape")
    num_right = int((true & predicted).sum())
    precision, recall = (100 * num_right / max(1, int(marks.sum())) for marks in (predicted, true))
    mean_ap = None
    occurring = true.any(0)
    if scores is not None and occurring.any():
        # Imported here: it takes 140 MB and seconds, and few runs have scores of tags.
        from sklearn.metrics import average_precision_score

        mean_ap = 100 * float(average_precision_score(true[:, occurring].numpy(), scores[:, occurring].numpy()))
    return TagQuality(len(true), precision, recall, mean_ap)
