"""Tagged images as training batches of a `MultiClassTokenViT`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.pseudo_masks.base import get_tags
from moduseg.pseudo_masks.class_token_model import draw_kept
from moduseg.structures import Sample
from moduseg.training.data import BatchDraw


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a training image is changed each time that it comes.

    Attributes:
        side: of the square that the model sees, in pixels, a multiple of the patch.
        min_scale, max_scale: the long side of the image becomes a random multiple of `side` between these; a larger
            image is cropped at random, a smaller one placed at random on the mean colour.
        flips: which mirrorings may happen: `none`, `horizontal`, `both`.
        brightness: the image is multiplied by a random factor in `[1 - brightness, 1 + brightness]`.

    Raises:
        ValueError: a number out of range.
    """

    side: int = 224
    min_scale: float = 0.8
    max_scale: float = 1.5
    flips: str = "horizontal"
    brightness: float = 0.1

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"augmentation.side: got {self.side}, expected 1 or more pixels; try 224")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"augmentation.min_scale, max_scale: got {self.min_scale}, {self.max_scale}, expected two numbers "
                "above 0 in ascending order; try 0.8 and 1.5"
            )
        if self.flips not in ("none", "horizontal", "both"):
            raise ValueError(f"augmentation.flips: got {self.flips!r}, expected none, horizontal or both")
        if not 0 <= self.brightness < 1:
            raise ValueError(f"augmentation.brightness: got {self.brightness}, expected 0 to below 1; try 0.1")


class TaggedImages:
    """Training images with their tags; what is random about an item follows from its seed.

    Args:
        ids: of the images.
        load: reads one image with its labels.
        num_classes: foreground classes.
        augmentation: how images are changed.
        mask_rate: probability that the output of an absent class's token is masked.
        statistics: mean and deviation of the channels, `[3, 1, 1]` each.
    """

    def __init__(
        self,
        ids: Sequence[str],
        load: Callable[[str], Sample],
        num_classes: int,
        augmentation: Augmentation,
        *,
        mask_rate: float,
        statistics: tuple[Tensor, Tensor],
    ) -> None:
        self._ids, self._load, self._num_classes = ids, load, num_classes
        self._augmentation, self._mask_rate, self._statistics = augmentation, mask_rate, statistics

    def __len__(self) -> int:
        return len(self._ids)

    def name_of(self, item: int) -> str:
        """Return the id of an image."""
        return self._ids[item]

    def load(self, draw: BatchDraw) -> dict[str, Tensor]:
        """Return `pixels` `[B, 3, side, side]` float32, normalised; `tags` and `keep`, `[B, C]` bool.

        Raises:
            DataError: an image that cannot be read, has no labels, or one that is no class.
        """
        loaded = [self._load_item(item, seed) for item, seed in zip(draw.items, draw.seeds, strict=True)]
        pixels, tags, keep = (torch.stack(part) for part in zip(*loaded, strict=True))
        return {"pixels": pixels, "tags": tags, "keep": keep}

    def _load_item(self, item: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        sample = self._load(self._ids[item])
        generator = torch.Generator().manual_seed(seed)
        mean, deviation = self._statistics
        pixels = torch.from_numpy(sample.image.copy()).permute(2, 0, 1).float() / 255
        pixels = augment((pixels - mean) / deviation, self._augmentation, generator)
        tags = to_tags(sample, self._num_classes)
        return pixels, tags, draw_kept(tags, self._mask_rate, generator)


def to_tags(sample: Sample, num_classes: int) -> Tensor:
    """Return `[num_classes]` bool, the classes that an image's labels name.

    Raises:
        DataError: no labels, or one that is no class.
    """
    tags = torch.zeros(num_classes, dtype=torch.bool)
    tags[[label - 1 for label in get_tags(sample, num_classes)]] = True
    return tags


def augment(pixels: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Return a square view of an image.

    Args:
        pixels: `[3, H, W]` float, normalised.
        settings: what may happen.
        generator: that the draws come from, on the CPU.

    Returns:
        `[3, side, side]`; 0 where the image does not reach.
    """
    draws = torch.rand(6, generator=generator).tolist()
    side = settings.side
    scale = settings.min_scale + (settings.max_scale - settings.min_scale) * draws[0]
    factor = scale * side / max(pixels.shape[1:])
    height, width = (max(1, round(length * factor)) for length in pixels.shape[1:])
    if (height, width) != tuple(pixels.shape[1:]):
        pixels = F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    if settings.flips != "none" and draws[1] < 0.5:
        pixels = pixels.flip(2)
    if settings.flips == "both" and draws[2] < 0.5:
        pixels = pixels.flip(1)
    pixels = pixels * (1 + settings.brightness * (2 * draws[3] - 1))
    canvas = pixels.new_zeros(3, side, side)
    rows, columns = (_place(length, side, draw) for length, draw in ((height, draws[4]), (width, draws[5])))
    canvas[:, rows[1], columns[1]] = pixels[:, rows[0], columns[0]]
    return canvas


def _place(length: int, side: int, draw: float) -> tuple[slice, slice]:
    """Return which part of `length` pixels is seen, and where it lies in `side` pixels, `draw` in [0, 1)."""
    shift = int(draw * (abs(length - side) + 1))
    size = min(length, side)
    shifted, full = slice(shift, shift + size), slice(0, size)
    return (shifted, full) if length > side else (full, shifted)
