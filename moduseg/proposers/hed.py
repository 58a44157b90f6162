"""HED: how likely a contour runs through each pixel (Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015).

The convolutions of VGG16 in five blocks; a side output looks at the end of each block, and a fusion layer weighs the
five. Weights come as Keras writes them, with names such as `block1/layers/conv2d_1/vars/0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.devices import Device, copy_arrays, seed_weights
from moduseg.errors import ArtefactError
from moduseg.files import file_digest
from moduseg.weights.sources import find_weights
from moduseg.weights.tensors import load_state

KEY = "proposer.weights"
MEAN_BGR = (104.00699, 116.66877, 122.67892)
"""Subtracted from the channels in [0, 255], in the order blue, green, red."""
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each block."""


class Hed(nn.Module):
    """The network, from pixels to logits of contours."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.sides = nn.ModuleList()
        channels = 3
        for widths in BLOCKS:
            block = nn.ModuleList()
            for width in widths:
                block.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                channels = width
            self.blocks.append(block)
            self.sides.append(nn.Conv2d(channels, 1, kernel_size=1))
        self.fusion = nn.Conv2d(len(BLOCKS), 1, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the five side outputs and, last, of their fusion.

        Args:
            images: `[B, 3, H, W]` float, blue, green, red less `MEAN_BGR`; any size from one pixel on.

        Returns:
            `[B, 6, H, W]` float32.
        """
        size = images.shape[-2:]
        features, logits = images, []
        for index, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if index:
                # Rounded up, a last odd row or column is pooled alone: Keras' padding "same".
                features = F.max_pool2d(features, kernel_size=2, stride=2, ceil_mode=True)
            for convolution in block:  # type: ignore[attr-defined]  # a ModuleList
                features = F.relu(convolution(features), inplace=True)
            logits.append(F.interpolate(side(features).float(), size, mode="bilinear", align_corners=False))
        sides = torch.cat(logits, dim=1)
        return torch.cat((sides, self.fusion(sides).float()), dim=1)


def name_keras_tensors() -> dict[str, str]:
    """Return the name of each tensor of `Hed` in a weight file of Keras, by our name.

    A group of layers numbers them by kind (`conv2d`, `conv2d_1`, ...), and `vars/0` and `vars/1` are kernel and bias.
    """
    layers: dict[str, str] = {}
    for i, widths in enumerate(BLOCKS):
        for j in range(len(widths)):
            layers[f"blocks.{i}.{j}"] = f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}"
        layers[f"sides.{i}"] = f"dsn{i + 1}"
    layers["fusion"] = "fuse"
    return {
        f"{ours}.{kind}": f"{theirs}/vars/{number}"
        for ours, theirs in layers.items()
        for number, kind in enumerate(("weight", "bias"))
    }


def convert_keras(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file of Keras as `Hed` names and orders them.

    Args:
        state: by Keras' names; kernels are `[height, width, input, output]`.
        source: the file, for the message.

    Raises:
        ArtefactError: a tensor is missing, left over or of another shape.
    """
    with torch.device("meta"):
        expected = Hed().state_dict()
    names = name_keras_tensors()
    converted = {
        name: state[keras].permute(3, 2, 0, 1).contiguous() if state[keras].ndim == 4 else state[keras]
        for name, keras in names.items()
        if keras in state
    }
    faults = {
        "missing": [keras for name, keras in names.items() if name not in converted],
        "unexpected": sorted(state.keys() - set(names.values())),
        "of another shape": [names[name] for name in converted if converted[name].shape != expected[name].shape],
    }
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in faults.items()
        if keys
    ]
    if parts:
        raise ArtefactError(f"{source}: not weights of HED as Keras names them: {'; '.join(parts)}; check {KEY}")
    return {name: tensor.float() for name, tensor in converted.items()}


class ContourDetector:
    """Runs HED on single images.

    Args:
        weights: what `moduseg.weights.sources.find_weights` takes, a file with Keras' names, or `random`.
        seed: of `random` weights.
        device: where the network runs, and in which precision.

    Raises:
        ValueError: empty `weights`.
    """

    def __init__(self, weights: str, seed: int, device: Device) -> None:
        if not weights:
            raise ValueError("weights: got an empty text, expected a path, an address or random; leave it out")
        self._weights, self._seed, self._device = weights, seed, device

    @property
    def digest(self) -> str:
        """The sha256 of the weight file, or `random-<seed>`.

        Raises:
            MissingError: there is no such file, and none can be fetched.
        """
        return f"random-{self._seed}" if self._weights == "random" else file_digest(find_weights(self._weights, KEY))

    @cached_property
    def model(self) -> Hed:
        """The network on its device.

        Raises:
            MissingError: there is no such weight file, and none can be fetched.
            ArtefactError: the file does not fit.
        """
        with seed_weights(self._seed):
            model = Hed()
        if self._weights != "random":
            path = find_weights(self._weights, KEY)
            model.load_state_dict(convert_keras(load_state(path), path))
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        return model.to(self._device.torch_device)

    @torch.no_grad()
    def detect(self, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Return the probability of a contour at each pixel.

        Args:
            image: `[H, W, 3]` uint8 RGB.
            size: `(h, w)` to which the image is resized first, each pixel the mean of those that it covers.

        Returns:
            `[6, h, w]` float32 on the device, in [0, 1]: the five side outputs, fine to coarse, and their fusion.
        """
        if image.shape[:2] != size:
            image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        pixels = copy_arrays([image[..., ::-1]], self._device.torch_device)[0]
        values = pixels.permute(2, 0, 1)[None].float()
        # One number at a time: a tensor of the three would be copied to the device for each image.
        values = torch.stack([values[:, i] - mean for i, mean in enumerate(MEAN_BGR)], dim=1)
        with self._device.autocast():
            logits = self.model(values.contiguous(memory_format=torch.channels_last))
        return logits[0].sigmoid()
