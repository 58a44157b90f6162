"""CLIP as a backbone: patch tokens in any variant of the last block, and text features to compare them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip_attention import (
    AFFINITY_VARIANTS,
    Affinity,
    Branches,
    check_variant,
    cosine_similarity,
    encode_patches,
)
from moduseg.backbones.clip_model import ClipModelOptions, ClipSource
from moduseg.backbones.inputs import batch_equal, pad_and_stack, round_up, to_inputs
from moduseg.backbones.regions import merge_regions, sample_regions
from moduseg.devices import Device
from moduseg.structures import TokenMap


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How a CLIP image encoder is run.

    Attributes:
        variant: how the last block is run, one of `moduseg.backbones.clip_attention.VARIANTS`.
        project: tokens in the space of the texts instead of the encoder's own.
        short_side: the image is resized until its short side has this many pixels; native size if omitted.
        batch_size: images of one padded size that share a forward pass.
        gaussian_std: of `naclip`, in patches.
        gamma, beta: of `proxyclip`.
        branches: of `corrclip`.
        merge_eps: of `corrclip`, the distance up to which `moduseg.backbones.regions.merge_regions` merges regions.

    Raises:
        ValueError: a value out of range.
    """

    variant: str = "plain"
    project: bool = True
    short_side: int | None = None
    batch_size: int = 8
    gaussian_std: float = 5.0
    gamma: float = 3.0
    beta: float = 1.2
    branches: Branches = field(default_factory=Branches)
    merge_eps: float = 0.2

    def __post_init__(self) -> None:
        check_variant(self.variant)
        for name in ("short_side", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        for name in ("gaussian_std", "gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if not self.merge_eps >= 0:
            raise ValueError(f"merge_eps: got {self.merge_eps}, expected 0 or more; the paper uses 0.2")


class ClipEncoder:
    """A CLIP that turns images of any sizes into token maps.

    Args:
        source: the model; loaded on first use.
        options: how it is run.
    """

    def __init__(self, source: ClipSource, options: EncoderOptions) -> None:
        self.source, self.options = source, options
        self.shallow_blocks: tuple[int, int] | None = None
        """First and last block, counted from 1, whose mean output is appended to each token; `None` appends none."""

    @property
    def variant(self) -> str:
        """How the last block is run."""
        return self.options.variant

    @property
    def stride(self) -> int:
        """Side of a patch, in pixels of the input; loads the model."""
        return int(self.source.model.config.vision_config.patch_size)

    @property
    def dim(self) -> int:
        """Channels of a token; loads the model."""
        config = self.source.model.config
        return int(config.projection_dim if self.options.project else config.vision_config.hidden_size)

    def encode(
        self,
        images: Sequence[np.ndarray],
        proxies: Sequence[TokenMap] | None = None,
        regions: Sequence[Tensor] | None = None,
    ) -> list[TokenMap]:
        """Return the token maps of images, padded with black at the bottom and right.

        Args:
            images: `[H, W, 3]` uint8 RGB each, of any sizes.
            proxies: for `proxyclip` and `corrclip`, token maps of the same images by another backbone, of any stride;
                the result then lies on their grids.
            regions: for `corrclip`, `[H, W]` int64 ids of the same images, -1 for no region.

        Returns:
            float32 maps on the device, not normalised.

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            MissingError: the weights are not there.
            ArtefactError: the weights are damaged or of another model.
            ConfigError: `spatial_blocks` that the model has not.
            ValueError: proxies or regions missing, superfluous, or of other images.
        """
        self._check_inputs(images, proxies, regions)
        inputs = to_inputs(images, self.options.short_side, self.source.device.torch_device, stride=self.stride)
        keys = []
        for index, (tensor, image) in enumerate(zip(inputs, images, strict=True)):
            # Resampling to a proxy's grid depends on the sizes before padding too.
            sizes = (tensor.shape[1:], proxies[index].input_size, image.shape[:2]) if proxies is not None else None
            keys.append((round_up(tensor.shape[1:], self.stride), sizes))
        maps: dict[int, TokenMap] = {}
        for (padded_size, _), members in batch_equal(keys, self.options.batch_size):
            batch_proxies = None if proxies is None else [proxies[i] for i in members]
            batch_regions = None if regions is None else [regions[i] for i in members]
            grids = self._forward([inputs[i] for i in members], padded_size, batch_proxies, batch_regions)
            for index, grid in zip(members, grids, strict=True):
                height, width = inputs[index].shape[1:]
                # Cloned outside inference mode: an ordinary tensor that keeps the batch out of memory.
                if proxies is None:
                    maps[index] = TokenMap(grid.clone(), self.stride, images[index].shape[:2], (height, width))
                else:
                    maps[index] = dataclasses.replace(proxies[index], tokens=grid.clone())
        return [maps[index] for index in range(len(images))]

    def _check_inputs(
        self,
        images: Sequence[np.ndarray],
        proxies: Sequence[TokenMap] | None,
        regions: Sequence[Tensor] | None,
    ) -> None:
        """Raise `ValueError` where proxies or regions are missing, superfluous, or of other images."""
        if (proxies is not None) != (self.variant in AFFINITY_VARIANTS):
            raise ValueError(
                f"proxies: variant {self.variant!r}; {' and '.join(AFFINITY_VARIANTS)} need them, the other variants "
                "take none"
            )
        if (regions is not None) != (self.variant == "corrclip"):
            raise ValueError(f"regions: variant {self.variant!r}; corrclip needs them, the other variants take none")
        if proxies is not None and [p.image_size for p in proxies] != [i.shape[:2] for i in images]:
            raise ValueError("proxies: expected one token map for each image, made from that image")
        if regions is not None and [tuple(r.shape) for r in regions] != [i.shape[:2] for i in images]:
            raise ValueError("regions: expected one id map for each image, of its size")

    @torch.inference_mode()
    def _forward(
        self,
        inputs: Sequence[Tensor],
        padded_size: tuple[int, int],
        proxies: Sequence[TokenMap] | None,
        regions: Sequence[Tensor] | None,
    ) -> Tensor:
        """Return the tokens `[B, h, w, C]` float32 of inputs that share one padded size."""
        mean, std = self.source.normalisation
        batch = (pad_and_stack(inputs, padded_size) - mean) / std
        affinity = None
        if proxies is not None:
            rows, columns = self._make_resampling(inputs[0], padded_size, proxies[0])
            fine, coarse = self._make_region_grids(inputs[0], padded_size, proxies, regions)
            affinity = Affinity(
                cosine_similarity(torch.stack([proxy.tokens.to(batch.device) for proxy in proxies])),
                rows=rows,
                columns=columns,
                gamma=self.options.gamma,
                beta=self.options.beta,
                regions=fine,
                patch_regions=coarse,
                branches=self.options.branches,
            )
        with self.source.device.autocast():
            tokens = encode_patches(
                self.source.model,
                batch,
                self.variant,
                affinity,
                gaussian_std=self.options.gaussian_std,
                project=self.options.project,
                shallow_blocks=self.shallow_blocks,
            )
        return tokens.float()

    def _make_resampling(self, tensor: Tensor, padded_size: tuple[int, int], proxy: TokenMap) -> tuple[Tensor, Tensor]:
        """Return weights from this model's patch rows and columns to those of `proxy`, which may have another size."""
        rows, columns = (
            make_resampling_weights(
                cells, proxy.stride * pixels / proxy_pixels, side // self.stride, self.stride, tensor.device
            )
            for cells, pixels, proxy_pixels, side in zip(
                proxy.tokens.shape[:2], tensor.shape[1:], proxy.input_size, padded_size, strict=True
            )
        )
        return rows, columns

    def _make_region_grids(
        self,
        tensor: Tensor,
        padded_size: tuple[int, int],
        proxies: Sequence[TokenMap],
        regions: Sequence[Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the merged regions on the grid of the proxies and on this model's, `[B, n]` each."""
        if regions is None:
            return None, None
        clip_grid = (padded_size[0] // self.stride, padded_size[1] // self.stride)
        fine_grids, coarse_grids = [], []
        for proxy, ids in zip(proxies, regions, strict=True):
            ids = ids.to(tensor.device)
            fine = sample_regions(ids, proxy.tokens.shape[:2], proxy.stride, proxy.input_size)  # type: ignore[arg-type]
            coarse = sample_regions(ids, clip_grid, self.stride, (tensor.shape[1], tensor.shape[2]))
            merged_ids = merge_regions(proxy.tokens.to(tensor.device), fine, int(ids.max()) + 1, self.options.merge_eps)
            fine_grids.append(merged_ids[fine].flatten())
            coarse_grids.append(merged_ids[coarse].flatten())
        return torch.stack(fine_grids), torch.stack(coarse_grids)


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ClipModelOptions):
    """Settings of a CLIP backbone: which model, and what is taken from it.

    Attributes:
        variant: how the last block is run; `proxyclip` and `corrclip` need a second backbone, which `pseudo_masks` has.
        project, short_side, batch_size, gaussian_std: as in `EncoderOptions`.

    Raises:
        ValueError: a value out of range.
    """

    variant: Literal["plain", "maskclip", "sclip", "clearclip", "naclip"] = "plain"
    project: bool = False
    short_side: int | None = None
    batch_size: int = 8
    gaussian_std: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant in AFFINITY_VARIANTS:
            raise ValueError(
                f"variant: got {self.variant!r}, which pseudo_masks=clip_dense or corrclip runs; try naclip"
            )


class ClipBackbone(Backbone):
    """Patch tokens of a CLIP image encoder.

    Args:
        options: the model and how it is run; it is loaded on first use.
        device: where the model runs and in which precision; tokens are float32 there.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, options: ClipOptions, device: Device) -> None:
        self._source = ClipSource(options, device)
        self._encoder = ClipEncoder(
            self._source,
            EncoderOptions(
                variant=options.variant,
                project=options.project,
                short_side=options.short_side,
                batch_size=options.batch_size,
                gaussian_std=options.gaussian_std,
            ),
        )

    @property
    def digest(self) -> str:
        """Digest of the CLIP's files (`ClipSource.digest`)."""
        return self._source.digest

    @property
    def dim(self) -> int:
        """Channels `C` of a token; loads the model."""
        return self._encoder.dim

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """Return the token map of each image, `[H, W, 3]` uint8 RGB; errors are those of `ClipEncoder.encode`."""
        return self._encoder.encode(images)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return L2-normalised features of texts, `[N, D]` float32; comparable with tokens of `project=true`."""
        return self._source.text_features(prompts)


def make_resampling_weights(
    cells: int, step: float, source_cells: int, source_step: float, device: torch.device
) -> Tensor:
    """Return `[cells, source_cells]` bilinear weights between two rows of patches that start at the same border.

    Args:
        cells, step: number and length of the target's patches, in pixels.
        source_cells, source_step: number and length of the source's; beyond its outermost centres the border is
            repeated.
        device: where the weights are put.
    """
    centres = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (step / source_step) - 0.5
    distance = centres.clamp(0, source_cells - 1)[:, None] - torch.arange(source_cells, device=device)
    return (1 - distance.abs()).clamp(min=0)
