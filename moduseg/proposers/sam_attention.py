"""Self-attention of SAM's image encoder, whose relative positions never become one bias for all pairs of cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_BIAS = 1 << 24
"""Numbers of an attention's bias that are held at once, 4 bytes each."""


class RelativeAttention(nn.Module):
    """The image encoder's attention with relative positions, through the fused kernels of PyTorch.

    Args:
        attention: SAM's own of `segment_anything` or `transformers`, whose parameters it shares under their names.
        num_heads: of the attention.
    """

    def __init__(self, attention: Any, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale: float = attention.scale
        self.use_rel_pos: bool = attention.use_rel_pos
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        batch, height, width, _ = x.shape
        q, k, v = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.use_rel_pos:
            grid = q.unflatten(2, (height, width))
            rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _spread_positions(self.rel_pos_h, height).to(q.dtype))
            columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _spread_positions(self.rel_pos_w, width).to(q.dtype))
            attend = attend_in_parts if q.device.type == "cpu" else attend_with_wide_keys
            out = attend(q, k, v, rows=rows.flatten(2, 3), columns=columns.flatten(2, 3), scale=self.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
        return result


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, *, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attend with a bias that depends on the row and the column of the key, one part of the heads at a time.

    The bias of ViT-H at 1024 pixels would take 1 GB; no more than `MAX_BIAS` numbers of it, or those of one head, are
    held at once. The parts give the same bits as all heads together.

    Args:
        q, k, v: `[B, heads, L, C]`, the keys row by row.
        rows: `[B, heads, L, H]`, the bias of each query for the keys of each row.
        columns: `[B, heads, L, W]`, likewise for columns; `H * W == L`.
        scale: factor of the products, but not of the bias.

    Returns:
        `[B, heads, L, C]`.
    """
    per_head = q.shape[2] * k.shape[2]
    if q.shape[0] * q.shape[1] * per_head <= MAX_BIAS:
        return _attend_with_bias(q, k, v, rows=rows, columns=columns, scale=scale)
    at_once = max(1, MAX_BIAS // per_head)
    parts = (tensor.flatten(0, 1)[None].split(at_once, 1) for tensor in (q, k, v, rows, columns))
    outputs = [
        _attend_with_bias(*part, rows=part_rows, columns=part_columns, scale=scale)
        for *part, part_rows, part_columns in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, 1).view(*q.shape[:3], -1)


def _attend_with_bias(q: Tensor, k: Tensor, v: Tensor, *, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attend with the whole bias; arguments as those of `attend_in_parts`."""
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attend_with_wide_keys(q: Tensor, k: Tensor, v: Tensor, *, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attend with a bias that depends on the row and the column of the key, which is never held.

    Each query is followed by its bias for every row and column, each key by ones at its own row and column, so that
    their product has the bias in it; a fused kernel then holds nothing of the size `L * L`.

    Args, Returns: those of `attend_in_parts`.
    """
    length, height, width = k.shape[2], rows.shape[3], columns.shape[3]
    cells = torch.arange(length, device=k.device)
    ends = torch.arange(height + width, device=k.device)
    is_own = (ends == cells[:, None] // width) | (ends == height + cells[:, None] % width)
    # Fused kernels for half precision read eight numbers at a time; zeros fill up the rest.
    padding = -(q.shape[3] + height + width) % 8
    wide_queries = F.pad(torch.cat([q, rows / scale, columns / scale], dim=3), (0, padding))
    wide_keys = F.pad(torch.cat([k, is_own.to(k.dtype).expand(*k.shape[:3], -1)], dim=3), (0, padding))
    return F.scaled_dot_product_attention(wide_queries, wide_keys, v, scale=scale)


def _spread_positions(table: Tensor, side: int) -> Tensor:
    """Return the embedding of the distance between each query and each key along one side.

    `segment_anything`'s function makes the indices on the host, one copy to the device a block and side.

    Args:
        table: `[2 * side - 1, C]`, the embeddings of the distances `1 - side` to `side - 1`.
        side: cells of the image or window.

    Returns:
        `[side, side, C]`, queries first.
    """
    cells = torch.arange(side, device=table.device)
    return table[cells[:, None] - cells + side - 1]
