"""A vision transformer with one class token for each class, whose attention is the map of the class.

One model serves two systems: class-specific token masking (Hanna and others, ICCV 2025) and MCTformer+ (Xu and others,
TPAMI 2024); `ClassTokenSettings` says which parts it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduseg.errors import ConfigError
from moduseg.pseudo_masks.head_gates import HeadGates

_START_DEVIATION = 0.02
_LOG_SCALE = 1e-4
"""Attention of which `head_mean=log` makes 0.7; one of hundreds of patches has about 0.003 where all have the same."""


@dataclass(frozen=True, kw_only=True)
class ClassTokenSettings:
    """Parts of a `MultiClassTokenViT`.

    Attributes:
        logits: how class tokens become logits: `linear`, one layer on all of them side by side; `single`, a layer for
            each class on its own token; `mean`, the mean over a token's channels.
        maps: `attention`, the class tokens' attention to the patches; `fused`, that times the class's map of a
            convolution on the patch tokens, which is trained too.
        register: whether a token follows the patches that stands for nothing.
        gates: whether each head has a Hard-Concrete gate.
        gate_start: what the gates' parameters start as; the larger, the more open.
        class_start: class tokens start as `random` numbers, as a `copy` of the model's own class token, or as the
            `prototype` of their class (`moduseg.pseudo_masks.class_token_start`), random until the fit has found it.
        final_norm: whether the ViT's norm comes before the classifier and the convolution; published without.
        map_blocks: last blocks whose attention makes the map; all if omitted.
        head_mean: what becomes of the heads' attention in the map: its `plain` mean, or that of its `log`arithm,
            `log(1 + attention / 0.0001)`: heads that look at different parts of an object then fill it together.
        patch_side: of the convolution, in patches, odd.
        pool: how patches become the logit of `fused`: `rank`, a mean in which they count by `pool_decay`; `logsumexp`,
            the logarithm of the mean of their exponentials.
        pool_decay: of `rank`: the weight of a patch is this to the power of its rank, largest first; 1 is the mean.
        affinity: whether the map is spread along the patches' attention to each other.
        class_block: block before which class tokens and register join the patches, counted from 0; published 0. Blocks
            before it see patches alone.
        frozen_blocks: first blocks that keep their weights, with patch embedding and positions if there are any.

    Raises:
        ValueError: a number out of range.
    """

    logits: Literal["linear", "single", "mean"] = "linear"
    maps: Literal["attention", "fused"] = "attention"
    register: bool = True
    gates: bool = True
    gate_start: float = 2.0
    class_start: Literal["random", "copy", "prototype"] = "random"
    final_norm: bool = False
    map_blocks: int | None = None
    head_mean: Literal["plain", "log"] = "plain"
    patch_side: int = 3
    pool: Literal["rank", "logsumexp"] = "rank"
    pool_decay: float = 0.996
    affinity: bool = False
    class_block: int = 0
    frozen_blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("class_block", "frozen_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more blocks; try 0")
        if self.map_blocks is not None and self.map_blocks < 1:
            raise ValueError(f"map_blocks: got {self.map_blocks}, expected 1 or more, or null for all; try 3")
        if self.patch_side < 1 or self.patch_side % 2 == 0:
            raise ValueError(f"patch_side: got {self.patch_side}, expected an odd number of patches; try 3")
        if not 0 < self.pool_decay <= 1:
            raise ValueError(f"pool_decay: got {self.pool_decay}, expected above 0 and up to 1; try 0.996")


@dataclass(frozen=True)
class ClassTokenOutput:
    """What a pass returns for `B` images, `C` classes, `L` blocks, `H` heads and a grid of `h x w` patches.

    Attributes:
        logits: `[B, C]`, of the class tokens.
        maps: `[B, C, h, w]`, at least 0: where each class is, of `ClassTokenSettings.maps`.
        attention: `[B, C, h, w]`, at least 0: the class tokens' attention to the patches after the gates, mean over the
            heads, sum over the blocks.
        tokens: `[L, B, C, D]`, the class tokens after each block.
        patch_logits: `[B, C]`, of the convolution; `None` for `attention`.
        heads: `[B, L, H, C, h, w]`, the attention of each head before its gate; `None` unless asked for.
    """

    logits: Tensor
    maps: Tensor
    attention: Tensor
    tokens: Tensor
    patch_logits: Tensor | None = None
    heads: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """`[B, C]`, of each class: what the patches say if there are logits of them, else what the class tokens do."""
        return (self.logits if self.patch_logits is None else self.patch_logits).sigmoid()


class MultiClassTokenViT(nn.Module):
    """Class tokens, patches and a register through the blocks of a timm ViT.

    The sequence is `[C class tokens | patches | register]`, each token with a position of its own; those of the patches
    are resampled (bicubic) to the image's grid.

    Args:
        vit: timm model; its patch embedding, positions and blocks become this model's, and its norm if
            `final_norm` says so.
        num_classes: `C`.
        settings: parts of the model.

    Raises:
        ConfigError: a model whose blocks are not those of timm's plain ViT, or that has too few of them.
    """

    def __init__(self, vit: Any, num_classes: int, settings: ClassTokenSettings) -> None:
        super().__init__()
        _check_blocks(vit, settings)
        self.settings, self.num_classes = settings, num_classes
        self.patch_embed, self.blocks, self.norm_pre = vit.patch_embed, vit.blocks, vit.norm_pre
        self.norm = vit.norm if settings.final_norm else nn.Identity()
        width = int(vit.embed_dim)
        num_prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
        self.patch_positions = nn.Parameter(vit.pos_embed.detach()[:, num_prefix:].clone())
        self.class_tokens = nn.Parameter(torch.zeros(num_classes, width))
        self.class_positions = nn.Parameter(torch.zeros(num_classes, width))
        if settings.class_start == "copy" and vit.cls_token is not None:
            self.class_tokens.data.copy_(vit.cls_token.detach()[0, :1].expand(num_classes, -1))
            if num_prefix:
                self.class_positions.data.copy_(vit.pos_embed.detach()[0, :1].expand(num_classes, -1))
        else:
            nn.init.trunc_normal_(self.class_tokens, std=_START_DEVIATION)
            nn.init.trunc_normal_(self.class_positions, std=_START_DEVIATION)
        if settings.register:
            self.register_token = nn.Parameter(torch.zeros(1, width))
            self.register_position = nn.Parameter(torch.zeros(1, width))
            nn.init.trunc_normal_(self.register_position, std=_START_DEVIATION)
        if settings.logits == "linear":
            self.classifier = nn.Linear(num_classes * width, num_classes)
            nn.init.trunc_normal_(self.classifier.weight, std=_START_DEVIATION)
            nn.init.zeros_(self.classifier.bias)
        elif settings.logits == "single":
            self.classifier_weight = nn.Parameter(torch.zeros(num_classes, width))
            self.classifier_bias = nn.Parameter(torch.zeros(num_classes))
            nn.init.trunc_normal_(self.classifier_weight, std=_START_DEVIATION)
        if settings.maps == "fused":
            self.patch_head = nn.Conv2d(width, num_classes, settings.patch_side, padding=settings.patch_side // 2)
        depth = len(self.blocks) - settings.class_block
        self.gates = HeadGates(depth, self.num_heads, settings.gate_start) if settings.gates else None
        if settings.frozen_blocks:
            self.patch_positions.requires_grad_(False)
            for part in (self.patch_embed, self.norm_pre, self.blocks[: settings.frozen_blocks]):
                part.requires_grad_(False)

    @property
    def num_heads(self) -> int:
        """Heads of a block."""
        return int(self.blocks[0].attn.num_heads)

    def forward(self, pixels: Tensor, keep: Tensor | None = None, *, keeps_heads: bool = False) -> ClassTokenOutput:
        """Pass normalised images through the model.

        Args:
            pixels: `[B, 3, H, W]` float, sides multiples of the patch.
            keep: `[B, C]` bool, the class tokens whose outputs reach the classifier; the others' become zeros. All if
                omitted.
            keeps_heads: whether the attention of each head is returned.
        """
        patches, grid = self.embed_patches(pixels)
        return self.attend(patches, grid, keep, keeps_heads=keeps_heads)

    def attend(
        self, patches: Tensor, grid: tuple[int, int], keep: Tensor | None = None, *, keeps_heads: bool = False
    ) -> ClassTokenOutput:
        """Pass what `embed_patches` returned on, `keep` and `keeps_heads` as in `forward`."""
        tokens = self._join(patches)
        num_classes, num_patches = self.num_classes, grid[0] * grid[1]
        gates = None if self.gates is None else self.gates()
        cells = slice(num_classes, num_classes + num_patches)
        class_attention, class_maps, patch_attention, class_tokens, heads = [], [], [], [], []
        num_rows = num_classes + (num_patches if self.settings.affinity else 0)
        for index, block in enumerate(self.blocks[self.settings.class_block :]):
            tokens, ungated = _attend(block, tokens, None if gates is None else gates[index], num_rows)
            attention = ungated if gates is None else ungated * gates[index][:, None, None]
            class_heads = attention[:, :, :num_classes, cells]
            class_attention.append(class_heads.mean(1))
            is_log = self.settings.head_mean == "log"
            class_maps.append((class_heads / _LOG_SCALE).log1p().mean(1) if is_log else class_attention[-1])
            class_tokens.append(tokens[:, :num_classes])
            if self.settings.affinity:
                patch_attention.append(attention[:, :, cells, cells].mean(1))
            if keeps_heads:
                heads.append(ungated[:, :, :num_classes, cells])
        outputs = tokens[:, :num_classes]
        tokens = self.norm(tokens)
        # The mean over the channels of a normalised token would be nearly the same for all.
        logits = self._classify(outputs if self.settings.logits == "mean" else tokens[:, :num_classes], keep)
        first_seen = -(self.settings.map_blocks or 0)
        attention = torch.stack(class_attention[first_seen:]).sum(0)
        maps, patch_logits = torch.stack(class_maps[first_seen:]).sum(0), None
        if self.settings.maps == "fused":
            features = tokens[:, cells].transpose(1, 2).unflatten(2, grid)
            evidence = self.patch_head(features)
            patch_logits = self._pool(evidence.flatten(2).float())
            maps = maps * evidence.flatten(2).relu().float()
        if self.settings.affinity:
            # Each patch takes what the patches that it attends to have.
            maps = maps @ torch.stack(patch_attention).sum(0).float().transpose(1, 2)
        return ClassTokenOutput(
            logits=logits.float(),
            maps=maps.unflatten(2, grid),
            attention=attention.unflatten(2, grid),
            tokens=torch.stack(class_tokens),
            patch_logits=patch_logits,
            heads=torch.stack(heads, 1).unflatten(4, grid) if keeps_heads else None,
        )

    def embed_patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the patches before class tokens join them, `[B, h * w, D]`, and the grid `(h, w)`."""
        patches = self.patch_embed(pixels)
        grid = (int(patches.shape[1]), int(patches.shape[2]))
        patches = self.norm_pre(patches.flatten(1, 2) + self._resample_positions(grid))
        for block in self.blocks[: self.settings.class_block]:
            patches = block(patches)
        return patches, grid

    def _join(self, patches: Tensor) -> Tensor:
        """Return the sequence of tokens `[B, C + h * w (+ 1), D]`."""
        classes = self.norm_pre(self.class_tokens + self.class_positions).expand(len(patches), -1, -1)
        parts = [classes, patches]
        if self.settings.register:
            parts.append(self.norm_pre(self.register_token + self.register_position).expand(len(patches), -1, -1))
        # Under autocast the patches come in a lower precision than the parameters.
        return torch.cat([part.to(patches.dtype) for part in parts], dim=1)

    def _resample_positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of the patches on a grid, `[1, h * w, D]`."""
        trained = tuple(self.patch_embed.grid_size)
        if grid == trained:
            return self.patch_positions
        square = self.patch_positions.transpose(1, 2).unflatten(2, trained)
        return F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def _pool(self, evidence: Tensor) -> Tensor:
        """Return the logits `[B, C]` of `[B, C, N]`."""
        if self.settings.pool == "logsumexp":
            return evidence.logsumexp(2) - math.log(evidence.shape[2])
        return pool_by_rank(evidence, self.settings.pool_decay)

    def _classify(self, outputs: Tensor, keep: Tensor | None) -> Tensor:
        """Return logits `[B, C]` of the class tokens' outputs `[B, C, D]`."""
        if keep is not None:
            outputs = mask_outputs(outputs, keep)
        if self.settings.logits == "linear":
            return self.classifier(outputs.flatten(1))
        if self.settings.logits == "single":
            return (outputs * self.classifier_weight).sum(2) + self.classifier_bias
        return outputs.float().mean(2)


def mask_outputs(outputs: Tensor, keep: Tensor) -> Tensor:
    """Return `[B, C, D]` outputs with zeros where `keep` `[B, C]` is false."""
    return outputs * keep[:, :, None].to(outputs.dtype)


def draw_kept(tags: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Return which class tokens' outputs are kept in a training step.

    Args:
        tags: `[..., C]` bool, classes that an image has; they are always kept.
        rate: probability with which an absent class is not, independently of the others.
        generator: that the draws come from.

    Returns:
        `[..., C]` bool.
    """
    return tags | (torch.rand(tags.shape, generator=generator) >= rate)


def pool_by_rank(maps: Tensor, decay: float) -> Tensor:
    """Return weighted means `[B, C]` of maps `[B, C, N]`: the patch of rank `r`, largest first, has `decay ** r`."""
    if decay == 1:
        return maps.mean(2)
    weights = decay ** torch.arange(maps.shape[2], device=maps.device, dtype=maps.dtype)
    return maps.sort(dim=2, descending=True).values @ (weights / weights.sum())


def compute_diversity(attention: Tensor) -> Tensor:
    """Return how much the maps of different classes overlap, a scalar of 0 or more.

    With the maps scaled to length 1 as the rows of `M`, it is the Frobenius norm of `M M' - I`, mean over the images.

    Args:
        attention: `[B, C, h, w]`, at least 0.
    """
    maps = F.normalize(attention.flatten(2).float(), dim=2)
    overlap = maps @ maps.transpose(1, 2) - torch.eye(maps.shape[1], device=maps.device)
    # The norm of an exact zero has no gradient.
    return (overlap.square().sum((1, 2)) + 1e-12).sqrt().mean()


def compute_contrast(tokens: Tensor, tags: Tensor) -> Tensor:
    """Return how alike the class tokens of an image are, a scalar of 0 or more.

    In each block each present class's token has to be told from the others' by its cosine: a cross-entropy over the
    classes, mean over present classes, images and blocks.

    Args:
        tokens: `[L, B, C, D]`.
        tags: `[B, C]` in {0, 1}.
    """
    directions = F.normalize(tokens.float(), dim=3)
    cosines = directions @ directions.transpose(2, 3)
    losses = -cosines.log_softmax(3).diagonal(dim1=2, dim2=3)
    weights = tags.float() / tags.float().sum(1, keepdim=True).clamp(min=1)
    return (losses * weights).sum(2).mean()


def _attend(block: Any, tokens: Tensor, gates: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """Run a block of timm's ViT whose heads are multiplied by gates.

    A gate behind the softmax scales all that its head returns, so that PyTorch's fused attention serves: of the
    attention itself only the rows that make maps are computed.

    Args:
        block: the block.
        tokens: `[B, N, D]`.
        gates: `[H]`; all open if `None`.
        num_rows: number of the first tokens whose attention is returned.

    Returns:
        The tokens, and the attention `[B, H, num_rows, N]` before the gates.
    """
    layer = block.attn
    mixed = layer.qkv(block.norm1(tokens)).unflatten(2, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    queries, keys, values = mixed.unbind(0)
    queries, keys = layer.q_norm(queries), layer.k_norm(keys)
    attention = (queries[:, :, :num_rows] * layer.scale @ keys.transpose(2, 3)).softmax(3)
    dropout = layer.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=layer.scale)
    if gates is not None:
        mixed = mixed * gates[:, None, None].to(mixed.dtype)
    mixed = layer.proj_drop(layer.proj(layer.norm(mixed.transpose(1, 2).flatten(2))))
    tokens = tokens + block.drop_path1(block.ls1(mixed))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), attention


def _check_blocks(vit: Any, settings: ClassTokenSettings) -> None:
    """Raise ConfigError unless `_attend` computes what the model's blocks do."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    blocks = list(getattr(vit, "blocks", ()))
    is_plain = blocks and all(
        type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
        for block in blocks
    )
    if not is_plain or getattr(vit, "pos_embed", None) is None or not hasattr(vit, "norm_pre"):
        raise ConfigError(
            f"pseudo_masks.generator.model: got {type(vit).__name__}, expected timm's plain VisionTransformer with "
            "learned positions; try deit_small_patch16_224 or vit_base_patch14_dinov2"
        )
    num_seen = len(blocks) - settings.class_block
    for name, value, limit, remedy in (
        ("class_block", settings.class_block, len(blocks) - 1, "try 0"),
        ("frozen_blocks", settings.frozen_blocks, len(blocks), "try 0"),
        ("map_blocks", settings.map_blocks or 0, num_seen, "null takes all"),
    ):
        if value > limit:
            raise ConfigError(
                f"pseudo_masks.generator.{name}: got {value}, expected at most {limit}, since the model has "
                f"{len(blocks)} blocks and class tokens see {num_seen}; {remedy}"
            )
