"""Clusters of the tokens of any backbone, image by image: what discoverers that know more have to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.upsample import upsample
from moduseg.discovery.base import Discoverer
from moduseg.discovery.clustering import count_by_eigengap, embed_spectrally, k_means
from moduseg.structures import Sample, TokenMap


@dataclass(frozen=True, kw_only=True)
class KMeansOptions:
    """Settings of `KMeansDiscoverer`.

    Attributes:
        num_clusters: of each image.
        seed: of the starts of k-means.

    Raises:
        ValueError: a value out of range.
    """

    num_clusters: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_clusters <= 64:
            raise ValueError(f"num_clusters: got {self.num_clusters}, expected 1 to 64; try 8")


class KMeansDiscoverer(Discoverer):
    """K-means of an image's tokens, brought to length 1; a pixel belongs to the centre that is nearest to it.

    Args:
        options: how many clusters.
    """

    def __init__(self, options: KMeansOptions) -> None:
        self._options = options

    @torch.inference_mode()
    def find_segments(self, sample: Sample, tokens: TokenMap) -> Tensor:
        """Return the segment of every pixel; see `Discoverer.find_segments`."""
        vectors = F.normalize(tokens.tokens.float().flatten(0, 1), dim=1)
        centres = k_means(vectors, self._options.num_clusters, seed=self._options.seed)
        return _label_pixels(vectors, centres, tokens)


@dataclass(frozen=True, kw_only=True)
class SpectralOptions:
    """Settings of `SpectralDiscoverer`.

    Attributes:
        num_clusters: of each image; if omitted, as many as the largest gap between eigenvalues says.
        max_clusters: at most so many of them, 2 or more.
        temperature: of the connections `exp((cos - 1) / temperature)`.
        seed: of the starts of k-means.

    Raises:
        ValueError: a value out of range.
    """

    num_clusters: int | None = None
    max_clusters: int = 12
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_clusters is not None and not 1 <= self.num_clusters <= 64:
            raise ValueError(f"num_clusters: got {self.num_clusters}, expected 1 to 64, or null for the largest gap")
        if not 2 <= self.max_clusters <= 64:
            raise ValueError(f"max_clusters: got {self.max_clusters}, expected 2 to 64; try 12")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected more than 0; try 0.05")


class SpectralDiscoverer(Discoverer):
    """Spectral clustering of an image's tokens (Ng, Jordan and Weiss, 2001).

    All pairs of tokens are compared: memory grows with the square of their number, time with its cube.

    Args:
        options: how tokens are connected, and how many clusters there are.
    """

    def __init__(self, options: SpectralOptions) -> None:
        self._options = options

    @torch.inference_mode()
    def find_segments(self, sample: Sample, tokens: TokenMap) -> Tensor:
        """Return the segment of every pixel; see `Discoverer.find_segments`."""
        options = self._options
        vectors = tokens.tokens.float().flatten(0, 1)
        max_dims = max(options.max_clusters, options.num_clusters or 0) + 1
        values, eigenvectors = embed_spectrally(vectors, options.temperature, max_dims)
        count = options.num_clusters or count_by_eigengap(values, options.max_clusters)
        embedded = F.normalize(eigenvectors[:, :count], dim=1)
        return _label_pixels(embedded, k_means(embedded, count, seed=options.seed), tokens)


def _label_pixels(vectors: Tensor, centres: Tensor, tokens: TokenMap) -> Tensor:
    """Return the centre that is nearest to each pixel, `[H, W]` int64; distances are interpolated between patches.

    Args:
        vectors: `[h * w, D]` of the patches.
        centres: `[K, D]`.
        tokens: the grid `h x w`.
    """
    # The square of the vector is common to all centres and takes no part in the choice.
    nearness = 2 * vectors @ centres.T - (centres * centres).sum(1)
    return upsample(nearness.T.unflatten(1, tokens.tokens.shape[:2]), tokens).argmax(0)
