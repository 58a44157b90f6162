"""Students that see images: any trunk inside a `SegmentationNetwork`, trained on random squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.devices import Device, copy_arrays
from moduseg.structures import IGNORE_INDEX
from moduseg.students.augmentation import Augmentation, crop_randomly
from moduseg.students.base import Batch, Outputs, Student, Studied, to_targets
from moduseg.students.network import SegmentationNetwork
from moduseg.training.processes import average_over_processes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings of every student that sees images.

    Attributes:
        augmentation: how training images are varied.
        trunk_rate: factor on the learning rate of the trunk, for one that starts from trained weights; above 0.

    Raises:
        ValueError: a number out of range.
    """

    augmentation: Augmentation = field(default_factory=Augmentation)
    trunk_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.trunk_rate <= 1:
            raise ValueError(
                f"trunk_rate: got {self.trunk_rate}, expected above 0 to 1; 0.1 is usual for a trained trunk"
            )


class ImageStudent(Student):
    """What all students that see images have in common.

    Args:
        outputs: what the channels stand for.
        device: where the network is.
        settings: how training images are varied, and how fast the trunk learns.
    """

    trunk_name: ClassVar[str]
    """Beginning of the names of the trunk's parameters."""

    def __init__(self, outputs: Outputs, device: Device, settings: ImageSettings) -> None:
        self.outputs, self._device = outputs, device
        self._augmentation, self._trunk_rate = settings.augmentation, settings.trunk_rate

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """The factor on the learning rate of the trunk."""
        return {} if self._trunk_rate == 1 else {self.trunk_name: self._trunk_rate}

    @abstractmethod
    def build_network(self) -> SegmentationNetwork:
        """Return the network on the CPU, with the weights that training starts from."""

    @cached_property
    def network(self) -> nn.Module:
        """The network on the device, channels innermost, with which convolutions are faster."""
        network = self.build_network().to(self._device.torch_device)
        return network.to(memory_format=torch.channels_last)

    def make_example(self, studied: Studied, rng: np.random.Generator) -> Batch:
        """Return a random square: `image` `[S, S, 3]` uint8, `targets` `[S, S]` uint8, `weights` if there are any."""
        square = crop_randomly(studied.content, self._augmentation, rng)
        example = {
            "image": torch.from_numpy(square.image),
            "targets": torch.from_numpy(to_targets(square.label_map, self.outputs).astype(np.uint8)),
        }
        if square.weights is not None:
            example["weights"] = torch.from_numpy(square.weights)
        return example

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Return the squares stacked."""
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def compute_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of all pixels whose target is not 255, weighted if the batch has weights."""
        images = batch["image"].permute(0, 3, 1, 2).float() / 255
        logits = network(images.contiguous(memory_format=torch.channels_last)).float()
        weights = batch["weights"].float() / 255 if "weights" in batch else None
        return weighted_cross_entropy(logits, batch["targets"].long(), weights)

    @torch.inference_mode()
    def compute_probabilities(
        self, images: Sequence[np.ndarray], scales: Sequence[float] = (1.0,), *, mirror: bool = False
    ) -> list[Tensor]:
        """Return `[K, H, W]` float32 of each image; images pass one by one, since they differ in size."""
        self.network.eval()
        tensors = copy_arrays(list(images), self._device.torch_device)
        return [self._look(tensor.permute(2, 0, 1).float()[None] / 255, scales, mirror) for tensor in tensors]

    def _look(self, image: Tensor, scales: Sequence[float], mirror: bool) -> Tensor:
        """Return the mean of the probabilities at all scales and sides, `[K, H, W]`."""
        size = image.shape[-2:]
        total: Tensor | None = None
        for scale in scales:
            scaled = image
            if scale != 1.0:
                new_size = [max(1, round(side * scale)) for side in size]
                scaled = F.interpolate(image, size=new_size, mode="bilinear", align_corners=False, antialias=scale < 1)
            for is_mirrored in (False, True) if mirror else (False,):
                view = (scaled.flip(-1) if is_mirrored else scaled).contiguous(memory_format=torch.channels_last)
                with self._device.autocast():
                    logits = self.network(view)
                logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
                seen = (logits.flip(-1) if is_mirrored else logits)[0].softmax(0)
                total = seen if total is None else total + seen
        if total is None:
            raise ValueError("scales: got none, expected one or more; try 1")
        return total / (len(scales) * (2 if mirror else 1))


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of the pixels that are learnt from, over all processes that train together.

    Args:
        logits: `[B, K, H, W]` float.
        targets: `[B, H, W]` int64, channels; 255 is not learnt from.
        weights: `[B, H, W]` float, how much each pixel counts; all alike if `None`.

    Returns:
        A scalar; 0, with a gradient of 0, where no pixel counts.
    """
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    counts = (targets != IGNORE_INDEX).to(losses.dtype)
    if weights is not None:
        counts = counts * weights
    return (losses * counts).sum() / average_over_processes(counts.sum()).clamp(min=1e-6)
