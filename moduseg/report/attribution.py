"""Attribute labels to what decided them: votes of neighbours, proposals of pixels, bank regions of errors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moduseg.structures import IGNORE_INDEX, Prediction

SHOWN_LABELS = 4
"""Number of labels whose votes are listed, the winner included."""


@dataclass(frozen=True)
class RetrievalResult:
    """What retrieval said of one image's proposals, `N` of them with `k` neighbours each, in little memory.

    Attributes:
        labels: `[N]` int64, 0 background.
        scores: `[N]` float32.
        kept: `[K]` int64, those left by suppression, in descending score.
        rows: `[N, k]` int32, rows of the stored bank, nearest first; -1 for a proposal that was not searched.
        row_labels: `[N, k]` int16, the labels they voted with; -1 likewise.
        similarities: `[N, k]` float32.
    """

    labels: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    rows: np.ndarray
    row_labels: np.ndarray
    similarities: np.ndarray

    @classmethod
    def of(cls, prediction: Prediction) -> RetrievalResult:
        """Return what a report keeps of a prediction: all neighbours, as all of them have voted, but no mask."""
        return cls(
            labels=prediction.labels.numpy(),
            scores=prediction.scores.numpy(),
            kept=prediction.kept.numpy(),
            rows=prediction.neighbours.numpy().astype(np.int32),
            row_labels=prediction.neighbour_labels.numpy().astype(np.int16),
            similarities=prediction.similarities.numpy(),
        )


def tally_votes(result: RetrievalResult, temperature: float | None) -> list[list[list[float]]]:
    """Return the labels with most votes for each proposal, as `[label, votes, share of the votes, mean similarity]`.

    Args:
        result: of an image.
        temperature: weighs the votes as in `moduseg.retrieval.vote`; `None` weighs all alike.

    Returns:
        At most `SHOWN_LABELS` entries a proposal: the winner first, then in descending share, ties by similarity.
    """
    tallies = []
    columns = (result.labels.tolist(), result.row_labels.tolist(), result.similarities.tolist())
    for winner, row_labels, similarities in zip(*columns, strict=True):
        votes = [(label, value) for label, value in zip(row_labels, similarities, strict=True) if label >= 0]
        highest = max((similarity for _, similarity in votes), default=0.0)
        # Label -> number of votes, sum of their weights, sum of their similarities.
        ballots: dict[int, list[float]] = {}
        for label, similarity in votes:
            weight = 1.0 if temperature is None else math.exp((similarity - highest) / temperature)
            ballot = ballots.setdefault(label, [0, 0.0, 0.0])
            ballot[0] += 1
            ballot[1] += weight
            ballot[2] += similarity
        total_weight = sum(weight for _, weight, _ in ballots.values())
        entries = [
            [label, count, round(weight / total_weight, 4), round(similarity / count, 4)]
            for label, (count, weight, similarity) in ballots.items()
        ]
        entries.sort(key=lambda entry: (entry[0] != winner, -entry[2], -entry[3]))
        tallies.append(entries[:SHOWN_LABELS])
    return tallies


def find_owners(
    masks: np.ndarray, labels: np.ndarray, kept: np.ndarray, label_map: np.ndarray | None = None
) -> np.ndarray:
    """Find the proposal that decided each pixel.

    Args:
        masks: `[N, h, w]` bool.
        labels: `[N]` labels of the proposals.
        kept: `[K]` proposals that were not suppressed, in descending score.
        label_map: `[h, w]` the prediction, needed if several proposals decide a pixel by majority.

    Returns:
        `[h, w]` int64: the proposal that painted the pixel, else the best background proposal that covers it, else -1.
        With `label_map`, pixels of another label belong to the best proposal of their label, if there is one.
    """
    owner = np.full(masks.shape[1:], -1, dtype=np.int64)
    order = kept.tolist()
    background = [index for index in order if labels[index] == 0]
    foreground = [index for index in order if labels[index] > 0]
    # The last to be written wins: background below foreground, low scores below high ones.
    for index in [*background[::-1], *foreground[::-1]]:
        owner[masks[index]] = index
    if label_map is not None and len(labels):
        differs = (owner >= 0) & (labels[owner] != label_map)
        for index in order[::-1] if differs.any() else ():
            owner[differs & masks[index] & (label_map == labels[index])] = index
    return owner


@dataclass
class AttributedPixels:
    """The pixels whose label a bank region voted for, each shared among all regions that did.

    Attributes:
        right, wrong: pixels whose label is correct, and not.
        truth: the wrong pixels by their true class.
        images: the wrong pixels by image, which is its index in the report.
    """

    right: float = 0.0
    wrong: float = 0.0
    truth: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    images: dict[int, float] = field(default_factory=lambda: defaultdict(float))


class ErrorAttribution:
    """Attributes the pixels of many images to the bank regions that voted for their labels."""

    def __init__(self) -> None:
        self.regions: dict[int, AttributedPixels] = {}

    def add(self, image: int, result: RetrievalResult, owner: np.ndarray, truth: np.ndarray, scale: float) -> None:
        """Share the pixels of one image among the neighbours whose label won there.

        Args:
            image: its index in the report.
            result: what retrieval said of its proposals.
            owner: `[h, w]` from `find_owners`.
            truth: `[h, w]` uint8, 255 where ignored.
            scale: pixels of the image for one pixel of these maps, which may be smaller.
        """
        is_counted = (owner >= 0) & (truth != IGNORE_INDEX)
        # One code for each pair of proposal and true class.
        codes = owner[is_counted] * 256 + truth[is_counted]
        pairs, counts = np.unique(codes, return_counts=True)
        for code, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            proposal, label = divmod(code, 256)
            voters = result.rows[proposal][result.row_labels[proposal] == result.labels[proposal]]
            for row in voters.tolist():
                share = count * scale / len(voters)
                region = self.regions.setdefault(row, AttributedPixels())
                if label == result.labels[proposal]:
                    region.right += share
                else:
                    region.wrong += share
                    region.truth[label] += share
                    region.images[image] += share

    def list_worst(self, count: int, num_images: int = 8) -> list[dict[str, Any]]:
        """Return the regions with most wrong pixels, worst first, equal ones in row order.

        Args:
            count: at most this many regions.
            num_images: at most this many images of each.

        Returns:
            JSON values: `row`, `right` and `wrong` pixels, `truth` (`[label, pixels]`, most first) and `images`
            (`[index, pixels]`, most first).
        """
        misleading = [(row, region) for row, region in self.regions.items() if region.wrong >= 0.5]
        misleading.sort(key=lambda item: (-item[1].wrong, item[0]))
        return [
            {
                "row": row,
                "right": round(region.right),
                "wrong": round(region.wrong),
                "truth": _list_largest(region.truth, 5),
                "images": _list_largest(region.images, num_images),
            }
            for row, region in misleading[:count]
        ]


def _list_largest(counts: dict[int, float], number: int) -> list[list[int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[key, round(value)] for key, value in ordered[:number]]
