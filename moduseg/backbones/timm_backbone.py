"""Patch tokens from any timm vision transformer, or from a timm CNN's last feature map."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.backbones.base import Backbone
from moduseg.backbones.facets import attention_width, check_facet, query_plus_key
from moduseg.backbones.inputs import to_input
from moduseg.backbones.positions import check_positions, resampled_positions
from moduseg.backbones.timm_model import (
    build_model,
    check_layers,
    cnn_map,
    is_transformer,
    load_weights,
    measure_grid,
    patch_side,
    resample_to_patches,
)
from moduseg.backbones.timm_published import hub_alternative, published_file
from moduseg.backbones.windows import over_windows
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError
from moduseg.files import file_digest
from moduseg.structures import TokenMap
from moduseg.weights.sources import find_weights

KEY = "backbone.weights"


class TimmBackbone(Backbone):
    """Tokens of a timm model: a ViT's patch tokens after the final norm, or a CNN's map at patch centres.

    Args:
        model: timm's name of the model (`vit_base_patch14_dinov2`, `mobilenetv2_100`).
        device: where the model runs and in which precision; tokens are float32 there.
        weights: a path (`~` and `$VARIABLE` are expanded when the file is first needed), `miniature/<file>` for one
            that the package carries, an address (`moduseg.weights.sources.find_weights`), `hub` for timm's published
            weights, or `random`.
        model_kwargs: more arguments for `timm.create_model` (`{img_size: 128, patch_size: 8}`).
        mean, std: of the RGB channels in [0, 1]; those of the model's `pretrained_cfg` where left out.
        revision: branch, tag or commit of the hub's repository, for `hub`.
        layer: block of a ViT whose output is taken, counted from 0 or, negative, from the end; the final norm follows.
            Of a CNN, the stage (of timm's `feature_info`, from 0) whose map is taken; -1 is the map behind them all.
        layers: several blocks instead, in this order: each one's tokens go through the final norm, are brought to
            length 1, so that all count alike in a cosine, and are put side by side.
        facet: `tokens`, the output of the blocks; or `qk`, the sum of query and key in their attention, the heads side
            by side, brought to length 1 (METHOD, CorrCLIP: affinities of a DINO ViT).
        output_stride: of a CNN, in pixels; its own (mostly 32) where left out.
        short_side: the image is resized until its short side has this many pixels; native size where left out.
        antialias: of learned positions where they are brought to another grid than the trained one: `False` as DINO and
            DINOv2 without registers are published; timm's way where left out. See `moduseg.backbones.positions`.
        window: side in pixels of the windows that a larger image is seen through, a multiple of the patch; the whole
            image at once where left out. A window is an image of its own to the model; a patch in several windows has
            the mean of its tokens (before they are brought to length 1).
        stride: step of the windows in pixels, a multiple of the patch; about half a window where left out. The last
            window of a row or column ends with the padded image.
        batch_size: images of one padded size, or windows of them, that share a forward pass.
        seed: of `random` weights.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        model: str,
        device: Device,
        weights: str = "random",
        model_kwargs: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        layer: int = -1,
        output_stride: int | None = None,
        short_side: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        revision: str | None = None,
        layers: list[int] | None = None,
        facet: Literal["tokens", "qk"] = "tokens",
        antialias: bool | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        if not weights:
            raise ValueError("weights: got an empty text, expected a path, hub or random; try weights=random")
        for name, value in (("output_stride", output_stride), ("short_side", short_side), ("batch_size", batch_size),
                            ("window", window), ("stride", stride)):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if facet not in ("tokens", "qk"):
            raise ValueError(f"facet: got {facet!r}, expected tokens or qk; try tokens")
        if stride is not None and (window is None or stride > window):
            raise ValueError(f"stride: got {stride}, expected 1 to the window's {window} pixels; leave it out")
        if layers is not None and (not layers or layer != -1):
            raise ValueError(
                f"layers: got {layers} beside layer={layer}, expected one block or more, and no layer; "
                f"try layers={[*layers, layer]}"
            )
        if std is not None and min(std) <= 0:
            raise ValueError(f"std: got {std}, expected numbers above 0; try 0.5 for each channel")
        self._name, self._device, self._weights, self._seed = model, device, weights, seed
        self._kwargs, self._mean, self._std = dict(model_kwargs or {}), mean, std
        self._layers, self._facet, self._output_stride = layers or [layer], facet, output_stride
        self._short_side, self._batch_size = short_side, batch_size
        self._revision, self._window, self._step = revision, window, stride
        self._antialias = antialias

    @property
    def digest(self) -> str:
        """sha256 of the weight file, fetched where need be; or `random-<seed>`.

        Raises:
            MissingError: there is no such file, and none can be fetched.
            ConfigError: timm has no such model, or no published weights for it.
        """
        if self._weights == "random":
            return f"random-{self._seed}"
        return file_digest(self._path())

    @property
    def dim(self) -> int:
        """Channels `C` of a token; builds the model."""
        model = self._model
        if not is_transformer(model) and self._blocks:
            return int(model.feature_info[self._blocks[0]]["num_chs"])
        width = attention_width(model.blocks[self._blocks[0]]) if self._facet == "qk" else model.num_features
        return int(width or 0) * len(self._layers)

    @property
    def stride(self) -> int:
        """Side of a patch, in pixels of the input; builds the model."""
        return self._grid[0]

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        """See `Backbone.tokens`; each map is `[ceil(H' / stride), ceil(W' / stride), C]` for an input of `H' x W'`.

        Raises:
            DataError: an array that is not `[H, W, 3]` uint8 with at least one pixel.
            MissingError: the weights are not there.
            ArtefactError: the weights are of another model.
        """
        inputs = [to_input(image, self._short_side, self._device.torch_device) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, tensor in enumerate(inputs):
            height, width = (-(-side // self.stride) * self.stride for side in tensor.shape[1:])
            groups.setdefault((height, width), []).append(index)
        maps: dict[int, TokenMap] = {}
        for padded, members in groups.items():
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                for index, grid in zip(batch, self._forward([inputs[i] for i in batch], padded), strict=True):
                    height, width = inputs[index].shape[1:]
                    # Cloned outside inference mode: an ordinary tensor that keeps the batch out of memory.
                    maps[index] = TokenMap(grid.clone(), self.stride, images[index].shape[:2], (height, width))
        return [maps[index] for index in range(len(images))]

    def _path(self) -> Path:
        if self._weights == "hub":
            return published_file(self._name, self._revision, KEY)
        text = os.path.expandvars(self._weights)
        if unset := re.search(r"\$\{?(\w+)", text):
            raise MissingError(
                f"{KEY}: got {self._weights!r}, but the environment variable {unset[1]} is not set; set it to the path "
                f"of the weights of {self._name}, or give the path: {KEY}=<path>{hub_alternative(self._name, KEY)}"
            )
        return find_weights(text, KEY)

    @cached_property
    def _model(self) -> Any:
        path = None if self._weights == "random" else self._path()
        model = build_model(self._name, self._kwargs, self._output_stride, self._seed)
        blocks = check_layers(model, self._layers, self._name)
        if self._facet == "qk":
            check_facet(model, blocks, self._name)
        if self._antialias is not None:
            check_positions(model, self._name)
        if path is not None:
            load_weights(model, path)
        model = model.eval().requires_grad_(False).to(self._device.torch_device)
        # Convolutions are faster with channels innermost: MobileNetV2 by 1.4, ResNet-50 by 1.1 on a CPU.
        return model if is_transformer(model) else model.to(memory_format=torch.channels_last)

    @cached_property
    def _grid(self) -> tuple[int, float]:
        """Stride in pixels, and where the first cell's centre lies (a patch's: `stride / 2`)."""
        if is_transformer(self._model):
            stride = patch_side(self._model)
            return stride, stride / 2
        return measure_grid(self._model, self._name, self._blocks)

    @cached_property
    def _blocks(self) -> tuple[int, ...]:
        """The ViT's blocks that are taken, counted from 0."""
        return check_layers(self._model, self._layers, self._name)

    @cached_property
    def _windows(self) -> tuple[int, int] | None:
        """Side and step of the windows in patches."""
        if self._window is None:
            return None
        step = self._step if self._step is not None else max(self._window // 2 // self.stride, 1) * self.stride
        for name, pixels in (("window", self._window), ("stride", step)):
            if pixels % self.stride:
                raise ConfigError(
                    f"backbone.{name}: got {pixels}, expected a multiple of the patch of {self.stride} pixels, so that "
                    f"windows begin where patches do; try {-(-pixels // self.stride) * self.stride}"
                )
        return self._window // self.stride, step // self.stride

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        published = getattr(self._model, "pretrained_cfg", None) or {}
        device = self._device.torch_device
        mean, std = (
            torch.tensor(chosen or published.get(name) or (0.5, 0.5, 0.5), dtype=torch.float32, device=device)
            for name, chosen in (("mean", self._mean), ("std", self._std))
        )
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    @torch.inference_mode()
    def _forward(self, inputs: Sequence[Tensor], padded: tuple[int, int]) -> Tensor:
        """`[B, h, w, C]` float32 from inputs that share one padded size."""
        batch = torch.zeros(len(inputs), 3, *padded, device=self._device.torch_device)
        for row, tensor in zip(batch, inputs, strict=True):
            row[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        mean, std = self._normalisation
        batch = (batch - mean) / std
        if self._windows is None:
            features = self._features(batch)
        else:
            features = over_windows(batch, self.stride, *self._windows, self._batch_size, self._features)
        if self._facet == "qk" or len(self._layers) > 1:
            features = F.normalize(features.unflatten(3, (len(self._layers), -1)), dim=-1).flatten(3)
        return features

    def _features(self, batch: Tensor) -> Tensor:
        """`[B, h, w, C]` float32 of normalised inputs of one size, in one pass; several layers side by side."""
        model = self._model
        grid = (batch.shape[2] // self.stride, batch.shape[3] // self.stride)
        own = self._antialias is not None
        positions = resampled_positions(model, grid, bool(self._antialias)) if own else nullcontext()
        with self._device.autocast(), positions:
            if not is_transformer(model):
                features = cnn_map(model, batch, self._blocks)
            else:
                features = self._queries_and_keys(batch) if self._facet == "qk" else self._outputs(batch)
        features = features.float()
        if not is_transformer(model):
            features = resample_to_patches(features, *self._grid).permute(0, 2, 3, 1)
        return features

    def _outputs(self, batch: Tensor) -> Tensor:
        """A ViT's block outputs after the final norm, `[B, h, w, C]`."""
        model = self._model
        found = model.forward_intermediates(
            batch, indices=list(self._blocks), norm=True, stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
        # They come in the order of the blocks.
        by_block = dict(zip(sorted(self._blocks), found, strict=True))
        outputs = [by_block[block].permute(0, 2, 3, 1) for block in self._blocks]
        if isinstance(model.norm, nn.Identity) and isinstance(getattr(model, "fc_norm", None), nn.Module):
            # Models that pool by the mean keep their final norm behind the pooling.
            outputs = [model.fc_norm(output) for output in outputs]
        return torch.cat(outputs, dim=-1)

    def _queries_and_keys(self, batch: Tensor) -> Tensor:
        """Query plus key of each patch in a ViT's blocks, `[B, h, w, C]`."""
        model = self._model
        entered: dict[int, Tensor] = {}
        hooks = [
            model.blocks[block].attn.register_forward_pre_hook(
                lambda _, arguments, block=block: entered.__setitem__(block, arguments[0])
            )
            for block in self._blocks
        ]
        try:
            model.forward_intermediates(batch, indices=list(self._blocks), stop_early=True, intermediates_only=True)
        finally:
            for hook in hooks:
                hook.remove()
        sums = [query_plus_key(model.blocks[b].attn, entered[b])[:, model.num_prefix_tokens :] for b in self._blocks]
        return torch.cat(sums, dim=-1).unflatten(1, (batch.shape[2] // self.stride, batch.shape[3] // self.stride))
