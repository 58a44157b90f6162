"""The contract of a student: a network that is trained on label maps and needs no bank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Tensors of one training step by name; their first dimension is the same."""


@dataclass(frozen=True)
class LabelledImage:
    """One training image with what the student is to learn.

    Attributes:
        image: `[H, W, 3]` uint8 RGB.
        label_map: `[H, W]` uint8 class ids, 255 is not learnt from.
        weights: `[H, W]` uint8, how much each pixel counts (255 fully); `None` if all count alike.
    """

    image: np.ndarray
    label_map: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        for name, array in (("label map", self.label_map), ("weights", self.weights)):
            if array is not None and array.shape != size:
                raise ValueError(f"training image: got a {name} of {array.shape}, expected {size} like the image")


@dataclass(frozen=True)
class Studied:
    """What a student computes once of a training image.

    Attributes:
        content: the image itself, or what its student makes of it.
        num_bytes: memory that it takes.
    """

    content: Any
    num_bytes: int


@dataclass(frozen=True)
class Outputs:
    """What the network's channels stand for.

    Attributes:
        classes: names by class id, background first.
        has_background: whether id 0 is a class; else the channels begin with id 1, and 0 is not learnt from.
    """

    classes: tuple[str, ...]
    has_background: bool = True

    @property
    def first_id(self) -> int:
        """The class id of the first channel."""
        return 0 if self.has_background else 1

    @property
    def count(self) -> int:
        """Number of channels `K`."""
        return len(self.classes) - self.first_id


class Student(ABC):
    """A network and how it is trained and asked; the network is built on first use.

    Args (of the subclasses): `options`, what the program supplies (`device`, `backbone`), and `outputs`.
    """

    outputs: Outputs

    @property
    @abstractmethod
    def digest(self) -> str:
        """Digest of the weights that training starts from, and of frozen ones; known without loading a model."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The trained part, on the device; its state dict is what is stored."""

    def prepare(self, images: Sequence[LabelledImage]) -> None:
        """Look at a few training images before the first step, for constants of the network; nothing by default."""
        return

    def study(self, item: LabelledImage) -> Studied:
        """Return what is computed once of a training image, and how many bytes of memory that takes.

        `make_example` gets it each time that the image comes, if there was room to keep it, else computed anew.
        """
        arrays = (item.image, item.label_map, *(() if item.weights is None else (item.weights,)))
        return Studied(item, sum(array.nbytes for array in arrays))

    @abstractmethod
    def make_example(self, studied: Studied, rng: np.random.Generator) -> Batch:
        """Return what one image gives to a training step, on the CPU; random choices are taken from `rng`."""

    @abstractmethod
    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Return the examples of one step as one batch, on the CPU."""

    @abstractmethod
    def compute_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar loss of a batch on the device.

        Args:
            network: `self.network`, or a wrapper of it that several processes share.
            batch: as `collate` returns it, on the network's device.
        """

    @abstractmethod
    def compute_probabilities(
        self, images: Sequence[np.ndarray], scales: Sequence[float] = (1.0,), *, mirror: bool = False
    ) -> list[Tensor]:
        """Return the probability of each channel at every pixel.

        Args:
            images: `[H, W, 3]` uint8 RGB each, of any sizes.
            scales: sizes at which each image is looked at, as factors of its own; their mean counts.
            mirror: whether the mirror image is looked at as well.

        Returns:
            `[K, H, W]` float32 on the device, one for each image.
        """

    takes_any_size: ClassVar[bool] = True
    """Whether an exported file takes pictures of any size, or of the one that it was made for."""

    def make_exportable(self, size: tuple[int, int]) -> nn.Module:
        """Return a module from images `[B, 3, H, W]` in [0, 1] to logits `[B, K, H, W]`, on the CPU, for an export.

        Args:
            size: `(height, width)` of the pictures, where the module takes one size.

        Raises:
            ConfigError: it cannot be written as one graph.
        """
        return self.network

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """Beginnings of names of parameters and factors on their learning rate; see `moduseg.training.loop.Extras`."""
        return {}

    def describe(self) -> Mapping[str, int]:
        """Return numbers of trained and of frozen parameters."""
        trained = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.network.parameters())
        return {"trained_parameters": trained, "frozen_parameters": total - trained}


def to_label_map(probabilities: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return the best class of every pixel, and how sure the student is.

    Args:
        probabilities: `[K, H, W]` float.
        outputs: what the channels stand for.

    Returns:
        `[H, W]` uint8 class ids, a tie goes to the smaller id, and `[H, W]` uint8, 255 for a probability of 1.
    """
    best = probabilities.max(0)
    confidence = (best.values.clamp(0, 1) * 255).round().to(torch.uint8)
    return (best.indices + outputs.first_id).to(torch.uint8), confidence


def to_targets(label_map: np.ndarray, outputs: Outputs) -> np.ndarray:
    """Return class ids as channels: `[H, W]` int64, 255 where nothing is learnt.

    Raises:
        ValueError: an id that is no class.
    """
    targets = label_map.astype(np.int64)
    wrong = np.unique(targets[(targets != 255) & (targets >= len(outputs.classes))])
    if len(wrong):
        raise ValueError(f"label map: got class id {wrong[0]}, expected 0..{len(outputs.classes) - 1} or 255")
    is_learnt = (targets != 255) & (targets >= outputs.first_id)
    return np.where(is_learnt, targets - outputs.first_id, 255)
