"""Patch features of a CLIP image encoder: one forward pass, whose last block has variants.

Functions on a `transformers.CLIPModel`, which call the model's own layers. The class token comes first in every hidden
state. It is a key and a value in `plain`, `sclip`, `clearclip` and `naclip`; under `maskclip` every token attends to
itself only; an affinity of another model holds between patches, so the class token has no part in it. The class token's
output is always dropped. What the variants compute: docs/method.md, section CorrCLIP.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from moduseg.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPModel

Variant = Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "proxyclip", "corrclip"]
VARIANTS: tuple[str, ...] = get_args(Variant)
"""`plain` the model as it is; `maskclip` each value by itself; `sclip` softmax(qq) + softmax(kk), residual and MLP
kept; `clearclip` softmax(qq); `naclip` softmax(kk + Gaussian); `proxyclip` an affinity of other tokens; `corrclip` an
affinity inside regions, and two more branches. All but `plain` and `sclip` drop the residual and the MLP."""
AFFINITY_VARIANTS: tuple[str, ...] = ("proxyclip", "corrclip")
"""The variants whose attention comes from another model's affinity."""


@dataclass(frozen=True)
class Branches:
    """CorrCLIP's attention and branches (docs/method.md, section CorrCLIP).

    Attributes:
        temperature: factor of the similarities in the softmax.
        spatial, semantic: weights of the two branches beside the main one; 0 switches a branch off.
        spatial_blocks: first and last block, 0-based, whose outputs the spatial branch averages; `None` takes those of
            the published code, which names 5..9 of 12 blocks, 10..21 of 24, and from the third to the third last else.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 4.0
    spatial: float = 1.0
    semantic: float = 0.5
    spatial_blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a number above 0; the paper uses 4")
        for name, usual in (("spatial", 1.0), ("semantic", 0.5)):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more; the paper uses {usual}")
        if self.spatial_blocks is not None and not 0 <= self.spatial_blocks[0] <= self.spatial_blocks[1]:
            raise ValueError(f"spatial_blocks: got {list(self.spatial_blocks)}, expected [first, last]; try [5, 9]")

    def blocks(self, depth: int) -> tuple[int, int]:
        """Return the first and last block of the spatial branch, 0-based, in an encoder of `depth` blocks.

        Raises:
            ConfigError: blocks that the encoder has not; the last block does not count, since it is not run.
        """
        usual = {12: (5, 9), 24: (10, 21), 32: (2, 29)}.get(depth, (min(2, max(depth - 3, 0)), max(depth - 3, 0)))
        first, last = self.spatial_blocks or usual
        if last > depth - 2:
            raise ConfigError(
                f"spatial_blocks: got [{first}, {last}], expected blocks 0..{depth - 2} of an encoder of {depth}; "
                "leave it out"
            )
        return first, last


@dataclass(frozen=True)
class Affinity:
    """How alike the patches of a grid are to another model, and to which regions they belong.

    Attributes:
        similarity: `[B, n, n]` float, cosine similarities in [-1, 1] of the `n = h' * w'` patches.
        rows: `[h', h]` float, weights that resample CLIP's patch rows to the affinity's, or `None` for the same grid.
        columns: `[w', w]` float, weights that resample CLIP's patch columns, or `None`.
        gamma, beta: of `compute_proxy_attention`.
        regions: `[B, n]` int64, the region of each patch, 0 and up, -1 for none; of `corrclip`.
        patch_regions: `[B, h * w]` int64, the region of each patch of CLIP's grid, where that is another; of
            `corrclip`.
        branches: of `corrclip`.
    """

    similarity: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    gamma: float = 3.0
    beta: float = 1.2
    regions: Tensor | None = None
    patch_regions: Tensor | None = None
    branches: Branches = field(default_factory=Branches)


def check_variant(variant: str) -> None:
    """Raise `ValueError` if the last block has no such variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}; try naclip")


def encode_patches(
    model: CLIPModel,
    pixel_values: Tensor,
    variant: str = "plain",
    affinity: Affinity | None = None,
    *,
    gaussian_std: float = 5.0,
    project: bool = True,
    shallow_blocks: tuple[int, int] | None = None,
) -> Tensor:
    """Return the patch features of a batch of images.

    Args:
        model: a CLIP.
        pixel_values: `[B, 3, H, W]` normalised; sides are multiples of the patch. Positional embeddings are
            interpolated where the size is not the pre-trained one.
        variant: one of `VARIANTS`.
        affinity: for `proxyclip` and `corrclip`, and for nothing else.
        gaussian_std: standard deviation of `naclip`'s neighbourhood, in patches.
        project: after the final norm, project into the space of the texts.
        shallow_blocks: first and last block, counted from 1, whose mean output is appended to each patch's feature.

    Returns:
        `[B, h, w, D]`, not normalised: `D` of the joint space, or the encoder's width; with shallow blocks
        `[B, h, w, D + C]`. With an affinity, the grid is the affinity's.

    Raises:
        ValueError: an unknown variant, or an affinity missing or superfluous.
    """
    states = run_blocks(model, pixel_values)
    patch = model.config.vision_config.patch_size
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    if variant == "corrclip" and affinity is not None:
        features = sum_branches(model, states, grid, affinity)
    else:
        features = run_last_block(model, states[-1], grid, variant, affinity, gaussian_std=gaussian_std)
        features = model.vision_model.post_layernorm(features)
    features = model.visual_projection(features) if project else features
    if shallow_blocks is None:
        return features
    first, last = shallow_blocks
    # Entry i is the output of block i, counted from 1.
    shallow = (sum(states[first + 1 : last + 1], states[first]) / (last + 1 - first))[:, 1:].unflatten(1, grid)
    if affinity is not None:
        shallow = resample_patches(shallow, affinity.rows, affinity.columns)
    return torch.cat([features, shallow.to(features.dtype)], dim=-1)


def run_blocks(model: CLIPModel, pixel_values: Tensor) -> list[Tensor]:
    """Return the input of each block, `[B, 1 + h * w, C]` each, the class token first.

    Entry `i + 1` is the output of block `i`; the last block is not run.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    states = [hidden]
    for layer in vision.encoder.layers[:-1]:
        states.append(run_block(layer, states[-1]))
    return states


def run_block(layer: Any, hidden: Tensor) -> Tensor:
    """Return the output of a complete block, without a mask; transformers 4 and 5 name the masks differently."""
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    output = layer(hidden, **dict.fromkeys(masks))
    return output[0] if isinstance(output, tuple) else output


def run_last_block(
    model: CLIPModel,
    hidden: Tensor,
    grid: tuple[int, int],
    variant: str,
    affinity: Affinity | None = None,
    *,
    gaussian_std: float = 5.0,
) -> Tensor:
    """Return the output of the last block in one of its variants.

    Args:
        model: a CLIP.
        hidden: `[B, 1 + h * w, C]`, the block's usual input or the mean of earlier blocks' outputs.
        grid: `(h, w)`.
        variant: one of `VARIANTS`.
        affinity: for `proxyclip` and `corrclip`, and for nothing else.
        gaussian_std: standard deviation of `naclip`'s neighbourhood, in patches.

    Returns:
        `[B, h, w, C]` patches, before the final norm.

    Raises:
        ValueError: an unknown variant, or an affinity missing or superfluous.
    """
    check_variant(variant)
    if (affinity is not None) != (variant in AFFINITY_VARIANTS):
        raise ValueError(
            f"affinity: got {'one' if affinity else 'none'} for variant {variant!r}; {' and '.join(AFFINITY_VARIANTS)} "
            "need an affinity, the other variants take none"
        )
    layer = model.vision_model.encoder.layers[-1]
    if affinity is not None:
        weights = compute_proxy_attention(affinity) if variant == "proxyclip" else compute_scope_attention(affinity)
        return mix_values(layer, hidden, grid, weights, rows=affinity.rows, columns=affinity.columns)
    if variant == "plain":
        out = run_block(layer, hidden)
    elif variant == "maskclip":
        out = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))
    else:
        weights = compute_attention(layer, hidden, grid, variant, gaussian_std)
        value = _split_heads(layer.self_attn, layer.self_attn.v_proj(layer.layer_norm1(hidden)))
        out = layer.self_attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
        if variant == "sclip":
            out = hidden + out
            out = out + layer.mlp(layer.layer_norm2(out))
    return out[:, 1:].unflatten(1, grid)


def compute_attention(
    layer: Any, hidden: Tensor, grid: tuple[int, int], variant: str, gaussian_std: float = 5.0
) -> Tensor:
    """Return attention weights of the tokens of a batch.

    Args:
        layer: the last block.
        hidden: `[B, 1 + h * w, C]`, its input.
        grid: `(h, w)`.
        variant: `sclip` (rows sum to 2), `clearclip` or `naclip` (rows sum to 1).
        gaussian_std: standard deviation of `naclip`'s neighbourhood, in patches.

    Returns:
        `[B, heads, 1 + h * w, 1 + h * w]`.

    Raises:
        ValueError: another variant.
    """
    normed = layer.layer_norm1(hidden)
    query, key = (
        _split_heads(layer.self_attn, proj(normed)) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    scale = query.shape[-1] ** -0.5
    if variant == "clearclip":
        return _softmax(scale * query @ query.mT)
    if variant == "sclip":
        return _softmax(scale * query @ query.mT) + _softmax(scale * key @ key.mT)
    if variant != "naclip":
        raise ValueError(f"variant: got {variant!r}, expected sclip, clearclip or naclip")
    # The class token, first in rows and columns, has no position: the kernel is 0 there.
    kernel = nn.functional.pad(make_gaussian_kernel(grid, gaussian_std, hidden.device), (1, 0, 1, 0))
    return _softmax((scale * key @ key.mT).float() + kernel).to(key.dtype)


def mix_values(
    layer: Any,
    hidden: Tensor,
    grid: tuple[int, int],
    weights: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Return the patches' values, averaged by the same weights in every head; no class token, residual or MLP.

    Args:
        layer: the block whose values and output projection are used.
        hidden: `[B, 1 + h * w, C]`.
        grid: `(h, w)`.
        weights: `[B, n, n]`, rows that sum to 1, on CLIP's grid or on the one to which `rows` and `columns` resample.
        rows, columns: `[h', h]` and `[w', w]` with `n = h' * w'`: values are resampled before they are mixed.

    Returns:
        `[B, h', w', C]`.

    Raises:
        ValueError: weights of another number of patches.
    """
    value = layer.self_attn.v_proj(layer.layer_norm1(hidden[:, 1:])).unflatten(1, grid)
    value = resample_patches(value, rows, columns)
    target = value.shape[1:3]
    if weights.shape[1:] != (target[0] * target[1],) * 2:
        raise ValueError(
            f"affinity: got {tuple(weights.shape)}, expected [B, n, n] for {target[0]} x {target[1]} patches"
        )
    mixed = weights.to(value) @ value.flatten(1, 2)
    return layer.self_attn.out_proj(mixed).unflatten(1, target)


def resample_patches(patches: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return patches `[B, h, w, C]` on another grid.

    Args:
        patches: the patches.
        rows, columns: `[h', h]` and `[w', w]` weights; without both, the patches stay as they are.

    Returns:
        `[B, h', w', C]`.
    """
    if rows is None or columns is None:
        return patches
    return torch.einsum("ij,kl,bjlc->bikc", rows.to(patches), columns.to(patches), patches)


def compute_proxy_attention(affinity: Affinity) -> Tensor:
    """Return ProxyCLIP's attention `[B, n, n]`, rows sum to 1: `softmax(gamma (S - beta mean S))` without negatives.

    A patch always attends to itself, so that no row is empty where all patches look alike.
    """
    similarity = affinity.similarity.float()
    logits = affinity.gamma * (similarity - affinity.beta * similarity.mean((1, 2), keepdim=True))
    itself = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~itself, float("-inf")).softmax(-1)


def compute_scope_attention(affinity: Affinity) -> Tensor:
    """Return CorrCLIP's attention `[B, n, n]`, rows sum to 1: softmax of the scaled similarities inside the scope.

    Patches of one region attend to each other, those of different regions never. A pair with a patch of no region does
    where its similarity is above the mean of all pairs. A patch always attends to itself.

    Raises:
        ValueError: an affinity without regions, or with those of another grid.
    """
    similarity, regions = affinity.similarity.float(), affinity.regions
    if regions is None or regions.shape != similarity.shape[:2]:
        got = None if regions is None else tuple(regions.shape)
        raise ValueError(f"regions: got {got}, expected {tuple(similarity.shape[:2])}, one id for each patch")
    has_no_region = regions < 0
    is_similar = similarity > similarity.mean((1, 2), keepdim=True)
    is_same_region = regions[:, :, None] == regions[:, None]
    scope = torch.where(has_no_region[:, :, None] | has_no_region[:, None], is_similar, is_same_region)
    scope |= torch.eye(scope.shape[1], dtype=torch.bool, device=scope.device)
    return (affinity.branches.temperature * similarity).masked_fill(~scope, float("-inf")).softmax(-1)


def sum_branches(model: CLIPModel, states: list[Tensor], grid: tuple[int, int], affinity: Affinity) -> Tensor:
    """Return CorrCLIP's features before the projection: main, spatial and semantic branch, each after the final norm.

    Args:
        model: a CLIP.
        states: the inputs of the blocks, as `run_blocks` returns them.
        grid: `(h, w)`.
        affinity: with regions.

    Returns:
        `[B, h', w', C]`.
    """
    vision, branches = model.vision_model, affinity.branches
    weights = compute_scope_attention(affinity)
    layers = vision.encoder.layers
    attend = partial(mix_values, layers[-1], grid=grid, weights=weights, rows=affinity.rows, columns=affinity.columns)
    total = vision.post_layernorm(attend(states[-1]))
    if branches.spatial:
        first, last = branches.blocks(len(layers))
        # Entry i + 1 is the output of block i.
        mean_output = torch.stack(states[first + 1 : last + 2]).mean(0)
        total = total + branches.spatial * vision.post_layernorm(attend(mean_output))
    if branches.semantic:
        slots, members = find_region_members(affinity, grid)
        region_features = vision.post_layernorm(encode_regions(model, states, members))
        patch_features = region_features.gather(1, slots[:, :, None].expand(-1, -1, region_features.shape[2]))
        total = total + branches.semantic * patch_features.view_as(total)
    return total


def find_region_members(affinity: Affinity, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return which of CLIP's patches belong to each region.

    A region too small to hold the centre of any of CLIP's patches gets those in which its own patches lie.

    Args:
        affinity: with regions.
        grid: `(h, w)` of CLIP's patches.

    Returns:
        `slots` `[B, n]` int64, 0 for no region, else id + 1; `members` `[B, R, h * w]` bool, a row for each slot.

    Raises:
        ValueError: an affinity without regions.
    """
    regions = affinity.regions
    if regions is None:
        raise ValueError("regions: got none, which corrclip needs; give one id for each patch")
    slots = regions + 1
    count = int(slots.max()) + 1
    if affinity.rows is None or affinity.columns is None or affinity.patch_regions is None:
        return slots, nn.functional.one_hot(slots, count).mT.bool()
    # A region that is on CLIP's grid only belongs to no patch of the affinity's, so it counts as none.
    coarse = torch.where(affinity.patch_regions + 1 < count, affinity.patch_regions + 1, 0)
    members = nn.functional.one_hot(coarse, count).mT.bool()
    enclosing_patch = (affinity.rows.argmax(1)[:, None] * grid[1] + affinity.columns.argmax(1)).flatten()
    enclosing = torch.zeros_like(members).flatten(1).scatter(1, slots * members.shape[2] + enclosing_patch, True)
    return slots, members | (enclosing.view_as(members) & ~members.any(2, keepdim=True))


def encode_regions(model: CLIPModel, states: list[Tensor], members: Tensor) -> Tensor:
    """Return one copy of the class token for each region, which attends to the class token and its region's patches.

    The copies pass all blocks in full; class token and patches never attend to them.

    Args:
        model: a CLIP.
        states: the inputs of the blocks, as `run_blocks` returns them.
        members: `[B, R, h * w]` bool.

    Returns:
        `[B, R, C]`, the copies' outputs of the last block, before the final norm.
    """
    is_masked = ~nn.functional.pad(members, (1, 0), value=True)[:, None]
    token = states[0][:, :1].expand(-1, members.shape[1], -1)
    for layer, hidden in zip(model.vision_model.encoder.layers, states, strict=True):
        module = layer.self_attn
        normed = layer.layer_norm1(hidden)
        query = _split_heads(module, module.q_proj(layer.layer_norm1(token)))
        key, value = (_split_heads(module, proj(normed)) for proj in (module.k_proj, module.v_proj))
        logits = (query.shape[-1] ** -0.5 * query @ key.mT).masked_fill(is_masked, float("-inf"))
        token = token + module.out_proj((_softmax(logits) @ value).transpose(1, 2).flatten(2))
        token = token + layer.mlp(layer.layer_norm2(token))
    return token


def cosine_similarity(tokens: Tensor) -> Tensor:
    """Return the cosine similarities of `[..., h, w, C]` tokens, `[..., h * w, h * w]` float32."""
    flat = nn.functional.normalize(tokens.float().flatten(-3, -2), dim=-1)
    return flat @ flat.mT


def make_gaussian_kernel(grid: tuple[int, int], std: float, device: torch.device | None = None) -> Tensor:
    """Return NACLIP's kernel `[h * w, h * w]`: `exp(-d^2 / (2 std^2))` of the distance `d` between patches."""
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    positions = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    squares = (positions[:, None] - positions[None]).square().sum(-1)
    return torch.exp(-squares / (2 * std**2))


def _split_heads(module: Any, tokens: Tensor) -> Tensor:
    """Split `[B, N, C]` into `[B, heads, N, C / heads]`."""
    return tokens.unflatten(2, (module.num_heads, -1)).transpose(1, 2)


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax in the input's type, computed in float32 as in the model's own attention."""
    return logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
