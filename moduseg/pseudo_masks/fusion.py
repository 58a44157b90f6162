"""Two generators as one: at each pixel the one that is surer counts for more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.labels import with_background
from moduseg.structures import Proposals, Sample, ScoreMaps

PARTS = ("first", "second")


class FusionGenerator(PseudoMaskGenerator):
    """The mean of two generators' distributions over background and classes, weighted by their entropies.

    Scores are divided by their sum at each pixel; the first has the weight `sigmoid(entropy of the second - entropy of
    the first)`, the second the rest. A pixel that one of them leaves open is the other's.

    Args:
        device, backbone, classes: handed on to the two.
        first, second: configurations of generators, as `pseudo_masks.generator` takes them.
        rule, value: the background's score (`constant` or `power`) of a generator that supplies none; see
            `moduseg.pseudo_masks.labels.with_background`.

    Raises:
        ConfigError: a configuration that makes no generator.
        ValueError: a fusion inside a fusion.
    """

    def __init__(
        self,
        device: Device,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        rule: Literal["constant", "power"] = "constant",
        value: float = 0.5,
    ) -> None:
        # The room's table of names holds this class as well.
        from moduseg.pseudo_masks import GENERATORS

        if "fusion" in (first.get("name"), second.get("name")):
            raise ValueError("first, second: got a fusion, expected other generators; try corrclip and cam")
        context = {"device": device, "backbone": backbone, "classes": tuple(classes)}
        self._parts = [
            build_named(f"pseudo_masks.generator.{name}", GENERATORS, cfg, **context)
            for name, cfg in zip(PARTS, (first, second), strict=True)
        ]
        self._rule, self._value = rule, value
        self.needs_truth = any(part.needs_truth for part in self._parts)
        self.needs_proposals = any(part.needs_proposals for part in self._parts)
        self.is_fitted = any(part.is_fitted for part in self._parts)
        self.fits_proposals = any(part.fits_proposals for part in self._parts)

    @property
    def digest(self) -> str:
        """Of both."""
        return "&".join(part.digest for part in self._parts)

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """See `PseudoMaskGenerator.fit`; tensors of the first are called `first.<name>`."""
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

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Fused scores of the classes, background given; they sum to 1.

        Raises:
            ConfigError: the two score other classes.
            DataError: see the generators.
        """
        first, second = (part.generate(sample, labels, proposals) for part in self._parts)
        if first.class_ids != second.class_ids:
            raise ConfigError(
                f"pseudo_masks.generator: first scores classes {first.class_ids}, second {second.class_ids} of "
                f"{sample.id}; set filter_labels of both alike"
            )
        filled = [dataclasses.replace(m, background=self._background(m), ignore=None) for m in (first, second)]
        ignored = [_ignored(m) for m in (first, second)]
        fused = fuse(*(torch.cat([m.background[None], m.scores]) for m in filled), *ignored)  # type: ignore[index]
        ignore = None if first.ignore is None or second.ignore is None else ignored[0] & ignored[1]
        return ScoreMaps(first.class_ids, fused[1:], fused[0], ignore)

    def _background(self, maps: ScoreMaps) -> Tensor:
        return maps.background if maps.background is not None else with_background(maps, self._rule, self._value)[0]


def _ignored(maps: ScoreMaps) -> Tensor:
    if maps.ignore is not None:
        return maps.ignore
    return torch.zeros(maps.scores.shape[1:], dtype=torch.bool, device=maps.scores.device)


def fuse(first: Tensor, second: Tensor, open_first: Tensor, open_second: Tensor) -> Tensor:
    """The entropy-weighted mean of two distributions at each pixel.

    Args:
        first, second: `[S, H, W]` scores >= 0; all zeros at a pixel count as no knowledge, equal shares.
        open_first, open_second: `[H, W]` bool, where one of them says nothing.

    Returns:
        `[S, H, W]`, sums of 1; with equal entropies the mean of the two distributions.
    """
    one, other = _distribution(first), _distribution(second)
    weight = torch.sigmoid(entropy(other) - entropy(one))
    weight = torch.where(open_first & ~open_second, torch.zeros_like(weight), weight)
    weight = torch.where(open_second & ~open_first, torch.ones_like(weight), weight)
    return weight * one + (1 - weight) * other


def entropy(distribution: Tensor) -> Tensor:
    """`[S, ...]` shares to `[...]` nats."""
    return torch.special.entr(distribution).sum(0)


def _distribution(scores: Tensor) -> Tensor:
    total = scores.sum(0, keepdim=True)
    return torch.where(total > 0, scores / total.clamp(min=torch.finfo(scores.dtype).tiny), 1 / len(scores))
