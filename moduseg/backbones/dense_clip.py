"""Dense features of a CLIP image encoder: one forward pass, the last block as an option (METHOD, CorrCLIP's relatives).

Functions on a `transformers.CLIPModel`, built of the model's own layers. The class token comes first in every hidden
state. It takes part as a key and a value in `plain`, `sclip`, `clearclip` and `naclip`; under `maskclip` every token
sees itself only; a given affinity holds between patches, so there it is left out. Its own output is always dropped.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPModel

Variant = Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "proxyclip"]
VARIANTS: tuple[str, ...] = get_args(Variant)
"""`plain` the model as it is; `maskclip` each value by itself; `sclip` softmax(qq) + softmax(kk), residual and MLP
kept; `clearclip` softmax(qq); `naclip` softmax(kk + Gaussian); `proxyclip` an affinity of other tokens. All
but `plain` and `sclip` drop the residual and the MLP."""


@dataclass(frozen=True)
class Affinity:
    """How much the patches of a grid have to do with one another, from tokens of another model.

    Attributes:
        similarity: `[B, n, n]` float, cosine similarities in [-1, 1] of the `n = h' * w'` patches.
        rows: `[h', h]` float, weights that resample CLIP's patch rows to the affinity's, or `None` for the same grid.
        columns: `[w', w]`, the same across.
        gamma, beta: of `proxy_attention`.
    """

    similarity: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    gamma: float = 3.0
    beta: float = 1.2


def check_variant(variant: str) -> None:
    """Raises `ValueError` where there is no such way to run the last block."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}; try naclip")


def dense_tokens(
    model: CLIPModel,
    pixel_values: Tensor,
    variant: str = "plain",
    affinity: Affinity | None = None,
    gaussian_std: float = 5.0,
    project: bool = True,
) -> Tensor:
    """Patch features of a batch of images.

    Args:
        model: a CLIP.
        pixel_values: `[B, 3, H, W]` normalised; sides are multiples of the patch. Positional embeddings are
            interpolated where the size is not the pre-trained one.
        variant: one of `VARIANTS`.
        affinity: for `proxyclip`, and for nothing else.
        gaussian_std: standard deviation of `naclip`'s neighbourhood, in patches.
        project: after the final norm, project into the space of the texts.

    Returns:
        `[B, h, w, D]`, not normalised: `D` of the joint space, or the encoder's width. The grid is the affinity's where
        one is given.

    Raises:
        ValueError: an unknown variant, or an affinity missing or superfluous.
    """
    hidden = block_inputs(model, pixel_values)[-1]
    patch = model.config.vision_config.patch_size
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    return finish(model, last_block(model, hidden, grid, variant, affinity, gaussian_std), project)


def block_inputs(model: CLIPModel, pixel_values: Tensor) -> list[Tensor]:
    """What enters each block, `[B, 1 + h * w, C]` each, the class token first.

    Entry `i + 1` is the output of block `i`; the last block is not run.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    states = [hidden]
    for layer in vision.encoder.layers[:-1]:
        states.append(run_block(layer, states[-1]))
    return states


def run_block(layer: Any, hidden: Tensor) -> Tensor:
    """One whole block, without a mask; transformers 4 and 5 name the masks differently."""
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    output = layer(hidden, **dict.fromkeys(masks))
    return output[0] if isinstance(output, tuple) else output


def last_block(
    model: CLIPModel,
    hidden: Tensor,
    grid: tuple[int, int],
    variant: str,
    affinity: Affinity | None = None,
    gaussian_std: float = 5.0,
) -> Tensor:
    """The last block in one of its variants, on its usual input or on the mean of earlier blocks' outputs.

    Args:
        model: a CLIP.
        hidden: `[B, 1 + h * w, C]`.
        grid: `(h, w)`.
        variant, affinity, gaussian_std: see `dense_tokens`.

    Returns:
        `[B, h, w, C]` patches, before the final norm.
    """
    check_variant(variant)
    if (affinity is not None) != (variant == "proxyclip"):
        raise ValueError(
            f"affinity: got {'one' if affinity else 'none'} for variant {variant!r}; proxyclip needs an affinity, "
            "the other variants take none"
        )
    layer = model.vision_model.encoder.layers[-1]
    if affinity is not None:
        return attend_given(layer, hidden, grid, proxy_attention(affinity), affinity.rows, affinity.columns)
    if variant == "plain":
        out = run_block(layer, hidden)
    elif variant == "maskclip":
        out = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))
    else:
        weights = attention(layer, hidden, grid, variant, gaussian_std)
        value = _heads(layer.self_attn, layer.self_attn.v_proj(layer.layer_norm1(hidden)))
        out = layer.self_attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
        if variant == "sclip":
            out = hidden + out
            out = out + layer.mlp(layer.layer_norm2(out))
    return out[:, 1:].unflatten(1, grid)


def attention(layer: Any, hidden: Tensor, grid: tuple[int, int], variant: str, gaussian_std: float = 5.0) -> Tensor:
    """Attention weights `[B, heads, 1 + h * w, 1 + h * w]` of `sclip` (rows sum to 2), `clearclip` or `naclip` (1)."""
    normed = layer.layer_norm1(hidden)
    query, key = (_heads(layer.self_attn, proj(normed)) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    scale = query.shape[-1] ** -0.5
    if variant == "clearclip":
        return _softmax(scale * query @ query.mT)
    if variant == "sclip":
        return _softmax(scale * query @ query.mT) + _softmax(scale * key @ key.mT)
    if variant != "naclip":
        raise ValueError(f"variant: got {variant!r}, expected sclip, clearclip or naclip")
    near = nn.functional.pad(neighbourhood(grid, gaussian_std, hidden.device), (1, 0, 1, 0))
    return _softmax((scale * key @ key.mT).float() + near).to(key.dtype)


def attend_given(
    layer: Any,
    hidden: Tensor,
    grid: tuple[int, int],
    weights: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Values of the patches mixed by given weights, the same for every head; no class token, residual or MLP.

    Args:
        layer: the block whose values and output projection are used.
        hidden: `[B, 1 + h * w, C]`.
        grid: `(h, w)`.
        weights: `[B, n, n]`, rows that sum to 1, on CLIP's grid or on a grid that `rows` and `columns` lead to.
        rows, columns: `[h', h]` and `[w', w]` with `n = h' * w'`: values are resampled before they are mixed.

    Returns:
        `[B, h', w', C]`.

    Raises:
        ValueError: weights of another number of patches.
    """
    value = layer.self_attn.v_proj(layer.layer_norm1(hidden[:, 1:])).unflatten(1, grid)
    if rows is not None and columns is not None:
        value = torch.einsum("ij,kl,bjlc->bikc", rows.to(value), columns.to(value), value)
    target = value.shape[1:3]
    if weights.shape[1:] != (target[0] * target[1],) * 2:
        raise ValueError(
            f"affinity: got {tuple(weights.shape)}, expected [B, n, n] for {target[0]} x {target[1]} patches"
        )
    mixed = weights.to(value) @ value.flatten(1, 2)
    return layer.self_attn.out_proj(mixed).unflatten(1, target)


def proxy_attention(affinity: Affinity) -> Tensor:
    """ProxyCLIP's attention `[B, n, n]`, rows sum to 1: `softmax(gamma (S - beta mean S))`, negatives left out.

    A patch always sees itself, so that no row is empty where all patches look alike.
    """
    similarity = affinity.similarity.float()
    logits = affinity.gamma * (similarity - affinity.beta * similarity.mean((1, 2), keepdim=True))
    itself = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~itself, float("-inf")).softmax(-1)


def cosine_similarity(tokens: Tensor) -> Tensor:
    """`[..., h, w, C]` tokens to `[..., h * w, h * w]` cosine similarities, float32."""
    flat = nn.functional.normalize(tokens.float().flatten(-3, -2), dim=-1)
    return flat @ flat.mT


def neighbourhood(grid: tuple[int, int], std: float, device: torch.device | None = None) -> Tensor:
    """NACLIP's kernel `[h * w, h * w]`: `exp(-d^2 / (2 std^2))` of the distance `d` between patches."""
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    squares = (place[:, None] - place[None]).square().sum(-1)
    return torch.exp(-squares / (2 * std**2))


def finish(model: CLIPModel, tokens: Tensor, project: bool = True) -> Tensor:
    """Final norm of `[..., C]` tokens and, with `project`, the projection to `[..., D]`."""
    tokens = model.vision_model.post_layernorm(tokens)
    return model.visual_projection(tokens) if project else tokens


def _heads(module: Any, tokens: Tensor) -> Tensor:
    """`[B, N, C]` to `[B, heads, N, C / heads]`."""
    return tokens.unflatten(2, (module.num_heads, -1)).transpose(1, 2)


def _softmax(logits: Tensor) -> Tensor:
    """In float32 whatever comes in, as the model's own attention has it."""
    return logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
