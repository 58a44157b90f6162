"""Networks that take images: a trunk with a head, between a fixed input and logits at the size of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE_MULTIPLE = 32
"""Sides of what the trunk sees, in pixels: the coarsest map of every trunk has this stride at most."""


class SegmentationNetwork(nn.Module):
    """Image in [0, 1] -> logits of every pixel; normalisation and padding are inside, so that a file holds it all.

    Args:
        body: `[B, 3, H, W]` normalised -> logits `[B, K, h, w]`; `H` and `W` are multiples of 32.
        mean, std: of the RGB channels in [0, 1].
        freeze_norms: whether batch norms keep the statistics that they start with.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        body: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        freeze_norms: bool = False,
    ) -> None:
        super().__init__()
        self.body, self._freezes_norms = body, freeze_norms
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, K, H, W]` of images `[B, 3, H, W]` in [0, 1].

        Images are padded with their mean colour at the bottom and right to multiples of 32, so that a cell of the
        coarsest map is everywhere 32 pixels wide; the padding is cut off again.
        """
        height, width = images.shape[-2:]
        normalised = (images - self.pixel_mean) / self.pixel_std
        padded = F.pad(normalised, (0, -width % SIDE_MULTIPLE, 0, -height % SIDE_MULTIPLE))
        logits = self.body(padded)
        logits = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def train(self, mode: bool = True) -> SegmentationNetwork:
        """Set the mode of training; frozen batch norms stay in that of evaluation."""
        super().train(mode)
        if self._freezes_norms:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class LiteHead(nn.Module):
    """A head on a coarse and a fine map, as light as that of LR-ASPP (arXiv 1905.02244).

    The coarse map is narrowed, weighted by a gate that sees the mean of the image, enlarged, and its logits are added
    to those of the fine map.

    Args:
        coarse_width, fine_width: channels of the maps.
        num_channels: `K`, of the logits.
        width: of the narrowed map.
    """

    def __init__(self, coarse_width: int, fine_width: int, num_channels: int, width: int = 128) -> None:
        super().__init__()
        self.narrow = nn.Sequential(
            nn.Conv2d(coarse_width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(coarse_width, width, 1), nn.Sigmoid())
        self.classify_coarse = nn.Conv2d(width, num_channels, 1)
        self.classify_fine = nn.Conv2d(fine_width, num_channels, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return logits `[B, K, h, w]` at the size of the fine map."""
        gated = self.narrow(coarse) * self.gate(coarse)
        enlarged = F.interpolate(gated, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify_coarse(enlarged) + self.classify_fine(fine)
