"""The moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's floating tensors; its integers are the model's own.

    In the first steps it follows faster: the decay is `min(decay, (1 + n) / (10 + n))` at step `n`, since the random
    weights of the start would else count for long.

    Args:
        model: whose weights are averaged; the average starts as its present weights.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.tensors: dict[str, Tensor] = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, which is counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def swap_in(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged weights inside."""
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(before)
