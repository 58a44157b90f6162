"""Several backbones, or one at several input sizes, side by side in one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moduseg.backbones.base import Backbone
from moduseg.backbones.upsample import regrid
from moduseg.devices import Device
from moduseg.structures import TokenMap


class ConcatBackbone(Backbone):
    """Tokens of all parts side by side, on the grid of the first part; the others are interpolated at its patches.

    Parts of the same model and other `short_side` show each region at several scales. `context` appends the mean token
    of the whole image, so that regions of like pictures are more alike.

    Args:
        parts: configurations of backbones (`{name: timm, model: ..., weights: ...}`), the one with the finest grid
            first.
        device: where the models run.
        factors: each part's tokens are multiplied by this; 1 where left out. In a cosine a part counts by the square.
        normalize: each part's tokens are brought to length 1 first, so that models of other magnitudes can be joined.
        context: factor of the image's mean token; 0 leaves it out and `C` as it is.

    Raises:
        ValueError: no parts, factors that do not fit them, or a negative factor.
        ConfigError: a part that is no backbone.
    """

    def __init__(
        self,
        parts: list[dict[str, Any]],
        device: Device,
        factors: list[float] | None = None,
        normalize: bool = False,
        context: float = 0.0,
    ) -> None:
        from moduseg.backbones import build

        if not parts:
            raise ValueError("parts: got none, expected configurations of backbones; try backbone=mobilenetv2")
        if factors is not None and (len(factors) != len(parts) or min(factors) < 0):
            raise ValueError(
                f"factors: got {factors}, expected {len(parts)} numbers from 0, one for each part; try null"
            )
        if context < 0:
            raise ValueError(f"context: got {context}, expected 0 or more; try 0.5")
        self._parts = [build(part, device) for part in parts]
        self._factors, self._normalize, self._context = factors or [1.0] * len(parts), normalize, context

    @property
    def digest(self) -> str:
        """Digests of the parts, joined by `+`; see their classes for the errors."""
        return "+".join(part.digest for part in self._parts)

    @property
    def dim(self) -> int:
        """Channels `C` of a token: those of all parts, twice that with a context; builds the models."""
        return sum(part.dim for part in self._parts) * (2 if self._context else 1)

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """See `Backbone.tokens`; the grid, stride and input size are those of the first part.

        Raises:
            DataError, MissingError, ArtefactError: see the parts.
        """
        found = [part.tokens(images) for part in self._parts]
        return [self._join([maps[index] for maps in found]) for index in range(len(images))]

    def _join(self, maps: Sequence[TokenMap]) -> TokenMap:
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
