"""Students that see a frozen backbone's patch tokens: a linear layer or a small perceptron, trained token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.backbones.base import Backbone
from moduseg.backbones.timm_backbone import TimmBackbone
from moduseg.backbones.upsample import upsample
from moduseg.devices import Device, seed_weights
from moduseg.errors import ConfigError
from moduseg.structures import IGNORE_INDEX, TokenMap
from moduseg.students.base import Batch, LabelledImage, Outputs, Student, Studied, to_targets
from moduseg.training.processes import average_over_processes

_MIN_STD = 1e-4
"""Channels that vary less are as good as constant and are not blown up."""


@dataclass(frozen=True)
class TokenOptions:
    """Settings of a student on tokens.

    Attributes:
        hidden: width of the hidden layers; none make the student linear.
        dropout: share of hidden units that is dropped in training.
        tokens_per_image: tokens of an image that a step sees at most, drawn anew each time.
        whitening: what is done to tokens first, with numbers measured on training images: `standard` brings each
            channel to mean 0 and deviation 1; `none` takes them as they are.
        seed: of the random weights.
    """

    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    tokens_per_image: int = 1024
    whitening: Literal["standard", "none"] = "standard"
    seed: int = 0

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden: got {list(self.hidden)}, expected widths of 1 or more; [] is a linear student")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1; 0 drops nothing")
        if self.tokens_per_image < 1:
            raise ValueError(f"tokens_per_image: got {self.tokens_per_image}, expected 1 or more; try 1024")


class TokenHead(nn.Module):
    """Tokens -> logits of each.

    Args:
        dim: channels of a token.
        num_channels: `K`.
        options: hidden layers and dropout.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, num_channels: int, options: TokenOptions) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        layers: list[nn.Module] = []
        width = dim
        for hidden in options.hidden:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(options.dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[..., K]` of tokens `[..., C]`."""
        return self.layers((tokens - self.mean) / self.std)


class _WholeNetwork(nn.Module):
    """Backbone and head as one module.

    Args:
        backbone: `[B, 3, H, W]` in [0, 1], whole patches -> `[B, h, w, C]`.
        head: tokens -> logits.
        stride: side of a patch in pixels.
    """

    def __init__(self, backbone: nn.Module, head: TokenHead, stride: int) -> None:
        super().__init__()
        self.backbone, self.head, self._stride = backbone, head, stride

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, K, H, W]`, bilinear between the centres of the patches."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self._stride, 0, -height % self._stride))
        logits = self.head(self.backbone(padded)).permute(0, 3, 1, 2)
        logits = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


class TokenStudent(Student):
    """A head on the tokens of a frozen backbone.

    A token's target is the share of each class among the pixels of its patch; pixels of 255 have no share, and a token
    counts by how much of its patch is learnt from.

    Args:
        options: the head.
        device: where the head is.
        backbone: gives the backbone, which is built on first use.
        outputs: what the channels stand for.
    """

    def __init__(
        self, options: TokenOptions, device: Device, backbone: Callable[[], Backbone], outputs: Outputs
    ) -> None:
        self._options, self._device, self._build_backbone, self.outputs = options, device, backbone, outputs

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._build_backbone()

    @property
    def digest(self) -> str:
        """Digest of the backbone's weights and seed of the head."""
        return f"{self.backbone.digest}+random-{self._options.seed}"

    @property
    def network(self) -> nn.Module:
        """The head on the device."""
        return self._head

    @cached_property
    def _head(self) -> TokenHead:
        # The backbone may draw weights from a seed of its own, and takes its turn before.
        dim = self.backbone.dim
        with seed_weights(self._options.seed):
            head = TokenHead(dim, self.outputs.count, self._options)
        return head.to(self._device.torch_device)

    def prepare(self, images: Sequence[LabelledImage]) -> None:
        """Measure mean and deviation of the channels on these images, if `whitening` asks for it."""
        if self._options.whitening == "none":
            return
        tokens = torch.cat([self._read_tokens(item.image).tokens.flatten(0, 1).double().cpu() for item in images])
        head = self._head
        head.mean.copy_(tokens.mean(0))
        head.std.copy_(tokens.std(0, unbiased=False).clamp(min=_MIN_STD))

    def study(self, item: LabelledImage) -> Studied:
        """Return the tokens of an image and what each is to learn, without those that have nothing to learn."""
        token_map = self._read_tokens(item.image)
        shares, counts = measure_shares(item, token_map, self.outputs)
        rows = (counts > 0).nonzero()[:, 0]
        tokens = token_map.tokens.flatten(0, 1).cpu()[rows]
        content = {"tokens": tokens, "targets": shares[rows], "weights": counts[rows]}
        return Studied(content, sum(tensor.nbytes for tensor in content.values()))

    def make_example(self, studied: Studied, rng: np.random.Generator) -> Batch:
        """Return some tokens of an image: `tokens` `[n, C]`, `targets` `[n, K]` shares, `weights` `[n]`, float32."""
        content: Batch = studied.content
        num_tokens, limit = len(content["weights"]), self._options.tokens_per_image
        if num_tokens <= limit:
            return content
        rows = torch.from_numpy(np.sort(rng.choice(num_tokens, limit, replace=False)))
        return {name: tensor[rows] for name, tensor in content.items()}

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Return the tokens of all images one after the other."""
        return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}

    def compute_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy with the shares, the mean over tokens by their weights."""
        losses = F.cross_entropy(network(batch["tokens"]).float(), batch["targets"], reduction="none")
        count = average_over_processes(batch["weights"].sum())
        return (losses * batch["weights"]).sum() / count.clamp(min=1e-6)

    @torch.inference_mode()
    def compute_probabilities(
        self, images: Sequence[np.ndarray], scales: Sequence[float] = (1.0,), *, mirror: bool = False
    ) -> list[Tensor]:
        """Return `[K, H, W]` float32 of each image: logits of tokens, enlarged between their centres."""
        self.network.eval()
        results: list[Tensor] = []
        for image in images:
            total: Tensor | None = None
            for view, is_mirrored in list_views(image, scales, mirror=mirror):
                token_map = self._read_tokens(view)
                logits = self.network(token_map.tokens).permute(2, 0, 1)
                # Straight to the size of the image, whatever the scale at which the backbone saw it.
                grid = TokenMap(token_map.tokens, token_map.stride, image.shape[:2], token_map.input_size)
                enlarged = upsample(logits, grid)
                seen = (enlarged.flip(-1) if is_mirrored else enlarged).softmax(0)
                total = seen if total is None else total + seen
            if total is None:
                raise ValueError("scales: got none, expected one or more; try 1")
            results.append(total / (len(scales) * (2 if mirror else 1)))
        return results

    takes_any_size = False

    def make_exportable(self, size: tuple[int, int]) -> nn.Module:
        """Return backbone and head as one module for pictures of one size, which is padded to whole patches.

        Raises:
            ConfigError: the backbone is no single model of timm, or resizes or cuts images.
        """
        backbone = self.backbone
        if not isinstance(backbone, TimmBackbone):
            raise ConfigError(
                "export_student: got a student on several backbones or one of another kind, expected one of timm; "
                "train a student that sees images, such as student=lraspp_mobilenet_v3"
            )
        return _WholeNetwork(backbone.make_exportable(), self._head, backbone.stride)

    def _read_tokens(self, image: np.ndarray) -> TokenMap:
        """Return the tokens of one image, whatever the loop of training has switched off."""
        with torch.inference_mode():
            token_map = self.backbone.tokens([image])[0]
        # Outside inference mode, so that a layer may keep them for its gradient.
        return TokenMap(token_map.tokens.clone(), token_map.stride, token_map.image_size, token_map.input_size)


def measure_shares(item: LabelledImage, token_map: TokenMap, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return what each token of an image is to learn.

    Args:
        item: the image's label map and weights.
        token_map: its tokens, `h x w` of them.
        outputs: what the channels stand for.

    Returns:
        `[h * w, K]` float32, the share of each channel among the pixels of a patch that are learnt from, and `[h * w]`
        float32 in [0, 1], how much of the patch that is, weighted if the image has weights. Shares of a patch without
        such pixels are 0.
    """
    targets = to_targets(item.label_map, outputs)
    rows, columns = token_map.tokens.shape[:2]
    scales = [inside / whole for inside, whole in zip(token_map.input_size, token_map.image_size, strict=True)]
    # The patch in which the centre of a pixel lies, once the image has the size that the backbone sees.
    y, x = (
        np.minimum(((np.arange(side) + 0.5) * scale / token_map.stride).astype(np.int64), count - 1)
        for side, scale, count in zip(targets.shape, scales, (rows, columns), strict=True)
    )
    cells = y[:, None] * columns + x[None, :]
    is_learnt = targets != IGNORE_INDEX
    bins = (cells * outputs.count + targets)[is_learnt]
    weights = None if item.weights is None else item.weights[is_learnt].astype(np.float64) / 255
    sums = np.bincount(bins, weights, minlength=rows * columns * outputs.count).reshape(-1, outputs.count)
    counts = sums.sum(1)
    shares = sums / np.maximum(counts, 1e-12)[:, None]
    pixels_per_patch = token_map.stride**2 / (scales[0] * scales[1])
    return (
        torch.from_numpy(shares.astype(np.float32)),
        torch.from_numpy((counts / pixels_per_patch).clip(0, 1).astype(np.float32)),
    )


def list_views(image: np.ndarray, scales: Sequence[float], *, mirror: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield an image at each scale, and with `mirror` its mirror image too, which is marked.

    Args:
        image: `[H, W, 3]` uint8.
        scales: factors of its size.
        mirror: whether mirror images are wanted.
    """
    for scale in scales:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        scaled = image if scale == 1.0 else cv2.resize(image, size, interpolation=interpolation)
        yield scaled, False
        if mirror:
            yield np.ascontiguousarray(scaled[:, ::-1]), True
