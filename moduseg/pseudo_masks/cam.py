"""Class activation maps in closed form: needs image-level labels and a backbone, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from moduseg.allocator import trim_memory
from moduseg.backbones.base import Backbone
from moduseg.backbones.upsample import upsample
from moduseg.bank.aggregation import coverage
from moduseg.errors import ArtefactError, DataError
from moduseg.masks.id_maps import find_first
from moduseg.pseudo_masks.base import PseudoMaskGenerator, check_fit_images, check_labels, get_fitted, get_tags
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """How class activation is learned from image-level labels.

    Attributes:
        ridge: strength of the regularisation, above 0.
        rounds: refinement rounds; each is one more pass over the images.
        top: fraction of tokens that stands for a class in a round, above 0 and up to 1.
        fit_batch: images handed to the backbone at a time while fitting.

    Raises:
        ValueError: a number out of range.
    """

    ridge: float = 1.0
    rounds: int = 0
    top: float = 0.25
    fit_batch: int = 8

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ridge: got {self.ridge}, expected a number above 0; try 1")
        if self.rounds < 0:
            raise ValueError(f"rounds: got {self.rounds}, expected 0 or more; try 0")
        if not 0 < self.top <= 1:
            raise ValueError(f"top: got {self.top}, expected above 0 and up to 1; try 0.25")
        if self.fit_batch < 1:
            raise ValueError(f"fit_batch: got {self.fit_batch}, expected 1 or more; try 8")


@dataclass(frozen=True, kw_only=True)
class CamOptions(ActivationOptions):
    """Settings of `CamGenerator`.

    Attributes:
        region_scores: a proposal's pixels get the mean score of its tokens (proposals needed; where they overlap, the
            smallest decides), so that one score stands for a region; pixels of no proposal keep theirs.
        scale: how a class's map comes into [0, 1]: `max` clips what is negative and divides by the maximum; `minmax`
            stretches between the lowest and the highest score of the image.
    """

    region_scores: bool = False
    scale: Literal["max", "minmax"] = "max"


class ActivationGenerator(PseudoMaskGenerator):
    """Base of the generators that learn each class's weights by ridge regression on mean-pooled tokens.

    With `X` the images' pooled tokens and `Y` their multi-hot labels, both centred, the class weights are
    `w = (X'X / N + ridge * s * I)^-1 X'Y / N` and a token `t` scores `(t - mean) . w`: what a linear layer on
    average-pooled features converges to, hence a class activation map (Zhou et al., CVPR 2016), without a step of
    gradient descent. Each refinement round scores the tokens again, as multiple-instance learning does: in every image
    that has the class, the `top` fraction of tokens that score highest stands for it, and a linear discriminant against
    the tokens of all images, `(S + ridge * s * I)^-1 (mean of those tokens - mean of all tokens)`, replaces the
    weights. `s` is the mean of the matrix's non-zero eigenvalues.

    Args:
        options: how the weights are learned.
        backbone: called once, when tokens are first needed.
        classes: class names, background first.
    """

    is_fitted = True

    def __init__(self, options: ActivationOptions, backbone: Callable[[], Backbone], classes: Sequence[str]) -> None:
        self._fit_options, self._make_backbone, self._num_classes = options, backbone, len(classes) - 1
        self._weights: Tensor | None = None
        self._mean: Tensor | None = None

    @property
    def num_fit_passes(self) -> int:
        """One pass for the regression, and one for each refinement round."""
        return 1 + self._fit_options.rounds

    @property
    def digest(self) -> str:
        """Digest of the backbone's weights; what `fit` learned has its own."""
        return self._backbone.digest

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Learn the class weights; memory is a few `C x C` matrices, however many images there are.

        Args:
            samples: each call starts a new pass over the training images (with labels, without ground truth).
            num_classes: foreground classes, ids 1..num_classes.
            proposals: not used.

        Returns:
            `weights` `[num_classes, C]` and `mean` `[C]`, float32; the weights of a class that no image has are 0.

        Raises:
            DataError: no image, or one without image-level labels.
        """
        options = self._fit_options
        # Ridge regression on the images' mean tokens.
        image_moments, token_moments = Moments(), Moments()
        for sample, token_map in self.iterate_tokens(samples):
            tokens = token_map.tokens.flatten(0, 1)
            target = _to_multi_hot(sample.labels or (), num_classes, tokens)
            image_moments.add(tokens.mean(0, keepdim=True), target[None])
            if options.rounds:
                token_moments.add(tokens, target.expand(len(tokens), -1), weight=1 / len(tokens))
        check_fit_images(image_moments.count)
        weights, mean = image_moments.regress(options.ridge), image_moments.mean
        # Refinement: a discriminant between each class's best tokens and all tokens.
        for _ in range(options.rounds):
            best_means, num_images = self._average_best_tokens(samples, weights, mean)
            mean = token_moments.mean
            weights = token_moments.solve((best_means - mean).T, options.ridge).T
            weights = weights * (num_images > 0)[:, None]
        return {"weights": weights.float().contiguous(), "mean": mean.float().contiguous()}

    def _average_best_tokens(
        self, samples: Callable[[], Iterable[Sample]], weights: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of each class's best-scoring tokens, `[num_classes, C]`, and in how many images it is."""
        sums = torch.zeros_like(weights)
        num_images = torch.zeros(len(weights), dtype=weights.dtype, device=weights.device)
        for sample, token_map in self.iterate_tokens(samples):
            if not sample.labels:
                continue
            tokens = token_map.tokens.flatten(0, 1)
            rows = torch.tensor(sample.labels, device=tokens.device) - 1
            scores = (tokens - mean.to(tokens)) @ weights[rows].to(tokens).T
            best = scores.topk(max(1, round(self._fit_options.top * len(tokens))), dim=0).indices
            sums[rows] += tokens[best].mean(0).to(sums)
            num_images[rows] += 1
        return sums / num_images.clamp(min=1)[:, None], num_images

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
        self._weights, self._mean = weights, mean

    def compute_activation(self, sample: Sample, labels: tuple[int, ...]) -> tuple[TokenMap, Tensor]:
        """Return the image's tokens and their scores for the classes in `labels`, `[R, h, w]` float32 of any sign.

        Raises:
            DataError: a label that is no class.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        weights, mean = (get_fitted(part, "class activation maps") for part in (self._weights, self._mean))
        check_labels(sample.id, labels, self._num_classes)
        token_map = self._backbone.tokens([sample.image])[0]
        tokens = token_map.tokens
        if weights.shape[1] != tokens.shape[2]:
            raise ArtefactError(
                f"class activation maps: fitted on {weights.shape[1]} channels, but the backbone gives "
                f"{tokens.shape[2]}; remove the fit's folder and run again"
            )
        # Kept on the device for the next image.
        self._weights, self._mean = weights.to(tokens), mean.to(tokens)
        rows = torch.tensor(labels, dtype=torch.long, device=tokens.device) - 1
        return token_map, torch.einsum("hwc,rc->rhw", tokens - self._mean, self._weights[rows])

    def iterate_tokens(self, samples: Callable[[], Iterable[Sample]]) -> Iterator[tuple[Sample, TokenMap]]:
        """Yield every image with its tokens, in order.

        Raises:
            DataError: an image without image-level labels.
        """
        batch: list[Sample] = []
        for sample in samples():
            get_tags(sample, self._num_classes)
            batch.append(sample)
            if len(batch) == self._fit_options.fit_batch:
                yield from zip(batch, self._backbone.tokens([item.image for item in batch]), strict=True)
                batch = []
                trim_memory()
        if batch:
            yield from zip(batch, self._backbone.tokens([item.image for item in batch]), strict=True)

    @cached_property
    def _backbone(self) -> Backbone:
        return self._make_backbone()


class CamGenerator(ActivationGenerator):
    """Class activation maps: every pixel has the bilinear activation of its tokens, or that of its proposal.

    Args:
        options: how the weights are learned, and how scores are made of them.
        backbone: called once, when tokens are first needed.
        classes: class names, background first.
    """

    def __init__(self, options: CamOptions, backbone: Callable[[], Backbone], classes: Sequence[str]) -> None:
        super().__init__(options, backbone, classes)
        self._options, self.needs_proposals = options, options.region_scores

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return the activation of the classes in `labels`, each scaled to [0, 1] by itself; no background.

        Raises:
            DataError: a label that is no class, or no proposals although `region_scores` needs them.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        token_map, activation = self.compute_activation(sample, labels)
        scores = upsample(activation, token_map)
        if self._options.region_scores:
            if proposals is None:
                raise DataError(f"{sample.id}: no proposals, which region_scores=true needs; run the proposals first")
            proposals = proposals.to(activation.device)
            weights = coverage(proposals.masks, token_map).flatten(1)
            means = weights @ activation.flatten(1).T / weights.sum(1, keepdim=True).clamp(min=_EPSILON)
            scores = paint_regions(scores, means.T, proposals)
        return ScoreMaps(tuple(labels), scale_scores(scores, self._options.scale))


class Moments:
    """Running sums of rows `x` `[n, C]` with targets `y` `[n, K]`, in float64 where the device has it."""

    def __init__(self) -> None:
        self.count = 0.0
        self._rank = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add rows, each counted `weight` times."""
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        # Products of the rows of one image are exact enough in float32; the running sums are not.
        sums = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}
        for name, value in sums.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value, dtype=dtype)
            self._sums[name].add_(value, alpha=weight)
        self.count += weight * len(x)
        self._rank += len(x)

    @property
    def mean(self) -> Tensor:
        """Mean row, `[C]`."""
        return self._sums["x"] / self.count

    def solve(self, right: Tensor, ridge: float) -> Tensor:
        """Return `(covariance + ridge * s * I)^-1 right`, `s` the mean of the eigenvalues that can be above 0."""
        covariance = self._sums["xx"] / self.count - torch.outer(self.mean, self.mean)
        size = len(covariance)
        mean_eigenvalue = covariance.trace() / max(1, min(size, self._rank - 1))
        # The floor keeps the system solvable where all rows are equal.
        damping = (ridge * mean_eigenvalue).clamp(min=1e-12)
        return torch.linalg.solve(covariance + damping * torch.eye(size).to(covariance), right)

    def regress(self, ridge: float) -> Tensor:
        """Return the weights `[K, C]` of a ridge regression of the targets."""
        cross = self._sums["xy"] / self.count - torch.outer(self.mean, self._sums["y"] / self.count)
        return self.solve(cross, ridge).T


def _to_multi_hot(labels: tuple[int, ...], num_classes: int, like: Tensor) -> Tensor:
    """Return `[num_classes]` with 1 for each label, of the type and on the device of `like`."""
    target = torch.zeros(num_classes, dtype=like.dtype, device=like.device)
    if labels:
        target[torch.tensor(labels, device=like.device) - 1] = 1
    return target


def paint_regions(scores: Tensor, values: Tensor, proposals: Proposals) -> Tensor:
    """Return `scores` `[R, H, W]` with each proposal's pixels set to its `values` `[R, N]`; the smallest decides."""
    # Of equally large proposals the last one decides.
    smallest_first = proposals.areas.argsort(descending=True, stable=True).flip(0)
    owner = find_first(proposals.masks, smallest_first)
    if not len(proposals):
        return scores.clone()
    return torch.where(owner < 0, scores, values[:, smallest_first][:, owner.clamp(min=0)])


def scale_scores(scores: Tensor, scale: str = "max") -> Tensor:
    """Scale each row of `[R, ...]` into [0, 1]; one that is flat (`minmax`) or nowhere positive (`max`) becomes 0."""
    if not scores.numel():
        return scores
    axes = tuple(range(1, scores.ndim))
    low = scores.amin(axes, keepdim=True) if scale == "minmax" else 0.0
    scores = (scores - low).clamp(min=0)
    return (scores / scores.amax(axes, keepdim=True).clamp(min=_EPSILON)).clamp(max=1)
