"""CLIP as a backbone: patch tokens in any variant of the last block, and text features to compare them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip_attention import GIVEN, Affinity, Branches, check_variant, cosine_similarity, dense_tokens
from moduseg.backbones.clip_model import Activation, ClipSource
from moduseg.backbones.inputs import to_input
from moduseg.backbones.regions import merge_table, region_grid
from moduseg.devices import Device
from moduseg.structures import TokenMap


class ClipEncoder:
    """A CLIP that turns images of any sizes into token maps.

    Args:
        source: the model.
        variant: one of `moduseg.backbones.clip_attention.VARIANTS`.
        project: tokens in the space of the texts.
        short_side: the image is resized until its short side has this many pixels; native size where left out.
        batch_size: images of one padded size that share a forward pass.
        gaussian_std: of `naclip`, in patches.
        gamma, beta: of `proxyclip`.
        branches: of `corrclip`.
        merge_eps: of `corrclip`, the distance up to which regions are merged; see `moduseg.backbones.regions`.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        source: ClipSource,
        variant: str = "plain",
        project: bool = True,
        short_side: int | None = None,
        batch_size: int = 8,
        gaussian_std: float = 5.0,
        gamma: float = 3.0,
        beta: float = 1.2,
        branches: Branches | None = None,
        merge_eps: float = 0.2,
    ) -> None:
        check_variant(variant)
        for name, number in (("short_side", short_side), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, expected 1 or more")
        for name, value in (("gaussian_std", gaussian_std), ("gamma", gamma)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a number above 0")
        if not merge_eps >= 0:
            raise ValueError(f"merge_eps: got {merge_eps}, expected 0 or more; the paper uses 0.2")
        self.source, self.variant = source, variant
        self._branches, self._merge_eps = branches or Branches(), merge_eps
        self._project, self._short_side, self._batch_size = project, short_side, batch_size
        self._gaussian_std, self._gamma, self._beta = gaussian_std, gamma, beta

    @property
    def stride(self) -> int:
        """Side of a patch, in pixels of the input; loads the model."""
        return int(self.source.model.config.vision_config.patch_size)

    @property
    def dim(self) -> int:
        """Channels of a token; loads the model."""
        config = self.source.model.config
        return int(config.projection_dim if self._project else config.vision_config.hidden_size)

    def encode(
        self,
        images: Sequence[np.ndarray],
        proxies: Sequence[TokenMap] | None = None,
        regions: Sequence[Tensor] | None = None,
    ) -> list[TokenMap]:
        """Token maps of images, `[H, W, 3]` uint8 RGB each; padded with black at the bottom and right.

        Args:
            images: of any sizes.
            proxies: for `proxyclip` and `corrclip`, token maps of the same images by another backbone, of any stride;
                the result then lies on their grids.
            regions: for `corrclip`, `[H, W]` int64 ids of the same images, -1 for no region.

        Returns:
            float32 maps on the device, not normalised.

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            MissingError, ArtefactError, ConfigError: see `ClipSource.model` and `Branches.blocks`.
            ValueError: proxies or regions missing, superfluous, or of other images.
        """
        if (proxies is not None) != (self.variant in GIVEN):
            raise ValueError(
                f"proxies: variant {self.variant!r}; {' and '.join(GIVEN)} need them, the other variants take none"
            )
        if (regions is not None) != (self.variant == "corrclip"):
            raise ValueError(f"regions: variant {self.variant!r}; corrclip needs them, the other variants take none")
        if proxies is not None and [p.image_size for p in proxies] != [i.shape[:2] for i in images]:
            raise ValueError("proxies: expected one token map for each image, made from that image")
        if regions is not None and [tuple(r.shape) for r in regions] != [i.shape[:2] for i in images]:
            raise ValueError("regions: expected one id map for each image, of its size")
        inputs = [to_input(image, self._short_side, self.source.device.torch_device) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, tensor in enumerate(inputs):
            padded = tuple(-(-side // self.stride) * self.stride for side in tensor.shape[1:])
            # Resampling to a proxy's grid depends on the unpadded size too.
            exact = (*tensor.shape[1:], *proxies[index].input_size, *images[index].shape[:2]) if proxies else ()
            groups.setdefault((*padded, *exact), []).append(index)
        maps: dict[int, TokenMap] = {}
        for key, members in groups.items():
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                chosen = [proxies[i] for i in batch] if proxies is not None else None
                found = [regions[i] for i in batch] if regions is not None else None
                grids = self._forward([inputs[i] for i in batch], (key[0], key[1]), chosen, found)
                for index, grid in zip(batch, grids, strict=True):
                    height, width = inputs[index].shape[1:]
                    # Cloned outside inference mode: an ordinary tensor that keeps the batch out of memory.
                    if chosen is None:
                        maps[index] = TokenMap(grid.clone(), self.stride, images[index].shape[:2], (height, width))
                    else:
                        maps[index] = dataclasses.replace(proxies[index], tokens=grid.clone())  # type: ignore[index]
        return [maps[index] for index in range(len(images))]

    @torch.inference_mode()
    def _forward(
        self,
        inputs: Sequence[Tensor],
        padded: tuple[int, int],
        proxies: Sequence[TokenMap] | None,
        regions: Sequence[Tensor] | None,
    ) -> Tensor:
        """`[B, h, w, C]` float32 from inputs that share one padded size."""
        batch = torch.zeros(len(inputs), 3, *padded, device=self.source.device.torch_device)
        for row, tensor in zip(batch, inputs, strict=True):
            row[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        mean, std = self.source.normalisation
        affinity = None
        if proxies is not None:
            affinity = Affinity(
                cosine_similarity(torch.stack([proxy.tokens.to(batch.device) for proxy in proxies])),
                *self._resampling(inputs[0], padded, proxies[0]),
                self._gamma,
                self._beta,
                *self._region_grids(inputs[0], padded, proxies, regions),
                self._branches,
            )
        with self.source.device.autocast():
            tokens = dense_tokens(
                self.source.model, (batch - mean) / std, self.variant, affinity, self._gaussian_std, self._project
            )
        return tokens.float()

    def _resampling(self, tensor: Tensor, padded: tuple[int, int], proxy: TokenMap) -> tuple[Tensor, Tensor]:
        """Weights from this model's patch rows and columns to those of `proxy`, which may have seen another size."""
        rows, columns = (
            resample_weights(cells, proxy.stride * source / seen, side // self.stride, self.stride, tensor.device)
            for cells, source, seen, side in zip(
                proxy.tokens.shape[:2], tensor.shape[1:], proxy.input_size, padded, strict=True
            )
        )
        return rows, columns

    def _region_grids(
        self, tensor: Tensor, padded: tuple[int, int], proxies: Sequence[TokenMap], regions: Sequence[Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Merged regions on the grid of the proxies and on this model's, `[B, n]` each."""
        if regions is None:
            return None, None
        own = (padded[0] // self.stride, padded[1] // self.stride)
        theirs, ours = [], []
        for proxy, ids in zip(proxies, regions, strict=True):
            ids = ids.to(tensor.device)
            fine = region_grid(ids, proxy.tokens.shape[:2], proxy.stride, proxy.input_size)  # type: ignore[arg-type]
            coarse = region_grid(ids, own, self.stride, (tensor.shape[1], tensor.shape[2]))
            count = int(ids.max()) + 1
            table = merge_table(proxy.tokens.to(tensor.device), fine, count, self._merge_eps)
            theirs.append(table[fine].flatten())
            ours.append(table[coarse].flatten())
        return torch.stack(theirs), torch.stack(ours)


class ClipBackbone(Backbone):
    """Patch tokens of a CLIP image encoder.

    Args:
        device: where the model runs and in which precision; tokens are float32 there.
        weights: a directory, `miniature/clip`, a hub id, or `random`; see `ClipSource`.
        revision: branch, tag or commit of a hub id.
        config: `CLIPConfig`'s arguments, for `random`.
        tokenizer: directory of another tokenizer, for texts.
        variant: how the last block is run; `proxyclip` and `corrclip` need a second backbone, which `pseudo_masks` has.
        project: tokens in the space of the texts instead of the encoder's own.
        short_side: the image is resized until its short side has this many pixels; native size where left out.
        batch_size: images of one padded size that share a forward pass.
        gaussian_std: of `naclip`, in patches.
        seed: of `random` weights.
        activation: `quick_gelu` or `gelu`, see `ClipSource`; what `config.json` says where left out.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        device: Device,
        weights: str = "miniature/clip",
        revision: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        variant: Literal["plain", "maskclip", "sclip", "clearclip", "naclip"] = "plain",
        project: bool = False,
        short_side: int | None = None,
        batch_size: int = 8,
        gaussian_std: float = 5.0,
        seed: int = 0,
        activation: Activation | None = None,
    ) -> None:
        if variant in GIVEN:
            raise ValueError(f"variant: got {variant!r}, which pseudo_masks=clip_dense or corrclip runs; try naclip")
        self._source = ClipSource(weights, device, revision, config, tokenizer, seed, activation=activation)
        self._encoder = ClipEncoder(self._source, variant, project, short_side, batch_size, gaussian_std)

    @property
    def digest(self) -> str:
        """See `ClipSource.digest`."""
        return self._source.digest

    @property
    def dim(self) -> int:
        """Channels `C` of a token; loads the model."""
        return self._encoder.dim

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """See `Backbone.tokens` and `ClipEncoder.encode`."""
        return self._encoder.encode(images)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """L2-normalised features of texts, `[N, D]` float32; comparable with tokens of `project=true`."""
        return self._source.text_features(prompts)


def resample_weights(cells: int, step: float, source_cells: int, source_step: float, device: torch.device) -> Tensor:
    """`[cells, source_cells]` bilinear weights from one row of patches to another that starts at the same border.

    Args:
        cells, step: number and length of the target's patches, in pixels.
        source_cells, source_step: the same of the source; beyond its outermost centres the border is repeated.
        device: where the weights are put.
    """
    centres = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (step / source_step) - 0.5
    distance = centres.clamp(0, source_cells - 1)[:, None] - torch.arange(source_cells, device=device)
    return (1 - distance.abs()).clamp(min=0)
