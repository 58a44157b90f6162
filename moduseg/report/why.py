"""Why a proposal has its label: votes, neighbours, and which bank regions lead and mislead most."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.structures import IGNORE_INDEX, Prediction

SHOWN_LABELS = 4
"""Labels whose votes are listed, the winner among them."""
SIMILARITY_STEPS = 10_000
"""Similarities are stored as whole numbers of this fraction of one."""


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
            prediction.labels.numpy(),
            prediction.scores.numpy(),
            prediction.kept.numpy(),
            prediction.neighbours.numpy().astype(np.int32),
            prediction.neighbour_labels.numpy().astype(np.int16),
            prediction.similarities.numpy(),
        )


def votes(result: RetrievalResult, temperature: float | None) -> list[list[list[float]]]:
    """Of each proposal the labels that got most votes: `[label, votes, share of the ballot, mean similarity]`.

    The winner comes first, then the others in descending share. With a temperature the ballots are weighed as in
    `moduseg.retrieval.vote`.
    """
    tallies = []
    columns = (result.labels.tolist(), result.row_labels.tolist(), result.similarities.tolist())
    for winner, row_labels, similarities in zip(*columns, strict=True):
        found = [(label, near) for label, near in zip(row_labels, similarities, strict=True) if label >= 0]
        nearest = max((near for _, near in found), default=0.0)
        ballots: dict[int, list[float]] = {}
        for label, near in found:
            weight = 1.0 if temperature is None else math.exp((near - nearest) / temperature)
            ballot = ballots.setdefault(label, [0, 0.0, 0.0])
            ballot[0] += 1
            ballot[1] += weight
            ballot[2] += near
        whole = sum(ballot[1] for ballot in ballots.values())
        entries = [
            [label, count, round(weight / whole, 4), round(near / count, 4)]
            for label, (count, weight, near) in ballots.items()
        ]
        entries.sort(key=lambda entry: (entry[0] != winner, -entry[2], -entry[3]))
        tallies.append(entries[:SHOWN_LABELS])
    return tallies


def owners(masks: np.ndarray, labels: np.ndarray, kept: np.ndarray, label_map: np.ndarray | None = None) -> np.ndarray:
    """Which proposal decided each pixel.

    Args:
        masks: `[N, h, w]` bool.
        labels: `[N]` the proposals' labels.
        kept: `[K]` those that were not suppressed, in descending score.
        label_map: `[h, w]` what came of them, where several proposals decide a pixel together.

    Returns:
        `[h, w]` int64: the proposal that painted the pixel; where none did, the one of the background that covers it;
        -1 where there is none. With `label_map`, the best of those that have its label, where there is one.
    """
    owner = np.full(masks.shape[1:], -1, dtype=np.int64)
    background = [i for i in kept.tolist() if labels[i] == 0]
    for index in [*background[::-1], *[i for i in kept.tolist() if labels[i] > 0][::-1]]:
        owner[masks[index]] = index
    if label_map is not None and len(labels):
        other = (owner >= 0) & (labels[owner] != label_map)
        for index in kept.tolist()[::-1] if other.any() else ():
            owner[other & masks[index] & (label_map == labels[index])] = index
    return owner


@dataclass
class Region:
    """What one bank entry did to the pixels that it voted for.

    Attributes:
        right, wrong: pixels labelled right and wrong with its label, shared among those that voted so.
        truth: of the wrong ones, pixels by their true class.
        images: of the wrong ones, pixels by image, as its position in the report.
    """

    right: float = 0.0
    wrong: float = 0.0
    truth: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    images: dict[int, float] = field(default_factory=lambda: defaultdict(float))


class ErrorAttribution:
    """Bank entries by the pixels that they labelled wrong."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}

    def add(self, image: int, result: RetrievalResult, owner: np.ndarray, truth: np.ndarray, scale: float) -> None:
        """Share the pixels of one image among the neighbours whose label won there.

        Args:
            image: its position in the report.
            result: what retrieval said.
            owner: `[h, w]` of `owners`.
            truth: `[h, w]` uint8 at the same size, 255 where ignored.
            scale: pixels of the image itself that one of the maps stands for.
        """
        counted = (owner >= 0) & (truth != IGNORE_INDEX)
        codes = owner[counted] * 256 + truth[counted]
        found, counts = np.unique(codes, return_counts=True)
        for code, count in zip(found.tolist(), counts.tolist(), strict=True):
            proposal, label = divmod(code, 256)
            voters = result.rows[proposal][result.row_labels[proposal] == result.labels[proposal]]
            for row in voters.tolist():
                share = count * scale / len(voters)
                region = self.regions.setdefault(row, Region())
                if label == result.labels[proposal]:
                    region.right += share
                else:
                    region.wrong += share
                    region.truth[label] += share
                    region.images[image] += share

    def worst(self, count: int, images: int = 8) -> list[dict[str, Any]]:
        """The entries that mislead most, worst first, JSON values: `row`, `right` and `wrong` pixels, `truth`
        (`[label, pixels]`, most first) and `images` (`[position, pixels]`, most first).
        """
        guilty = [(row, region) for row, region in self.regions.items() if region.wrong >= 0.5]
        guilty.sort(key=lambda item: (-item[1].wrong, item[0]))
        return [
            {
                "row": row,
                "right": round(region.right),
                "wrong": round(region.wrong),
                "truth": _most(region.truth, 5),
                "images": _most(region.images, images),
            }
            for row, region in guilty[:count]
        ]


def _most(counts: dict[int, float], number: int) -> list[list[int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[key, round(value)] for key, value in ordered[:number]]


def packed(array: np.ndarray, kind: str) -> str:
    """Numbers as base64 of their little-endian bytes, for a page to read without parsing.

    Args:
        array: whole numbers that `kind` can hold.
        kind: `u2` or `u4`.
    """
    return base64.b64encode(np.ascontiguousarray(array, dtype=f"<{kind}").tobytes()).decode("ascii")


def packed_neighbours(rows: np.ndarray, similarities: np.ndarray) -> dict[str, Any]:
    """Rows of the bank and their similarities, `[N, k]` each, packed; row -1 ("none") becomes the largest number."""
    none = (1 << 32) - 1
    near = np.clip(np.round((similarities.astype(np.float64) + 1) * SIMILARITY_STEPS), 0, 2 * SIMILARITY_STEPS)
    return {
        "k": int(rows.shape[1]),
        "rows": packed(np.where(rows < 0, none, rows.astype(np.int64)), "u4"),
        "similarities": packed(near, "u2"),
    }


def principal_plane(vectors: Tensor, most: int = 1500) -> np.ndarray:
    """The bank on its two principal axes, for a map to look at.

    Args:
        vectors: `[M, C]` float, as they are searched.
        most: vectors that the axes are found from, evenly chosen; all are placed.

    Returns:
        `[M, 2]` float64 in [0, 1], one scale for both axes; the axes' signs are fixed by their largest entry.
    """
    count, width = vectors.shape
    if count < 2:
        return np.full((count, 2), 0.5)
    chosen = torch.linspace(0, count - 1, min(count, most)).round().long()
    sample = vectors[chosen].double().cpu()
    mean = sample.mean(0)
    sample = sample - mean
    # The smaller of the two Gram matrices has the same axes, found far sooner.
    if len(sample) <= width:
        lengths, left = torch.linalg.eigh(sample @ sample.T)
        axes = (sample.T @ left[:, -2:]) / lengths[-2:].clamp(min=1e-12).sqrt()
    else:
        axes = torch.linalg.eigh(sample.T @ sample)[1][:, -2:]
    axes = axes.flip(1)
    if axes.shape[1] < 2:
        axes = torch.cat((axes, torch.zeros_like(axes)), 1)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return unit_square(((vectors.double().cpu() - mean) @ (axes * torch.where(signs == 0, 1, signs))).numpy())


def unit_square(points: np.ndarray) -> np.ndarray:
    """`[M, 2]` points moved and scaled into the unit square, the aspect kept."""
    low, high = points.min(0), points.max(0)
    reach = float((high - low).max())
    if not reach:
        return np.full(points.shape, 0.5)
    return (points - (low + high) / 2) / reach + 0.5
