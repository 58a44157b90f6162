"""Patch tokens from any timm vision transformer, or from a timm CNN's last feature map."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moduseg.backbones.base import Backbone
from moduseg.backbones.inputs import to_input
from moduseg.backbones.timm_model import (
    build_model,
    check_layer,
    is_transformer,
    load_weights,
    measure_grid,
    patch_side,
    resample_to_patches,
)
from moduseg.backbones.timm_published import hub_alternative, published_file
from moduseg.errors import MissingError
from moduseg.runtime.devices import Device
from moduseg.runtime.weights import file_digest, find_weights
from moduseg.structures import TokenMap

KEY = "backbone.weights"


class TimmBackbone(Backbone):
    """Tokens of a timm model: a ViT's patch tokens after the final norm, or a CNN's map at patch centres.

    Args:
        model: timm's name of the model (`vit_base_patch14_dinov2`, `mobilenetv2_100`).
        device: where the model runs and in which precision; tokens are float32 there.
        weights: a path (`~` and `$VARIABLE` are expanded when the file is first needed), `miniature/<file>` for one
            that the package carries, an address (`moduseg.runtime.weights.find_weights`), `hub` for timm's published
            weights, or `random`.
        model_kwargs: more arguments for `timm.create_model` (`{img_size: 128, patch_size: 8}`).
        mean, std: of the RGB channels in [0, 1]; those of the model's `pretrained_cfg` where left out.
        revision: branch, tag or commit of the hub's weights; timm's main branch where left out.
        layer: block of a ViT whose output is taken, counted from 0 or, negative, from the end; the final norm follows.
        output_stride: of a CNN, in pixels; its own (mostly 32) where left out.
        short_side: the image is resized until its short side has this many pixels; native size where left out.
        batch_size: images of one padded size that share a forward pass.
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
    ) -> None:
        if not weights:
            raise ValueError("weights: got an empty text, expected a path, hub or random; try weights=random")
        for name, value in (("output_stride", output_stride), ("short_side", short_side), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std: got {std}, expected numbers above 0; try 0.5 for each channel")
        self._name, self._device, self._weights, self._seed = model, device, weights, seed
        self._kwargs, self._mean, self._std = dict(model_kwargs or {}), mean, std
        self._layer, self._output_stride = layer, output_stride
        self._short_side, self._batch_size = short_side, batch_size
        self._revision = revision

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
        return int(self._model.num_features)

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
        model = build_model(self._name, self._kwargs, self._output_stride, False, self._seed)
        check_layer(model, self._layer, self._name)
        if path is not None:
            load_weights(model, path)
        return model.eval().requires_grad_(False).to(self._device.torch_device)

    @cached_property
    def _grid(self) -> tuple[int, float]:
        """Stride in pixels, and where the first cell's centre lies (a patch's: `stride / 2`)."""
        if is_transformer(self._model):
            stride = patch_side(self._model)
            return stride, stride / 2
        return measure_grid(self._model, self._name)

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
        model = self._model
        with self._device.autocast():
            if is_transformer(model):
                features = model.forward_intermediates(batch, indices=[self._layer % len(model.blocks)], norm=True,
                                                       intermediates_only=True, output_fmt="NCHW")[0]  # fmt: skip
                if isinstance(model.norm, nn.Identity) and isinstance(getattr(model, "fc_norm", None), nn.Module):
                    # Models that pool by the mean keep their final norm behind the pooling.
                    features = model.fc_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                features = model.forward_features(batch)
        features = features.float()
        if not is_transformer(model):
            features = resample_to_patches(features, *self._grid)
        return features.permute(0, 2, 3, 1)
