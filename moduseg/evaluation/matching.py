"""Scores of segments without names: which segment stands for which class is found by a matching to the truth.

Two protocols are in use, whose figures must not be compared. `image` matches anew in every image (DiffSeg, Tian et al.,
2024); `set` matches the clusters of a whole set once (PiCIE, Cho et al., 2021; STEGO, Hamilton et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moduseg.errors import DataError
from moduseg.structures import IGNORE_INDEX

MatchingProtocol = Literal["image", "set"]
UNMATCHED = -1


@dataclass(frozen=True)
class MatchedScores:
    """What a matching gives for a set of images.

    Attributes:
        protocol: the one that the figures follow.
        num_images: images that were counted.
        miou: mean IoU in percent, over the classes that the truth or a matched segment has; NaN if there is none.
        pixel_accuracy: correct pixels over all that are not ignored, in percent; NaN if there is none.
        iou: `[C]` float64 in percent, NaN for a class in neither.
    """

    protocol: MatchingProtocol
    num_images: int
    miou: float
    pixel_accuracy: float
    iou: np.ndarray

    def to_json(self) -> dict[str, object]:
        """Return the figures under keys that name the protocol, as JSON values; NaN is `null`."""
        figures = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy}
        named = {f"{name}_matched_by_{self.protocol}": _to_value(value) for name, value in figures.items()}
        return {"matching": self.protocol, "images": self.num_images, **named, "iou": [_to_value(v) for v in self.iou]}


class SegmentMatcher:
    """Counts the pixels of segments and classes, image by image, and matches them so that most pixels are correct.

    It holds counts of classes and clusters only, so that memory does not grow with the images. Segments beyond the
    number of classes, and those that share no pixel with what is left for them, stay unmatched: their pixels are misses
    of their true classes and count for no predicted one.

    Args:
        num_classes: classes of the truth, with ids 0..num_classes-1, 1..255.
        protocol: `image` matches every image's own segments; `set` matches clusters of the whole set once.
        num_clusters: ids of clusters of `set`, 0..num_clusters-1; as many as classes if omitted.

    Raises:
        ValueError: an unknown protocol, a number out of range, or `num_clusters` for `image`.
    """

    def __init__(self, num_classes: int, protocol: MatchingProtocol, num_clusters: int | None = None) -> None:
        if protocol not in get_args(MatchingProtocol):
            raise ValueError(f"protocol: got {protocol!r}, expected one of {', '.join(get_args(MatchingProtocol))}")
        if not 1 <= num_classes <= IGNORE_INDEX:
            raise ValueError(f"num_classes: got {num_classes}, expected 1..{IGNORE_INDEX}")
        if protocol == "image" and num_clusters is not None:
            raise ValueError(f"num_clusters: got {num_clusters}, expected none for 'image'; it takes any segments")
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"num_clusters: got {num_clusters}, expected 1 or more")
        self._num_classes, self._protocol = num_classes, protocol
        self._num_images = 0
        # Of `set`: pixels of each cluster and class. Of `image`: correct, true and predicted pixels of each class.
        self._clusters = np.zeros((num_clusters or num_classes, num_classes), dtype=np.int64)
        self._totals = np.zeros((3, num_classes), dtype=np.int64)

    def update(self, truth: np.ndarray, segments: np.ndarray, name: str = "") -> None:
        """Add one image.

        Args:
            truth: `[H, W]` integers in 0..num_classes-1, or 255 where ignored.
            segments: `[H, W]` integers that name segments: of `image` any, of `set` 0..num_clusters-1.
            name: the image, for messages.

        Raises:
            DataError: sizes differ, or an id is out of range.
        """
        if truth.shape != segments.shape:
            raise DataError(
                f"image {name!r}: segments are {segments.shape}, expected the truth's {truth.shape}; resize them with "
                "nearest neighbour"
            )
        is_counted = truth != IGNORE_INDEX
        true, found = truth[is_counted].astype(np.int64), segments[is_counted].astype(np.int64)
        _check_range(true, self._num_classes, name, "truth")
        if self._protocol == "set":
            _check_range(found, len(self._clusters), name, "cluster")
            self._clusters += _count(found, true, self._clusters.shape)
        else:
            ids, found = np.unique(found, return_inverse=True)
            counts = _count(found.ravel(), true, (len(ids), self._num_classes))
            self._totals += _total(counts, match_segments(counts))
        self._num_images += 1

    def match(self) -> np.ndarray:
        """Return the class of each cluster of `set` by the images so far, `[K]` int64; see `match_segments`.

        Raises:
            ValueError: the protocol is `image`, which has no clusters.
        """
        if self._protocol != "set":
            raise ValueError(f"protocol: got {self._protocol!r}, expected 'set', which alone has clusters")
        return match_segments(self._clusters)

    def compute(self) -> MatchedScores:
        """Return the figures of the images so far."""
        totals = self._totals
        if self._protocol == "set":
            totals = _total(self._clusters, self.match())
        correct, true, predicted = totals.astype(np.float64)
        union = true + predicted - correct
        iou = np.full(self._num_classes, np.nan)
        np.divide(100 * correct, union, out=iou, where=union > 0)
        is_present = union > 0
        return MatchedScores(
            protocol=self._protocol,
            num_images=self._num_images,
            miou=float(iou[is_present].mean()) if is_present.any() else float("nan"),
            pixel_accuracy=float(100 * correct.sum() / true.sum()) if true.any() else float("nan"),
            iou=iou,
        )


def match_segments(counts: np.ndarray) -> np.ndarray:
    """Return the class of each segment, no class twice, so that most pixels are correct (the Hungarian method).

    Args:
        counts: `[S, C]` int64, pixels of each segment and class.

    Returns:
        `[S]` int64 in 0..C-1; `UNMATCHED` for a segment beyond the classes, or one that shares no pixel with its class.
    """
    # Imported here: few runs match segments, and every run imports this module.
    from scipy.optimize import linear_sum_assignment

    classes = np.full(len(counts), UNMATCHED, dtype=np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    # A class that shares no pixel with a segment is chance: all its pixels would be wrong in an arbitrary class.
    shares = counts[rows, columns] > 0
    classes[rows[shares]] = columns[shares]
    return classes


def count_pixels(segments: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the pixels `[S, C]` int64 of each segment and class of one image, ignored ones left out.

    Args:
        segments: `[H, W]` integers 0..S-1.
        truth: `[H, W]` integers in 0..num_classes-1, or 255 where ignored.
        num_classes: `C`.
    """
    is_counted = truth != IGNORE_INDEX
    shape = (int(segments.max()) + 1, num_classes)
    return _count(segments[is_counted].astype(np.int64), truth[is_counted].astype(np.int64), shape)


def _count(segments: np.ndarray, true: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels `[S, C]` int64 of each segment and class, from their ids `[P]`."""
    return np.bincount(segments * shape[1] + true, minlength=shape[0] * shape[1]).reshape(shape)


def _total(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return `[3, C]` int64: correct, true and predicted pixels of each class, from counts `[S, C]` and a matching."""
    totals = np.zeros((3, counts.shape[1]), dtype=np.int64)
    totals[1] = counts.sum(0)
    rows = np.flatnonzero(classes != UNMATCHED)
    totals[0, classes[rows]] = counts[rows, classes[rows]]
    totals[2, classes[rows]] = counts[rows].sum(1)
    return totals


def _check_range(ids: np.ndarray, num_ids: int, name: str, what: str) -> None:
    """Raise a `DataError` unless all ids are in 0..num_ids-1."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < num_ids:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise DataError(
            f"image {name!r}: {what} has id {wrong}, expected 0..{num_ids - 1}; map the ids, or check their number"
        )


def _to_value(value: float) -> float | None:
    """Return a number as JSON has it."""
    return None if np.isnan(value) else float(value)
