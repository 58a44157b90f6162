"""Queries and keys of a timm attention, from which affinities are computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.errors import ConfigError


def get_attention_width(block: Any) -> int | None:
    """Return the channels of a block's queries, all heads together; `None` if queries and keys cannot be added up.

    Supported are timm's attentions with one fused `qkv` or with `q_proj` and `k_proj`, rotary or not, that have one key
    for each query head. Attention fused with the MLP, grouped queries and convolutional attention are not.
    """
    attention = getattr(block, "attn", None)
    proj = getattr(attention, "proj", None)
    if not isinstance(proj, nn.Linear):
        return None
    width = int(proj.in_features)
    fused = getattr(attention, "qkv", None)
    if isinstance(fused, nn.Linear):
        return width if fused.out_features == 3 * width else None
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj")]
    return width if all(isinstance(p, nn.Linear) and p.out_features == width for p in parts) else None


def check_facet(model: Any, layers: tuple[int, ...], name: str) -> None:
    """Raise an error unless all blocks that are taken have queries and keys that can be added up.

    Args:
        model: a timm model.
        layers: blocks counted from 0; empty for a CNN.
        name: of the model, for messages.

    Raises:
        ConfigError: a block without them, or a CNN.
    """
    without = [
        type(getattr(model.blocks[i], "attn", None)).__name__
        for i in layers
        if not get_attention_width(model.blocks[i])
    ]
    if without or not layers:
        raise ConfigError(
            f"backbone.facet: got 'qk' for {name!r}, which has {without[0] if without else 'no'} attention, expected "
            "attention with a fused qkv, or with q_proj and k_proj of one width; try facet=tokens, or the model "
            "vit_base_patch8_224.dino"
        )


def sum_query_and_key(attention: Any, tokens: Tensor) -> Tensor:
    """Return the sum of each token's query and key, the heads concatenated.

    If the model normalises queries and keys, the sum is taken after that. Rotary positions are not applied: rotated
    vectors say where a token is, an affinity asks what it is.

    Args:
        attention: a timm attention that `get_attention_width` supports.
        tokens: `[B, N, C]`, its input (the block's first norm applied).

    Returns:
        `[B, N, D]`, not normalised.
    """
    if isinstance(getattr(attention, "qkv", None), nn.Linear):
        width = attention.qkv.out_features // 3
        bias = attention.qkv.bias
        if bias is None and getattr(attention, "q_bias", None) is not None:
            # EVA and BEiT keep a bias for queries and one for values; that of the keys is a buffer of zeros.
            keys = getattr(attention, "k_bias", None)
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias) if keys is None else keys])
        both = F.linear(tokens, attention.qkv.weight[: 2 * width], None if bias is None else bias[: 2 * width])
        query, key = both.unflatten(2, (2, attention.num_heads, -1)).unbind(2)
    else:
        query, key = (
            proj(tokens).unflatten(2, (attention.num_heads, -1)) for proj in (attention.q_proj, attention.k_proj)
        )
    # Where a model normalises queries and keys, it does so head by head, along the last axis.
    query, key = (getattr(attention, f"{name}_norm", nn.Identity())(part) for name, part in (("q", query), ("k", key)))
    return (query + key).flatten(2)
