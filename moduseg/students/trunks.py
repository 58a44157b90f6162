"""The students whose networks are those of torchvision, transformers and timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.backbones import timm_model
from moduseg.devices import Device, seed_weights
from moduseg.errors import ArtefactError
from moduseg.files import file_digest
from moduseg.students.base import Outputs
from moduseg.students.image_student import IMAGENET_MEAN, IMAGENET_STD, ImageSettings, ImageStudent
from moduseg.students.network import LiteHead, SegmentationNetwork
from moduseg.weights.pretrained import Pretrained
from moduseg.weights.sources import find_weights
from moduseg.weights.tensors import load_state

KEY = "student.model.weights"


TRUNKS = {
    "deeplabv3_resnet101": "resnet101",
    "deeplabv3_resnet50": "resnet50",
    "lraspp_mobilenet_v3_large": "mobilenet_v3_large",
}
"""The classifier whose layers are the trunk of each network of torchvision."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionOptions(ImageSettings):
    """Settings of a student of torchvision.

    Attributes:
        model: which network.
        weights: of the trunk, trained to classify images: `random`; `imagenet`, which torchvision publishes; or what
            `moduseg.weights.sources.find_weights` takes. Published weights of the whole network are not taken: they
            were trained on pixel labels.
        seed: of random weights.
        freeze_norms: whether batch norms of the trunk and head keep their statistics.
        augmentation, trunk_rate: see `ImageSettings`.
    """

    model: Literal["deeplabv3_resnet101", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"]
    weights: str = "random"
    seed: int = 0
    freeze_norms: bool = False


class TorchvisionStudent(ImageStudent):
    """DeepLabV3 (arXiv 1706.05587) or LR-ASPP (arXiv 1905.02244) as torchvision has them, without auxiliary head."""

    trunk_name = "body.backbone."

    def __init__(self, options: TorchvisionOptions, device: Device, outputs: Outputs) -> None:
        super().__init__(outputs, device, options)
        self._options = options

    @property
    def digest(self) -> str:
        """sha256 of the trunk's weights, or `random-<seed>`."""
        return _digest(self._weights, self._options.seed)

    @property
    def _weights(self) -> str:
        """What `weights` stands for: `random`, or a path or an address."""
        if self._options.weights != "imagenet":
            return self._options.weights
        from torchvision.models import get_model_weights

        published: Any = get_model_weights(TRUNKS[self._options.model]).DEFAULT
        return str(published.url)

    def build_network(self) -> SegmentationNetwork:
        """Return the network on the CPU."""
        from torchvision.models import segmentation

        options = self._options
        with seed_weights(options.seed):
            model = getattr(segmentation, options.model)(
                weights=None, weights_backbone=None, num_classes=self.outputs.count
            )
        if options.weights != "random":
            load_trunk(model.backbone, find_weights(self._weights, KEY), _drop_features)
        return SegmentationNetwork(_Out(model), IMAGENET_MEAN, IMAGENET_STD, freeze_norms=options.freeze_norms)


class _Out(nn.Module):
    """A network of torchvision without the enlargement at its end, which `SegmentationNetwork` does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.classifier = model.backbone, model.classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, K, h, w]`."""
        features = self.backbone(images)
        # LR-ASPP's head takes both maps, that of DeepLab one.
        return self.classifier(features if "high" in features else features["out"])


def _drop_features(name: str) -> str:
    """Return the name that a tensor of a classifier has in the trunk: that of MobileNetV3 begins with `features.`."""
    return name.removeprefix("backbone.").removeprefix("features.")


def load_trunk(trunk: nn.Module, path: Path, rename: Callable[[str], str]) -> None:
    """Load the tensors of a classifier into the trunk of a network; those of the classifier's own head are dropped.

    Raises:
        ArtefactError: a tensor of the trunk is missing or has another shape.
    """
    state = {rename(name): tensor for name, tensor in load_state(path).items()}
    expected = trunk.state_dict()
    wrong = [
        name
        for name, tensor in expected.items()
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != tensor.shape)
    ]
    if wrong:
        raise ArtefactError(
            f"{path}: {len(wrong)} of {len(expected)} tensors of the trunk are missing or have another shape "
            f"({', '.join(wrong[:3])}); check {KEY} and student.model.model"
        )
    trunk.load_state_dict({name: state[name] for name in expected if name in state}, strict=False)


SEGFORMER_SIZES: Mapping[str, dict[str, Any]] = {
    size: {
        "depths": depths,
        "hidden_sizes": [32, 64, 160, 256] if size == "b0" else [64, 128, 320, 512],
        "decoder_hidden_size": 256 if size in ("b0", "b1") else 768,
        "num_attention_heads": [1, 2, 5, 8],
        "sr_ratios": [8, 4, 2, 1],
    }
    for size, depths in {
        "b0": [2, 2, 2, 2],
        "b1": [2, 2, 2, 2],
        "b2": [3, 4, 6, 3],
        "b3": [3, 4, 18, 3],
        "b4": [3, 8, 27, 3],
        "b5": [3, 6, 40, 3],
    }.items()
}
"""Sizes of SegFormer (arXiv 2105.15203, table 6)."""


@dataclass(frozen=True, kw_only=True)
class SegformerOptions(ImageSettings):
    """Settings of a SegFormer.

    Attributes:
        size: `b0` to `b5`.
        weights: of the encoder, trained to classify images: `random`, or a directory or hub id as
            `moduseg.weights.sources.find_model_folder` takes it (`nvidia/mit-b5`).
        revision: branch, tag or commit of a hub id.
        seed: of random weights.
        drop_path: rate at which blocks are skipped in training.
        augmentation, trunk_rate: see `ImageSettings`.
    """

    size: Literal["b0", "b1", "b2", "b3", "b4", "b5"]
    weights: str = "random"
    revision: str | None = None
    seed: int = 0
    drop_path: float = 0.1


class SegformerStudent(ImageStudent):
    """SegFormer (arXiv 2105.15203) as transformers has it."""

    trunk_name = "body.model.segformer."

    def __init__(self, options: SegformerOptions, device: Device, outputs: Outputs) -> None:
        super().__init__(outputs, device, options)
        self._options = options

    @property
    def digest(self) -> str:
        """Digest of the encoder's weights, or `random-<seed>`."""
        options = self._options
        return f"random-{options.seed}" if options.weights == "random" else self._pretrained.digest

    @cached_property
    def _pretrained(self) -> Pretrained:
        return Pretrained(self._options.weights, self._options.revision, KEY, "SegFormer encoder")

    def build_network(self) -> SegmentationNetwork:
        """Return the network on the CPU."""
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        options = self._options
        config = SegformerConfig(
            num_labels=self.outputs.count, drop_path_rate=options.drop_path, **SEGFORMER_SIZES[options.size]
        )
        with seed_weights(options.seed):
            model = SegformerForSemanticSegmentation(config)
        if options.weights != "random":
            folder = self._pretrained.folder
            files = [folder / name for name in _WEIGHT_FILES]
            file = next((path for path in files if path.is_file()), files[0])
            load_trunk(model.segformer, file, lambda name: name.removeprefix("segformer."))
        return SegmentationNetwork(_Logits(model), IMAGENET_MEAN, IMAGENET_STD)


_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class _Logits(nn.Module):
    """A model of transformers that gives its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, K, h, w]`."""
        return self.model(images).logits


@dataclass(frozen=True, kw_only=True)
class TimmOptions(ImageSettings):
    """Settings of a student on a CNN of timm.

    Attributes:
        model: timm's name of the CNN.
        weights: of the CNN: `random`, or what `moduseg.weights.sources.find_weights` takes.
        coarse, fine: stages (of timm's `feature_info`, from 0) whose maps the head takes.
        output_stride: of the coarse map in pixels; the CNN's own if omitted.
        width: channels of the head.
        mean, std: of the RGB channels in [0, 1].
        seed: of random weights.
        freeze_norms: whether batch norms keep their statistics.
        freeze_trunk: whether only the head is trained; the trunk's batch norms keep their statistics then.
        augmentation, trunk_rate: see `ImageSettings`.
    """

    model: str
    weights: str = "random"
    coarse: int = 4
    fine: int = 2
    output_stride: int | None = None
    width: int = 128
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    seed: int = 0
    freeze_norms: bool = False
    freeze_trunk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fine < self.coarse:
            raise ValueError(f"fine, coarse: got {self.fine}, {self.coarse}, expected 0 <= fine < coarse; try 2 and 4")


class TimmStudent(ImageStudent):
    """Any CNN of timm with a `LiteHead` on two of its maps."""

    trunk_name = "body.trunk."

    def __init__(self, options: TimmOptions, device: Device, outputs: Outputs) -> None:
        super().__init__(outputs, device, options)
        self._options = options

    @property
    def digest(self) -> str:
        """sha256 of the CNN's weights, or `random-<seed>`."""
        return _digest(self._options.weights, self._options.seed)

    def build_network(self) -> SegmentationNetwork:
        """Return the network on the CPU."""
        options = self._options
        model = timm_model.build_model(options.model, {}, options.output_stride, options.seed)
        if options.weights != "random":
            timm_model.load_weights(model, find_weights(options.weights, KEY))
        fix_padding(model)
        if options.freeze_trunk:
            model.requires_grad_(False)
        timm_model.check_layers(model, [options.coarse], options.model)
        widths = [int(model.feature_info[stage]["num_chs"]) for stage in (options.coarse, options.fine)]
        # What follows the coarse map gets no gradient, which several processes would wait for.
        model.prune_intermediate_layers([options.coarse], prune_norm=True, prune_head=True)
        with seed_weights(options.seed):
            head = LiteHead(widths[0], widths[1], self.outputs.count, options.width)
        body = _TwoMaps(model, head, (options.fine, options.coarse), is_frozen=options.freeze_trunk)
        return SegmentationNetwork(body, options.mean, options.std, freeze_norms=options.freeze_norms)


class FixedPaddingConv(nn.Conv2d):
    """A convolution with TensorFlow's padding, for maps whose sides are multiples of its stride.

    For these the padding is the same at any size. The layer of timm computes it anew from each input, which an export
    cannot follow for pictures of any size.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved map."""
        pads: list[int] = []
        for side, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max(0, (side - 1) * dilation + 1 - stride)
            pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
        return self._conv_forward(F.pad(input, pads), self.weight, self.bias)


def fix_padding(model: nn.Module) -> None:
    """Replace the layers of a CNN of timm that compute their padding, in place; parameters keep their names."""
    from timm.layers import Conv2dSame

    for module in list(model.modules()):
        for child in module.children():
            if isinstance(child, Conv2dSame):
                child.__class__ = FixedPaddingConv
                child.padding = (0, 0)


class _TwoMaps(nn.Module):
    """A CNN of timm whose head sees two of its maps; a frozen one stays in evaluation mode."""

    def __init__(self, trunk: Any, head: LiteHead, stages: tuple[int, int], *, is_frozen: bool = False) -> None:
        super().__init__()
        self.trunk, self.head, self._stages, self._is_frozen = trunk, head, list(stages), is_frozen

    def train(self, mode: bool = True) -> _TwoMaps:
        """Set the mode of what is trained."""
        super().train(mode)
        if self._is_frozen:
            self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, K, h, w]`."""
        fine, coarse = self.trunk.forward_intermediates(
            images, indices=self._stages, intermediates_only=True, stop_early=True
        )
        return self.head(coarse, fine)


def _digest(weights: str, seed: int) -> str:
    return f"random-{seed}" if weights == "random" else file_digest(find_weights(weights, KEY))
