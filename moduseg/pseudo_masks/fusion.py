"""Two generators as one: at each pixel the one with the lower entropy counts for more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moduseg.errors import ConfigError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.labels import add_background
from moduseg.structures import Proposals, Sample, ScoreMaps

PARTS = ("first", "second")


class BuildPart(Protocol):
    """Builds a generator from its configuration; `where` is the configuration's key, for messages."""

    def __call__(self, cfg: Mapping[str, Any], *, where: str) -> PseudoMaskGenerator:
        """Return the generator that `cfg["name"]` names."""


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """Which two generators are fused.

    Attributes:
        first, second: configurations of generators, as `pseudo_masks.generator` takes them.
        rule, value: the background's score (`constant` or `power`) of a generator that supplies none, as in
            `moduseg.pseudo_masks.labels.add_background`.

    Raises:
        ValueError: a fusion inside a fusion.
    """

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    rule: Literal["constant", "power"] = "constant"
    value: float = 0.5

    def __post_init__(self) -> None:
        if "fusion" in (self.first.get("name"), self.second.get("name")):
            raise ValueError("first, second: got a fusion, expected other generators; try corrclip and cam")


class FusionGenerator(PseudoMaskGenerator):
    """The mean of two generators' distributions over background and classes, weighted by their entropies.

    Scores are divided by their sum at each pixel; the first has the weight `sigmoid(entropy of the second - entropy of
    the first)`, the second the rest. A pixel that one of them ignores is left to the other.

    Args:
        options: the two generators.
        build_part: builds a generator from its configuration.

    Raises:
        ConfigError: a configuration that makes no generator.
    """

    def __init__(self, options: FusionOptions, build_part: BuildPart) -> None:
        self._parts = [
            build_part(cfg, where=f"pseudo_masks.generator.{name}")
            for name, cfg in zip(PARTS, (options.first, options.second), strict=True)
        ]
        self._rule, self._value = options.rule, options.value
        self.needs_truth = any(part.needs_truth for part in self._parts)
        self.needs_proposals = any(part.needs_proposals for part in self._parts)
        self.is_fitted = any(part.is_fitted for part in self._parts)
        self.fits_proposals = any(part.fits_proposals for part in self._parts)
        self.fits_together = any(part.fits_together for part in self._parts)

    @property
    def digest(self) -> str:
        """Digests of both generators."""
        return "&".join(part.digest for part in self._parts)

    @property
    def supervision(self) -> str | None:
        """Those of both generators."""
        texts = dict.fromkeys(part.supervision for part in self._parts if part.supervision is not None)
        return "+".join(texts) or None

    @property
    def fit_seconds(self) -> float:
        """The sum over the parts."""
        return sum(part.fit_seconds for part in self._parts)

    @property
    def num_fit_passes(self) -> int:
        """Those of all parts."""
        return sum(part.num_fit_passes for part in self._parts)

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Fit the parts that need it (`PseudoMaskGenerator.fit`); tensors of the first are called `first.<name>`."""
        return {
            f"{name}.{key}": tensor
            for name, part in zip(PARTS, self._parts, strict=True)
            if part.is_fitted
            for key, tensor in part.fit(samples, num_classes, proposals).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned."""
        for name, part in zip(PARTS, self._parts, strict=True):
            if part.is_fitted:
                part.load_state({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})

    def count_learnt(self, state: dict[str, Tensor]) -> int:
        """Return the sum over the parts."""
        return sum(
            part.count_learnt({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
            for name, part in zip(PARTS, self._parts, strict=True)
            if part.is_fitted
        )

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return the fused scores of classes and background; they sum to 1.

        Raises:
            ConfigError: the two score different classes.
            DataError: the generators' own reasons.
        """
        first, second = (part.generate(sample, labels, proposals) for part in self._parts)
        if first.class_ids != second.class_ids:
            raise ConfigError(
                f"pseudo_masks.generator: first scores classes {first.class_ids}, second {second.class_ids} of "
                f"{sample.id}; set filter_labels of both alike"
            )
        stacked = [
            add_background(maps, self._rule if maps.background is None else "given", self._value)
            for maps in (first, second)
        ]
        ignored = [_to_ignored_pixels(maps) for maps in (first, second)]
        fused = fuse(*stacked, *ignored)
        ignore = None if first.ignore is None or second.ignore is None else ignored[0] & ignored[1]
        return ScoreMaps(first.class_ids, fused[1:], fused[0], ignore)


def _to_ignored_pixels(maps: ScoreMaps) -> Tensor:
    """Return `[H, W]` bool, the pixels about which a generator says nothing."""
    if maps.ignore is not None:
        return maps.ignore
    return torch.zeros(maps.scores.shape[1:], dtype=torch.bool, device=maps.scores.device)


def fuse(first: Tensor, second: Tensor, ignored_by_first: Tensor, ignored_by_second: Tensor) -> Tensor:
    """Return the entropy-weighted mean of two distributions at each pixel.

    Args:
        first, second: `[S, H, W]` scores >= 0; all zeros at a pixel count as equal shares.
        ignored_by_first, ignored_by_second: `[H, W]` bool, where one of them says nothing.

    Returns:
        `[S, H, W]`, sums of 1; with equal entropies the mean of the two distributions.
    """
    first, second = _normalise(first), _normalise(second)
    weight = torch.sigmoid(compute_entropy(second) - compute_entropy(first))
    weight = torch.where(ignored_by_first & ~ignored_by_second, torch.zeros_like(weight), weight)
    weight = torch.where(ignored_by_second & ~ignored_by_first, torch.ones_like(weight), weight)
    return weight * first + (1 - weight) * second


def compute_entropy(distribution: Tensor) -> Tensor:
    """Return the entropy of `[S, ...]` shares in nats, `[...]`."""
    return torch.special.entr(distribution).sum(0)


def _normalise(scores: Tensor) -> Tensor:
    """Return scores `[S, H, W]` divided by their sum at each pixel; equal shares where that is 0."""
    total = scores.sum(0, keepdim=True)
    return torch.where(total > 0, scores / total.clamp(min=torch.finfo(scores.dtype).tiny), 1 / len(scores))
