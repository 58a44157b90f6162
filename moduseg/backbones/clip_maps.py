"""A CLIP image encoder with its attention in hand: a last block without attention, and crops seen through a mask.

Functions on a `transformers.CLIPModel`, which call the model's own layers, as TagCLIP (arXiv 2312.12828) needs them.
The class token comes first in every hidden state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel


def encode_with_attention(model: CLIPModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return patch features of a last block without attention, and the attention of the blocks between patches.

    In the last block every token attends to itself alone; residual and MLP are kept.

    Args:
        model: a CLIP.
        pixel_values: `[1, 3, H, W]` normalised; sides are multiples of the patch.

    Returns:
        `[n, D]` features in the space of the texts, not normalised, and `[L, n, n]` attention, mean over the heads;
        that of the last block is the identity.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    *blocks, last = vision.encoder.layers
    attention = []
    for block in blocks:
        hidden, weights = _run_block(block, hidden)
        attention.append(weights[0, :, 1:, 1:].mean(0))
    attention.append(torch.eye(hidden.shape[1] - 1, dtype=hidden.dtype, device=hidden.device))
    hidden = hidden + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden)))
    hidden = hidden + last.mlp(last.layer_norm2(hidden))
    features = model.visual_projection(vision.post_layernorm(hidden[0, 1:]))
    return features.float(), torch.stack(attention).float()


def encode_masked(model: CLIPModel, pixel_values: Tensor, masks: Tensor) -> Tensor:
    """Return the class token's feature of images in which it attends to some patches only, in every block.

    Args:
        model: a CLIP.
        pixel_values: `[B, 3, H, W]` normalised.
        masks: `[B, n]` bool, the patches that count; without any, the class token attends to itself.

    Returns:
        `[B, D]` in the space of the texts, not normalised.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    # The class token sees itself too; the patches see everything.
    hidden_from_class = torch.nn.functional.pad(~masks, (1, 0))
    bias = torch.zeros(len(masks), 1, hidden.shape[1], hidden.shape[1], device=hidden.device)
    bias[:, 0, 0] = torch.where(hidden_from_class, float("-inf"), 0.0)
    for block in vision.encoder.layers:
        hidden, _ = _run_block(block, hidden, bias)
    return model.visual_projection(vision.post_layernorm(hidden[:, 0])).float()


def _run_block(block: Any, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output of a block `[B, T, C]` and its attention `[B, heads, T, T]`; `bias` is added to the logits."""
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query, key, value = (
        linear(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = (query.shape[-1] ** -0.5 * query @ key.mT).float()
    weights = (logits if bias is None else logits + bias).softmax(-1)
    mixed = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + attention.out_proj(mixed)
    return hidden + block.mlp(block.layer_norm2(hidden)), weights
