"""Sums of softmaxed attention, taken while a UNet runs: no tensor of all heads or layers is ever made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moduseg.diffusion.layers import ChosenHeads

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_BLOCK = 1 << 22
"""Attention weights that are computed at once, which bounds the memory of a capture to 32 MB beside its sums."""


class RunningMean:
    """The mean of attention over heads, layers and passes, in one tensor.

    Args:
        chosen: which heads of which layers take part.
    """

    def __init__(self, chosen: Sequence[ChosenHeads]) -> None:
        self.heads_by_layer = {part.layer.name: part.heads for part in chosen}
        self._total: Tensor | None = None
        self._count = 0

    def add(self, query: Tensor, key: Tensor, heads: Sequence[int], scale: float) -> None:
        """Add the attention of some heads of a layer.

        Args:
            query: `[B, heads, N, D]` of the cells.
            key: `[B, heads, K, D]` of what they look at.
            heads: which of the heads are added.
            scale: factor of the products.
        """
        num_images, num_queries, num_keys = len(query), query.shape[2], key.shape[2]
        if self._total is None:
            shape = (num_images, num_queries, num_keys)
            self._total = torch.zeros(shape, dtype=torch.float32, device=query.device)
        rows = max(1, _BLOCK // (num_images * num_keys))
        for head in heads:
            # In half precision, products of Stable Diffusion 2 overflow.
            queries, keys = query[:, head].float() * scale, key[:, head].float().transpose(1, 2)
            for start in range(0, num_queries, rows):
                scores = queries[:, start : start + rows] @ keys
                self._total[:, start : start + rows] += scores.softmax(-1)
        self._count += len(heads)

    def compute(self) -> Tensor:
        """Return the mean, `[B, N, K]` float32; each row sums to 1. The sum is divided in place and given away."""
        if self._total is None:
            raise RuntimeError("no pass has run")
        total, self._total = self._total.div_(self._count), None
        return total


class _CapturingProcessor:
    """Adds a layer's attention to the means that ask for it, then lets the layer's own processor compute its output.

    Args:
        processor: the layer's own.
        means: those that ask for heads of this layer, with the heads.
    """

    def __init__(self, processor: Any, means: Sequence[tuple[RunningMean, tuple[int, ...]]]) -> None:
        self._processor, self._means = processor, means

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        with torch.autocast(query.device.type, enabled=False):
            for mean, heads in self._means:
                mean.add(query, key, heads, attn.scale)
        return self._processor(attn, hidden_states, encoder_hidden_states, **arguments)


@contextmanager
def capture(unet: UNet2DConditionModel, means: Sequence[RunningMean]) -> Iterator[None]:
    """Add the attention of every pass inside to `means`; layers that none of them asks for run as they always do."""
    names = {name for mean in means for name in mean.heads_by_layer}
    modules = {name: unet.get_submodule(name) for name in sorted(names)}
    processors: dict[str, Any] = {name: module.processor for name, module in modules.items()}
    for name, module in modules.items():
        asking = [(mean, mean.heads_by_layer[name]) for mean in means if name in mean.heads_by_layer]
        module.processor = _CapturingProcessor(processors[name], asking)
    try:
        yield
    finally:
        for name, module in modules.items():
            module.processor = processors[name]
