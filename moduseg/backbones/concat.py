"""Several backbones, or one at several input sizes, concatenated in each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moduseg.backbones.base import Backbone
from moduseg.backbones.upsample import regrid
from moduseg.structures import TokenMap


@dataclass(frozen=True, kw_only=True)
class ConcatOptions:
    """Which backbones are joined, and with what weights.

    Attributes:
        parts: configurations of backbones (`{name: timm, model: ..., weights: ...}`), the one with the finest grid
            first.
        factors: each part's tokens are multiplied by this; 1 if omitted. In a cosine a part counts by the square.
        normalize: each part's tokens are scaled to length 1 first, so that models of other magnitudes can be joined.
        context: factor of the image's mean token; 0 omits it and keeps `C`.

    Raises:
        ValueError: no parts, factors that do not fit them, or a negative factor.
    """

    parts: list[dict[str, Any]]
    factors: list[float] | None = None
    normalize: bool = False
    context: float = 0.0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts: got none, expected configurations of backbones; try backbone=mobilenetv2")
        if self.factors is not None and (len(self.factors) != len(self.parts) or min(self.factors) < 0):
            raise ValueError(
                f"factors: got {self.factors}, expected {len(self.parts)} numbers from 0, one for each part; try null"
            )
        if self.context < 0:
            raise ValueError(f"context: got {self.context}, expected 0 or more; try 0.5")


class ConcatBackbone(Backbone):
    """Tokens of several backbones concatenated, on the grid of the first; the others are interpolated at its patches.

    Parts of the same model and other `short_side` show each region at several scales. `context` appends the mean token
    of the full image, so that regions of like pictures are more alike.

    Args:
        options: the parts and their weights.
        build_part: builds a backbone from its configuration.

    Raises:
        ConfigError: a part that is no backbone.
    """

    def __init__(self, options: ConcatOptions, build_part: Callable[[Mapping[str, Any]], Backbone]) -> None:
        self._parts = [build_part(part) for part in options.parts]
        self._factors = options.factors or [1.0] * len(options.parts)
        self._normalize, self._context = options.normalize, options.context

    @property
    def digest(self) -> str:
        """Digests of the parts, joined by `+`; their classes say which errors they raise."""
        return "+".join(part.digest for part in self._parts)

    @property
    def dim(self) -> int:
        """Channels `C` of a token: those of all parts, twice that with a context; builds the models."""
        return sum(part.dim for part in self._parts) * (2 if self._context else 1)

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """Return the token map of each image; grid, stride and input size are those of the first part.

        Args:
            images: `[H, W, 3]` uint8 RGB each, of any sizes (`Backbone.tokens`).

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            MissingError, ArtefactError: a part's weights are missing or damaged.
        """
        maps_by_part = [part.tokens(images) for part in self._parts]
        return [self._join(maps) for maps in zip(*maps_by_part, strict=True)]

    def _join(self, maps: Sequence[TokenMap]) -> TokenMap:
        """Return one map of the parts' maps of an image."""
        first = maps[0]
        parts = []
        for index, (token_map, factor) in enumerate(zip(maps, self._factors, strict=True)):
            tokens = regrid(token_map, first) if index else token_map.tokens
            parts.append((F.normalize(tokens, dim=2) if self._normalize else tokens) * factor)
        joined = torch.cat(parts, dim=2)
        if self._context:
            mean = joined.mean((0, 1), keepdim=True) * self._context
            joined = torch.cat([joined, mean.expand_as(joined)], dim=2)
        return TokenMap(joined, first.stride, first.image_size, first.input_size)
