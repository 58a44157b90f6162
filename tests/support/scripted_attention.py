"""An attention source whose attention follows the ground truth of one picture, for generators on random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.diffusion.attention import Attention, AttentionSource, EncodedPrompts
from moduseg.structures import Sample


def follow_truth(source: AttentionSource, sample: Sample, side: int = 16) -> None:
    """Make a source see each class (named `class <id>`) where the ground truth has it, and join cells of one class.

    Args:
        source: changed in place; its prompts are still read by its tokenizer.
        sample: with ground truth.
        side: of all maps.
    """
    assert sample.semantic is not None
    height, width = sample.size
    rows, columns = (np.arange(side) * 2 + 1) * height // (2 * side), (np.arange(side) * 2 + 1) * width // (2 * side)
    truth = torch.from_numpy(sample.semantic[np.ix_(rows, columns)].flatten().astype(np.int64))
    device = source.model.device.torch_device
    encode, last = source.encode_prompts, {}

    def encode_prompts(prompts: Any, gain: float = 1.0) -> EncodedPrompts:
        encoded = encode(prompts, gain)
        last["prompts"], last["tokens"] = prompts, encoded.tokens
        return encoded

    def attend(request: Any) -> Tensor:
        if request.kind == "self":
            same = (truth[:, None] == truth).float()
            return (same / same.sum(1, keepdim=True))[None].expand(len(last["prompts"]), -1, -1)
        maps = torch.full((len(last["prompts"]), side * side, len(last["tokens"][0].ids)), 0.01)
        for row, prompt, tokens in zip(maps, last["prompts"], last["tokens"], strict=True):
            for name, span in zip(prompt.names, tokens.spans, strict=True):
                row[:, list(span)] += (truth == int(name.rpartition(" ")[2]))[:, None].float() / len(span)
        return maps / maps.sum(-1, keepdim=True)

    def collect(latents: Tensor, states: Tensor, requests: Any, **_: Any) -> Attention:
        return Attention(tuple(attend(request).to(device) for request in requests), latents)

    source.encode_prompts, source.collect = encode_prompts, collect  # type: ignore[method-assign,assignment]
