"""What proposals consist of, learnt on the training images: the worth of masks for `retrieval.selection=learnt`.

A ranking says how much of a proposal belongs to each class, from its vector and the shape of its mask. It is a softmax
regression, fitted on the proposals of the training images; the shares that it learns are measured on label maps that
retrieval made of these images, restricted to their tags (`moduseg.stages.fit_ranking`), so that no ground truth and no
further model is needed. An option, not in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moduseg.errors import ArtefactError
from moduseg.files import write_atomic
from moduseg.masks.shapes import SHAPES, describe_shapes
from moduseg.retrieval.balance import Candidates, ClassIndex, rank_in_class, widest_float
from moduseg.retrieval.selection import NEAREST

RANKING_FILE = "ranking.safetensors"
"""The ranking in a bank's folder, where `predict` and `Segmenter` look for it."""
PENALTY = 2e-3
"""Weight of the squared weights in the fit."""
SHAPE_SCALE = 0.5
"""Standardised columns of shape are multiplied by this: a vector has length 1 in all."""
_MAX_DEVIATION = 3.0
"""Standardised columns of shape are clipped here."""
BACKGROUND_OFFSET = 1.25
"""How much the background's logit is lowered: the label maps that are learnt from miss objects, and a missed object
costs more than a painted piece of background."""
_MAX_STEPS = 40
_DESCRIPTION = "moduseg"
_DECIMALS = 9
"""Logits are rounded: the last bits of a product of matrices depend on how many rows it has."""


@dataclass(frozen=True)
class Examples:
    """Proposals of training images to learn from.

    Attributes:
        queries: `[N, C]` float, their vectors, centred as the bank is and of length 1.
        shapes: `[N, len(SHAPES)]` float.
        shares: `[N, S]` float in [0, 1], the share of each label in their pixels; rows add up to 1.
    """

    queries: np.ndarray
    shapes: np.ndarray
    shares: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Ranking:
    """A fitted ranking.

    Attributes:
        weights: `[C + len(SHAPES) + 1, S]` float64, the bias last.
        mean, scale: `[len(SHAPES)]` float64, of the shapes that it was fitted to.
        classes: `S` class names, background first.
        is_centred: whether queries have the bank's mean subtracted.
    """

    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    classes: tuple[str, ...]
    is_centred: bool

    def __post_init__(self) -> None:
        num_shapes = len(SHAPES)
        shapes = {"weights": self.weights.shape, "mean": self.mean.shape, "scale": self.scale.shape}
        is_fitting = self.weights.ndim == 2 and self.weights.shape[0] > num_shapes + 1
        if not is_fitting or self.mean.shape != (num_shapes,) or self.scale.shape != (num_shapes,):
            raise ArtefactError(f"ranking: got {shapes}, expected {num_shapes} columns of shape; fit it again")
        if self.weights.shape[1] != len(self.classes) or not np.isfinite(self.weights).all():
            raise ArtefactError(
                f"ranking: got weights of {self.weights.shape[1]} labels for {len(self.classes)} classes, or some that "
                "are not finite, expected one column a class; fit it again"
            )

    def check_fits(self, dim: int, *, is_centred: bool) -> None:
        """Check that it was fitted to vectors like those of a bank.

        Args:
            dim: channels of the bank's vectors.
            is_centred: whether the bank's mean is subtracted (`bank.centre`).

        Raises:
            ArtefactError: it was fitted to others.
        """
        fitted = self.weights.shape[0] - len(SHAPES) - 1
        if (fitted, self.is_centred) != (dim, is_centred):
            raise ArtefactError(
                f"ranking: fitted to vectors of {fitted} channels with bank.centre={str(self.is_centred).lower()}, got "
                f"{dim} with bank.centre={str(is_centred).lower()}; run scripts/infer.py retrieval.selection=learnt "
                "with these settings, or set retrieval.selection=margin"
            )

    def align(self, classes: Sequence[str]) -> Ranking:
        """Return the ranking with the ids of another class list, matched by name.

        Raises:
            ArtefactError: the list has a class that it was not fitted to.
        """
        if tuple(classes) == self.classes:
            return self
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise ArtefactError(
                f"ranking: not fitted to the class {unknown[0]!r} ({len(unknown)} such), expected only "
                f"{', '.join(self.classes[1:5])}, ...; build a bank with this class and retrieval.selection=learnt, or "
                "set retrieval.selection=margin"
            )
        columns = [self.classes.index(name) for name in classes]
        return Ranking(self.weights[:, columns], self.mean, self.scale, tuple(classes), self.is_centred)

    def estimate_shares(self, queries: np.ndarray, shapes: np.ndarray, is_possible: np.ndarray) -> np.ndarray:
        """Return how much of each proposal belongs to each label, `[N, S]` float64; rows add up to 1.

        Args:
            queries: `[N, C]` float of any length, centred as the bank is.
            shapes: `[N, len(SHAPES)]`, of `describe_shapes`.
            is_possible: `[S]` bool, labels that can be given; the others get 0.
        """
        logits = np.round(_join(queries, shapes, self.mean, self.scale) @ self.weights, _DECIMALS)
        logits[:, 0] -= BACKGROUND_OFFSET
        return _softmax(np.where(is_possible, logits, -np.inf))

    def save(self, path: Path) -> None:
        """Write the file; equal rankings give equal bytes."""
        tensors = {"weights": self.weights, "mean": self.mean, "scale": self.scale}
        # One entry: the order of several would be another one at each run.
        metadata = {_DESCRIPTION: json.dumps({"classes": self.classes, "is_centred": self.is_centred})}
        data = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
        write_atomic(path, save(data, metadata))

    @staticmethod
    def load(path: Path) -> Ranking:
        """Read what `save` wrote.

        Raises:
            ArtefactError: it is damaged, or of another version.
        """
        try:
            with safe_open(path, "pt") as file:
                description = json.loads(file.metadata()[_DESCRIPTION])
                arrays = [file.get_tensor(name).double().numpy() for name in ("weights", "mean", "scale")]
            classes, is_centred = tuple(description["classes"]), bool(description["is_centred"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{path}: not readable as a ranking ({error}); remove it and run scripts/infer.py "
                "retrieval.selection=learnt again"
            ) from error
        weights, mean, scale = arrays
        return Ranking(weights, mean, scale, classes, is_centred)


def find_ranking(folder: Path | None) -> Ranking:
    """Return the ranking in a bank's folder.

    Args:
        folder: of the bank; `None` for a bank in memory.

    Raises:
        ArtefactError: there is none.
    """
    if folder is None or not (folder / RANKING_FILE).is_file():
        raise ArtefactError(
            f"retrieval.selection: got learnt, and {'a bank in memory' if folder is None else folder} has no "
            f"{RANKING_FILE}, expected one; run scripts/infer.py retrieval.selection=learnt, which fits it and writes "
            "it there, or set retrieval.selection=margin"
        )
    return Ranking.load(folder / RANKING_FILE)


def fit_ranking(examples: Examples, classes: Sequence[str], *, is_centred: bool) -> Ranking:
    """Fit a ranking: softmax regression on shares, its squared weights held small.

    The loss is convex and the search for its minimum starts from zeros, so that nothing is drawn at random.

    Args:
        examples: to learn from, one or more.
        classes: `S` names, background first.
        is_centred: whether the queries have the bank's mean subtracted.

    Raises:
        ArtefactError: no example.
    """
    from scipy.optimize import minimize

    if not len(examples):
        raise ArtefactError(
            "ranking: got no proposal of a training image to learn from, expected some; lower retrieval.min_area, or "
            "set retrieval.selection=margin"
        )
    mean, scale = examples.shapes.mean(0), examples.shapes.std(0) + 1e-6
    inputs, targets = _join(examples.queries, examples.shapes, mean, scale), examples.shares.astype(np.float64)
    shape = (inputs.shape[1], targets.shape[1])

    def measure_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = inputs @ weights
        largest = logits.max(1, keepdims=True)
        exponentials = np.exp(logits - largest)
        totals = exponentials.sum(1, keepdims=True)
        loss = -(targets * (logits - largest - np.log(totals))).sum() / len(inputs)
        gradient = inputs.T @ (exponentials / totals - targets) / len(inputs)
        # The bias, which says how frequent a label is, is free.
        loss += PENALTY * float((weights[:-1] ** 2).sum())
        gradient[:-1] += 2 * PENALTY * weights[:-1]
        return float(loss), gradient.ravel()

    options = {"maxiter": _MAX_STEPS}
    result = minimize(measure_loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    return Ranking(result.x.reshape(shape), mean, scale, tuple(classes), is_centred)


def rank_masks(
    ranking: Ranking, queries: Tensor, masks: np.ndarray, classes: ClassIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a ranking makes of proposals: `labels [N]` int64, `shares [N]` and `certainty [N]` float64.

    The certainty is the gain of `label_shares` times `measure_closeness`.

    Args:
        ranking: with the classes of the bank.
        queries: `[N, C]` float on any device, centred as the bank is; each with a vector.
        masks: `[N, H, W]` bool.
        classes: the vectors that are searched, by class: labels without one are not given.
    """
    device = queries.device
    candidates = classes.nearest(queries, NEAREST)
    is_possible = find_possible(candidates.labels, len(ranking.classes))
    shares = ranking.estimate_shares(queries.cpu().numpy(), describe_shapes(masks), is_possible)
    labels, best, gain = (torch.from_numpy(array) for array in label_shares(shares))
    labels, dtype = labels.to(device), widest_float(device)
    certainty = gain.to(device, dtype) * measure_closeness(candidates, labels)
    return labels, best.to(device, dtype), certainty


def measure_closeness(candidates: Candidates, labels: Tensor) -> Tensor:
    """Return `[N]` float64 in [0, 1]: the square of each query's mean similarity to the `NEAREST` vectors of its label.

    A mask that covers two things resembles neither; the square tells it from a good mask.

    Args:
        candidates: of the queries, at least `NEAREST` of each class.
        labels: `[N]` int64.
    """
    dtype = widest_float(candidates.similarities.device)
    is_label = candidates.labels == labels[:, None]
    is_label &= rank_in_class(torch.ones_like(is_label), candidates.labels) < NEAREST
    sums = (candidates.similarities.to(dtype) * is_label).sum(1)
    return (sums / is_label.sum(1).clamp(min=1)).clamp(0, 1) ** 2


def find_possible(bank_labels: Tensor, num_labels: int) -> np.ndarray:
    """Return which labels a bank has a vector of, `[S]` bool; all, if it has none."""
    is_possible = torch.bincount(bank_labels.cpu(), minlength=num_labels).numpy() > 0
    return is_possible if is_possible.any() else np.ones(num_labels, dtype=bool)


def label_shares(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the label of each proposal, its share, and what a pixel of it is worth.

    A pixel of foreground is worth what is gained by painting it: its label's share less the background's, since to
    paint nothing is to call it background. A pixel of background is worth its share less that of all foreground.

    Args:
        shares: `[N, S]` float64.

    Returns:
        `labels [N]` int64 (the smaller one of equals), `best [N]` and `gain [N]` float64 in [0, 1].
    """
    labels = shares.argmax(1)
    best, background = shares.max(1, initial=0), shares[:, 0]
    gain = np.where(labels > 0, best - background, 2 * background - 1)
    return labels, best, gain.clip(0, 1)


def _join(queries: np.ndarray, shapes: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the inputs of the regression, `[N, C + len(SHAPES) + 1]` float64."""
    vectors = queries.astype(np.float64)
    vectors /= np.maximum(np.sqrt((vectors**2).sum(1, keepdims=True)), 1e-12)
    standardised = np.clip((shapes - mean) / scale, -_MAX_DEVIATION, _MAX_DEVIATION)
    return np.concatenate([vectors, SHAPE_SCALE * standardised, np.ones((len(vectors), 1))], axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True, initial=-1e300))
    shares: np.ndarray = exponentials / exponentials.sum(1, keepdims=True)
    return shares
