"""Class activation maps in closed form: needs image-level labels and a backbone, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.backbones.upsample import upsample
from moduseg.bank.aggregation import coverage
from moduseg.errors import ArtefactError, DataError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap

_EPSILON = 1e-6


class CamGenerator(PseudoMaskGenerator):
    """Ridge regression of the image-level labels on mean-pooled tokens, applied to every token.

    With `X` the images' pooled tokens and `Y` their multi-hot labels, both centred, the class weights are
    `w = (X'X / N + ridge * s * I)^-1 X'Y / N` and a token `t` scores `(t - mean) . w`: what a linear layer on
    average-pooled features converges to, hence a class activation map (Zhou et al., CVPR 2016), without a step of
    gradient descent. Each refinement round looks again, as multiple-instance learning does: in every image that has
    the class, the `top` fraction of tokens that score highest stands for it, and a linear discriminant against the
    tokens of all images, `(S + ridge * s * I)^-1 (mean of those tokens - mean of all tokens)`, replaces the weights.
    `s` is the mean of the matrix's non-zero eigenvalues.

    Args:
        backbone: called once, when tokens are first needed.
        classes: class names, background first.
        ridge: strength of the regularisation, above 0.
        rounds: refinement rounds; each is one more pass over the images.
        top: fraction of tokens, above 0 and up to 1.
        region_scores: a proposal's pixels get the mean score of its tokens (proposals needed; where they overlap, the
            smallest decides), so that one score stands for a region; pixels of no proposal keep their own.
        scale: how a class's map comes into [0, 1]: `max` cuts off what is negative and divides by the maximum;
            `minmax` stretches between the lowest and the highest score of the image.
        fit_batch: images handed to the backbone at a time while fitting.

    Raises:
        ValueError: a number out of range.
    """

    is_fitted = True

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
        ridge: float = 1.0,
        rounds: int = 0,
        top: float = 0.25,
        region_scores: bool = False,
        scale: Literal["max", "minmax"] = "max",
        fit_batch: int = 8,
    ) -> None:
        if not ridge > 0:
            raise ValueError(f"ridge: got {ridge}, expected a number above 0; try 1")
        if rounds < 0:
            raise ValueError(f"rounds: got {rounds}, expected 0 or more; try 0")
        if not 0 < top <= 1:
            raise ValueError(f"top: got {top}, expected above 0 and up to 1; try 0.25")
        if fit_batch < 1:
            raise ValueError(f"fit_batch: got {fit_batch}, expected 1 or more; try 8")
        self._make_backbone, self._num_classes = backbone, len(classes) - 1
        self._ridge, self._rounds, self._top = ridge, rounds, top
        self._region_scores, self._scale, self._fit_batch = region_scores, scale, fit_batch
        self.needs_proposals = region_scores
        self._backbone: Backbone | None = None
        self._state: dict[str, Tensor] | None = None

    @property
    def digest(self) -> str:
        """Digest of the backbone's weights; what `fit` learned has its own."""
        return self._model().digest

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """See `PseudoMaskGenerator.fit`. Memory is a few `C x C` matrices, however many images there are.

        Returns:
            `weights` `[num_classes, C]` and `mean` `[C]`, float32; the weights of a class that no image has are 0.

        Raises:
            DataError: no image, or one without image-level labels.
        """
        moments = _Moments()
        tokens_of_all = _Moments()
        for tokens, labels in self._pass(samples):
            target = _multi_hot(labels, num_classes, tokens)
            moments.add(tokens.mean(0, keepdim=True), target[None])
            if self._rounds:
                tokens_of_all.add(tokens, target.expand(len(tokens), -1), weight=1 / len(tokens))
        if not moments.count:
            raise DataError("pseudo_masks.generator: no image to fit on; check the training list and its labels")
        weights, mean = moments.regress(self._ridge), moments.mean
        for _ in range(self._rounds):
            best = torch.zeros_like(weights)
            images = torch.zeros(num_classes, dtype=weights.dtype, device=weights.device)
            for tokens, labels in self._pass(samples):
                if not labels:
                    continue
                rows = torch.tensor(labels, device=tokens.device) - 1
                scores = (tokens - mean.to(tokens)) @ weights[rows].to(tokens).T
                chosen = scores.topk(max(1, round(self._top * len(tokens))), dim=0).indices
                best[rows] += tokens[chosen].mean(0).to(best)
                images[rows] += 1
            mean = tokens_of_all.mean
            weights = tokens_of_all.solve((best / images.clamp(min=1)[:, None] - mean).T, self._ridge).T
            weights = weights * (images > 0)[:, None]
        return {"weights": weights.float().contiguous(), "mean": mean.float().contiguous()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned.

        Raises:
            ArtefactError: it is of another class list or incomplete.
        """
        weights, mean = state.get("weights"), state.get("mean")
        if (
            weights is None
            or mean is None
            or weights.ndim != 2
            or len(weights) != self._num_classes
            or mean.shape != weights.shape[1:]
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise ArtefactError(
                f"class activation maps: got {shapes}, expected weights ({self._num_classes}, C) and mean (C,); "
                "remove the fit's folder and run again"
            )
        self._state = {"weights": weights, "mean": mean}

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Activation of the classes in `labels`, each scaled to [0, 1] by itself; no background.

        Raises:
            DataError: a label that is no class, or no proposals where `region_scores` wants them.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        token_map, activation = self.activation(sample, labels)
        scores = upsample(activation, token_map)
        if self._region_scores:
            if proposals is None:
                raise DataError(f"{sample.id}: no proposals, which region_scores=true needs; run the proposals first")
            found = proposals.to(activation.device)
            weights = coverage(found.masks, token_map).flatten(1)
            means = weights @ activation.flatten(1).T / weights.sum(1, keepdim=True).clamp(min=_EPSILON)
            scores = painted(scores, means.T, found)
        return ScoreMaps(tuple(labels), scaled(scores, self._scale))

    def activation(self, sample: Sample, labels: tuple[int, ...]) -> tuple[TokenMap, Tensor]:
        """The image's tokens and what each scores for the classes in `labels`, `[R, h, w]` float32 of any sign.

        Raises:
            DataError: a label that is no class.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        if self._state is None:
            raise ArtefactError("class activation maps: not fitted; call fit and load_state first")
        if wrong := [label for label in labels if not 1 <= label <= self._num_classes]:
            raise DataError(f"{sample.id}: got labels {wrong}, expected 1..{self._num_classes}; check the class list")
        token_map = self._model().tokens([sample.image])[0]
        tokens = token_map.tokens
        weights, mean = self._state["weights"].to(tokens), self._state["mean"].to(tokens)
        if weights.shape[1] != tokens.shape[2]:
            raise ArtefactError(
                f"class activation maps: fitted on {weights.shape[1]} channels, but the backbone gives "
                f"{tokens.shape[2]}; remove the fit's folder and run again"
            )
        self._state = {"weights": weights, "mean": mean}
        rows = torch.tensor(labels, dtype=torch.long, device=tokens.device) - 1
        return token_map, torch.einsum("hwc,rc->rhw", tokens - mean, weights[rows])

    def tokens_of(self, samples: Callable[[], Iterable[Sample]]) -> Iterator[tuple[Sample, TokenMap]]:
        """Every image with its tokens, in order.

        Raises:
            DataError: an image without image-level labels.
        """
        batch: list[Sample] = []
        for sample in samples():
            if sample.labels is None:
                raise DataError(f"{sample.id}: no image-level labels; add them, or take the image out of the list")
            batch.append(sample)
            if len(batch) == self._fit_batch:
                yield from zip(batch, self._model().tokens([item.image for item in batch]), strict=True)
                batch = []
        if batch:
            yield from zip(batch, self._model().tokens([item.image for item in batch]), strict=True)

    def _model(self) -> Backbone:
        if self._backbone is None:
            self._backbone = self._make_backbone()
        return self._backbone

    def _pass(self, samples: Callable[[], Iterable[Sample]]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """`[n, C]` tokens and labels of every image, in order."""
        for sample, token_map in self.tokens_of(samples):
            yield token_map.tokens.flatten(0, 1), sample.labels or ()


class _Moments:
    """Running sums of rows `x` `[n, C]` with targets `y` `[n, K]`, in float64 where the device has it."""

    def __init__(self) -> None:
        self.count = 0.0
        self._rank = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        # Products of the rows of one image are exact enough in float32; the running sums are not.
        new = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}
        for name, value in new.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value, dtype=dtype)
            self._sums[name].add_(value, alpha=weight)
        self.count += weight * len(x)
        self._rank += len(x)

    @property
    def mean(self) -> Tensor:
        """`[C]`."""
        return self._sums["x"] / self.count

    def solve(self, right: Tensor, ridge: float) -> Tensor:
        """`(covariance + ridge * s * I)^-1 right`, `s` the mean of the eigenvalues that can be above 0."""
        covariance = self._sums["xx"] / self.count - torch.outer(self.mean, self.mean)
        size = len(covariance)
        mean_eigenvalue = covariance.trace() / max(1, min(size, self._rank - 1))
        # The floor keeps the system solvable where all rows are equal.
        damping = (ridge * mean_eigenvalue).clamp(min=1e-12)
        return torch.linalg.solve(covariance + damping * torch.eye(size).to(covariance), right)

    def regress(self, ridge: float) -> Tensor:
        """`[K, C]` ridge regression of the targets."""
        cross = self._sums["xy"] / self.count - torch.outer(self.mean, self._sums["y"] / self.count)
        return self.solve(cross, ridge).T


def _multi_hot(labels: tuple[int, ...], num_classes: int, like: Tensor) -> Tensor:
    target = torch.zeros(num_classes, dtype=like.dtype, device=like.device)
    if labels:
        if not 1 <= min(labels) <= max(labels) <= num_classes:
            raise DataError(f"image-level labels: got {labels}, expected 1..{num_classes}; check the class list")
        target[torch.tensor(labels, device=like.device) - 1] = 1
    return target


def painted(scores: Tensor, values: Tensor, proposals: Proposals) -> Tensor:
    """`scores` `[R, H, W]` with the pixels of each proposal set to its `values` `[R, N]`; the smallest decides."""
    result = scores.clone()
    for index in proposals.areas.argsort(descending=True, stable=True):
        result = torch.where(proposals.masks[index], values[:, index, None, None], result)
    return result


def scaled(scores: Tensor, scale: str = "max") -> Tensor:
    """Each row of `[R, ...]` into [0, 1]; one that is flat (`minmax`) or nowhere positive (`max`) becomes 0."""
    if not scores.numel():
        return scores
    rest = tuple(range(1, scores.ndim))
    low = scores.amin(rest, keepdim=True) if scale == "minmax" else 0.0
    scores = (scores - low).clamp(min=0)
    return (scores / scores.amax(rest, keepdim=True).clamp(min=_EPSILON)).clamp(max=1)
