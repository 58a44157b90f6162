"""Patch tokens from any timm vision transformer, or from a timm CNN's last feature map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.backbones.base import Backbone
from moduseg.backbones.facets import check_facet, get_attention_width, sum_query_and_key
from moduseg.backbones.inputs import batch_equal, pad_and_stack, round_up, to_inputs
from moduseg.backbones.positions import check_positions, resample_positions
from moduseg.backbones.timm_model import (
    build_model,
    check_layers,
    get_patch_side,
    is_transformer,
    load_weights,
    measure_grid,
    resample_to_patches,
    run_blocks,
    run_cnn,
)
from moduseg.backbones.timm_published import find_timm_weights
from moduseg.backbones.windows import encode_windows
from moduseg.devices import Device, Precision
from moduseg.errors import ConfigError
from moduseg.files import file_digest
from moduseg.structures import TokenMap

KEY = "backbone.weights"


@dataclass(frozen=True)
class TimmOptions:
    """Settings of a timm backbone: which model, what is taken from it, and how images enter it.

    Attributes:
        model: timm's name of the model (`vit_base_patch14_dinov2`, `mobilenetv2_100`).
        weights: a path (`~` and `$VARIABLE` are expanded when the file is first needed), `miniature/<file>` for one
            that the package carries, an address (`moduseg.weights.sources.find_weights`), `hub` for timm's published
            weights, or `random`.
        model_kwargs: more arguments for `timm.create_model` (`{img_size: 128, patch_size: 8}`).
        mean, std: of the RGB channels in [0, 1]; those of the model's `pretrained_cfg` if omitted.
        layer: block of a ViT whose output is taken, counted from 0 or, negative, from the end; the final norm follows.
            Of a CNN, the stage (of timm's `feature_info`, from 0) whose map is taken; -1 is the map after all stages.
        layers: several blocks instead, in this order: each one's tokens go through the final norm, are scaled to
            length 1, so that all count alike in a cosine, and are concatenated.
        facet: `tokens`, the output of the blocks; or `qk`, the sum of query and key in their attention, the heads
            concatenated, scaled to length 1 (affinities of a DINO ViT: docs/method.md, section CorrCLIP).
        output_stride: of a CNN, in pixels; its own (mostly 32) if omitted.
        short_side: the image is resized until its short side has this many pixels; native size if omitted.
        antialias: of learned positions where they are resampled to another grid than the trained one: `False` as DINO
            and DINOv2 without registers are published; timm's way if omitted (`moduseg.backbones.positions`).
        window: side in pixels of the windows into which a larger image is cut, a multiple of the patch; the full image
            at once if omitted. The model sees each window as an image; a patch in several windows has the mean of its
            tokens (before they are scaled to length 1).
        stride: step of the windows in pixels, a multiple of the patch; about half a window if omitted. The last window
            of a row or column ends with the padded image.
        batch_size: images of one padded size, or windows of them, that share a forward pass.
        seed: of `random` weights.
        revision: branch, tag or commit of the hub's repository, for `hub`.
        precision: of the forward passes on a CUDA device; the run's if omitted.

    Raises:
        ValueError: a number out of range.
    """

    model: str
    weights: str = "random"
    model_kwargs: dict[str, Any] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    layer: int = -1
    output_stride: int | None = None
    short_side: int | None = None
    batch_size: int = 8
    seed: int = 0
    revision: str | None = None
    layers: list[int] | None = None
    facet: Literal["tokens", "qk"] = "tokens"
    antialias: bool | None = None
    window: int | None = None
    stride: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: got an empty text, expected a path, hub or random; try weights=random")
        for name in ("output_stride", "short_side", "batch_size", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if self.facet not in ("tokens", "qk"):
            raise ValueError(f"facet: got {self.facet!r}, expected tokens or qk; try tokens")
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError(
                f"stride: got {self.stride}, expected 1 to the window's {self.window} pixels; leave it out"
            )
        if self.layers is not None and (not self.layers or self.layer != -1):
            raise ValueError(
                f"layers: got {self.layers} beside layer={self.layer}, expected one block or more, and no layer; "
                f"try layers={[*self.layers, self.layer]}"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}, expected numbers above 0; try 0.5 for each channel")


class TimmBackbone(Backbone):
    """Tokens of a timm model: a ViT's patch tokens after the final norm, or a CNN's map at patch centres.

    Args:
        options: the model and how it is run; it is loaded on first use.
        device: where the model runs and in which precision; tokens are float32 there.
    """

    def __init__(self, options: TimmOptions, device: Device) -> None:
        self._options, self._device = options, device.with_precision(options.precision)
        self._layers = options.layers or [options.layer]

    @property
    def digest(self) -> str:
        """sha256 of the weight file, fetched if needed; or `random-<seed>`.

        Raises:
            MissingError: there is no such file, and none can be fetched.
            ConfigError: timm has no such model, or no published weights for it.
        """
        if self._options.weights == "random":
            return f"random-{self._options.seed}"
        return file_digest(self._weights_path)

    @property
    def dim(self) -> int:
        """Channels `C` of a token; builds the model."""
        model = self._model
        if not is_transformer(model) and self._blocks:
            return int(model.feature_info[self._blocks[0]]["num_chs"])
        width = (
            get_attention_width(model.blocks[self._blocks[0]]) if self._options.facet == "qk" else model.num_features
        )
        return int(width or 0) * len(self._layers)

    @property
    def stride(self) -> int:
        """Side of a patch, in pixels of the input; builds the model."""
        return self._grid[0]

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """Return the token map of each image, `[ceil(H' / stride), ceil(W' / stride), C]` for an input of `H' x W'`.

        Args:
            images: `[H, W, 3]` uint8 RGB each, of any sizes (`Backbone.tokens`).

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            MissingError: the weights are not there.
            ArtefactError: the weights are of another model.
        """
        inputs = to_inputs(images, self._options.short_side, self._device.torch_device, stride=self.stride)
        sizes = [round_up(tensor.shape[1:], self.stride) for tensor in inputs]
        maps: dict[int, TokenMap] = {}
        for size, members in batch_equal(sizes, self._options.batch_size):
            for index, grid in zip(members, self._forward([inputs[i] for i in members], size), strict=True):
                height, width = inputs[index].shape[1:]
                # Cloned outside inference mode: an ordinary tensor that keeps the batch out of memory.
                maps[index] = TokenMap(grid.clone(), self.stride, images[index].shape[:2], (height, width))
        return [maps[index] for index in range(len(images))]

    @cached_property
    def _weights_path(self) -> Path:
        """The path of the weight file, fetched if needed."""
        return find_timm_weights(self._options.model, self._options.weights, self._options.revision, KEY)

    @cached_property
    def _model(self) -> Any:
        options, name = self._options, self._options.model
        path = None if options.weights == "random" else self._weights_path
        model = build_model(name, options.model_kwargs or {}, options.output_stride, options.seed)
        blocks = check_layers(model, self._layers, name)
        if options.facet == "qk":
            check_facet(model, blocks, name)
        if options.antialias is not None:
            check_positions(model, name)
        if path is not None:
            load_weights(model, path)
        model = model.eval().requires_grad_(False).to(self._device.torch_device)
        # Convolutions are faster with channels innermost: MobileNetV2 by 1.4, ResNet-50 by 1.1 on a CPU.
        return model if is_transformer(model) else model.to(memory_format=torch.channels_last)

    @cached_property
    def _grid(self) -> tuple[int, float]:
        """Stride in pixels, and where the first cell's centre lies (a patch's: `stride / 2`)."""
        if is_transformer(self._model):
            stride = get_patch_side(self._model)
            return stride, stride / 2
        return measure_grid(self._model, self._options.model, self._blocks)

    @cached_property
    def _blocks(self) -> tuple[int, ...]:
        """The ViT's blocks that are taken, counted from 0; of a CNN, its stage, or none for the last map."""
        return check_layers(self._model, self._layers, self._options.model)

    @cached_property
    def _windows(self) -> tuple[int, int] | None:
        """Side and step of the windows in patches; `None` without windows."""
        window, step = self._options.window, self._options.stride
        if window is None:
            return None
        if step is None:
            step = max(window // 2 // self.stride, 1) * self.stride
        for name, pixels in (("window", window), ("stride", step)):
            if pixels % self.stride:
                raise ConfigError(
                    f"backbone.{name}: got {pixels}, expected a multiple of the patch of {self.stride} pixels, so that "
                    f"windows begin where patches do; try {-(-pixels // self.stride) * self.stride}"
                )
        return window // self.stride, step // self.stride

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of inputs in [0, 1], `[3, 1, 1]` each."""
        published = getattr(self._model, "pretrained_cfg", None) or {}
        device = self._device.torch_device
        mean, std = (
            torch.tensor(option or published.get(name) or (0.5, 0.5, 0.5), dtype=torch.float32, device=device)
            for name, option in (("mean", self._options.mean), ("std", self._options.std))
        )
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    @torch.inference_mode()
    def _forward(self, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the tokens `[B, h, w, C]` float32 of inputs that share the padded `size`."""
        mean, std = self._normalisation
        batch = (pad_and_stack(inputs, size) - mean) / std
        if self._windows is None:
            features = self._encode(batch)
        else:
            window, step = self._windows
            features = encode_windows(
                batch, self._encode, patch=self.stride, window=window, step=step, batch_size=self._options.batch_size
            )
        if self._options.facet == "qk" or len(self._layers) > 1:
            features = F.normalize(features.unflatten(3, (len(self._layers), -1)), dim=-1).flatten(3)
        return features

    def _encode(self, batch: Tensor) -> Tensor:
        """Return the features `[B, h, w, C]` float32 of normalised inputs in one pass, several layers concatenated."""
        model, antialias = self._model, self._options.antialias
        grid = (batch.shape[2] // self.stride, batch.shape[3] // self.stride)
        positions = nullcontext() if antialias is None else resample_positions(model, grid, antialias)
        with self._device.autocast(), positions:
            if not is_transformer(model):
                features = run_cnn(model, batch, self._blocks)
            elif self._options.facet == "qk":
                features = self._sum_queries_and_keys(batch)
            else:
                features = run_blocks(model, batch, self._blocks)
        features = features.float()
        if not is_transformer(model):
            features = resample_to_patches(features, *self._grid).permute(0, 2, 3, 1)
        return features

    def make_exportable(self) -> nn.Module:
        """Return a module from images `[B, 3, H, W]` in [0, 1], sides multiples of the patch, to tokens `[B, h, w, C]`.

        It takes images at the size at which the backbone sees them: a `short_side` is not applied.

        Raises:
            ConfigError: tokens of windows, of `qk`, or of several layers.
        """
        options = self._options
        if (
            options.window is not None
            or options.facet == "qk"
            or len(self._layers) > 1
            or options.antialias is not None
        ):
            raise ConfigError(
                "backbone: got windows, facet=qk, several layers or antialias, expected the tokens of one layer of the "
                "whole image for an export; leave these out"
            )
        return _ExportedTimm(self._model, self._normalisation, self._blocks, self._grid)

    def _sum_queries_and_keys(self, batch: Tensor) -> Tensor:
        """Return query plus key of each patch in a ViT's blocks, `[B, h, w, C]`."""
        model = self._model
        inputs_by_block: dict[int, Tensor] = {}
        hooks = [
            model.blocks[block].attn.register_forward_pre_hook(
                lambda _, arguments, block=block: inputs_by_block.__setitem__(block, arguments[0])
            )
            for block in self._blocks
        ]
        try:
            model.forward_intermediates(batch, indices=list(self._blocks), stop_early=True, intermediates_only=True)
        finally:
            for hook in hooks:
                hook.remove()
        sums = [
            sum_query_and_key(model.blocks[block].attn, inputs_by_block[block])[:, model.num_prefix_tokens :]
            for block in self._blocks
        ]
        return torch.cat(sums, dim=-1).unflatten(1, (batch.shape[2] // self.stride, batch.shape[3] // self.stride))


class _ExportedTimm(nn.Module):
    """A timm model as `TimmBackbone` runs it, without what only a run needs.

    Args:
        model: of timm.
        normalisation: mean and deviation of inputs, `[3, 1, 1]` each.
        blocks: the block that is taken; of a CNN, its stage, or none for the last map.
        grid: stride, and where the first cell's centre lies, in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, normalisation: tuple[Tensor, Tensor], blocks: tuple[int, ...], grid: tuple[int, float]
    ) -> None:
        super().__init__()
        self.model, self._blocks, self._grid = model, blocks, grid
        self.register_buffer("mean", normalisation[0])
        self.register_buffer("std", normalisation[1])

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens `[B, h, w, C]`."""
        batch = (images - self.mean) / self.std
        if is_transformer(self.model):
            return run_blocks(self.model, batch, self._blocks)
        return resample_to_patches(run_cnn(self.model, batch, self._blocks), *self._grid).permute(0, 2, 3, 1)
