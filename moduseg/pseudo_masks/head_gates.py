"""Gates of attention heads, which are learned and prune heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TEMPERATURE, _LOW, _HIGH = 0.33, -0.1, 1.1
"""Temperature and stretch of the Hard-Concrete distribution."""


class HeadGates(nn.Module):
    """A Hard-Concrete gate for each head of each block (Louizos, Welling and Kingma, ICLR 2018).

    In training a gate is drawn, 0 or 1, and its gradient is that of the stretched and clipped Concrete variable behind
    it. In evaluation it is open (1) where its parameter is above 0, else closed (0).

    Args:
        depth: number of blocks.
        num_heads: heads of a block.
        start: what the parameters start as.
    """

    def __init__(self, depth: int, num_heads: int, start: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((depth, num_heads), start))

    def forward(self) -> Tensor:
        """Return the gates, `[depth, num_heads]` float32 in {0, 1}."""
        if not self.training:
            return self.is_open.float()
        uniform = torch.rand_like(self.log_alpha, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        noise = uniform.log() - (-uniform).log1p()
        concrete = torch.sigmoid((noise + self.log_alpha) / _TEMPERATURE)
        soft = (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        # The value is the hard gate's, the gradient the soft one's.
        return (soft > 0.5).float() + (soft - soft.detach())

    @property
    def is_open(self) -> Tensor:
        """`[depth, num_heads]` bool, which gates are open in evaluation."""
        return self.log_alpha > 0

    def compute_penalty(self) -> Tensor:
        """Return the sum of the probabilities that a gate is not 0, a scalar; it rises with every parameter."""
        return torch.sigmoid(self.log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()
