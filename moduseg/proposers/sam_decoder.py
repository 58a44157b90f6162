"""`segment_anything`'s SAM as a promptable model: its modules and weights, with less computation.

The mask decoder is run step by step: until the first image update every point attends to the same image, whose keys,
values and queries are projected once; masks are decoded only of points one of whose predicted IoUs passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.devices import Device, copy_arrays
from moduseg.proposers.mask_generation import Decoded, Promptable
from moduseg.proposers.mask_upsampling import Embedded
from moduseg.proposers.sam_attention import RelativeAttention

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


class PackagedSam(Promptable):
    """A SAM of `segment_anything`, on its device and in evaluation mode.

    Args:
        sam: the model; the attention of its image encoder is replaced by one that computes the same.
        device: precision holds for the image encoder; prompts and masks stay in float32.
        compiled: have `torch.compile` translate the image encoder, at its first pass.
    """

    def __init__(self, sam: Sam, device: Device, *, compiled: bool = False) -> None:
        self._sam, self._device = sam, device
        for block in sam.image_encoder.blocks:
            block.attn = RelativeAttention(block.attn, block.attn.num_heads)
        if compiled:
            sam.image_encoder.compile()
        self.threshold = sam.mask_threshold

    @property
    def device(self) -> torch.device:
        return self._device.torch_device

    @cached_property
    def _positions(self) -> Tensor:
        """Positions of the embedding's cells, `[1, C, h, w]`."""
        positions: Tensor = self._sam.prompt_encoder.get_dense_pe()
        return positions

    @property
    def side(self) -> int:
        """Side of the model's square input, in pixels."""
        return int(self._sam.image_encoder.img_size)

    def embed(self, image: np.ndarray) -> Embedded:
        return self.embed_batch([image])[0]

    def embed_batch(self, images: Sequence[np.ndarray]) -> list[Embedded]:
        """Return the embeddings of several images in one pass: all are padded to one square, whatever their sizes."""
        from segment_anything.utils.transforms import ResizeLongestSide

        resize = ResizeLongestSide(self.side).apply_image
        on_device = copy_arrays([resize(image) for image in images], self.device)
        resized = [image.permute(2, 0, 1) for image in on_device]
        pixels = torch.cat([self._sam.preprocess(image[None]) for image in resized])
        with self._device.autocast():
            features = self._sam.image_encoder(pixels).float()
        return [
            Embedded(
                features[row : row + 1],
                (image.shape[0], image.shape[1]),
                (small.shape[1], small.shape[2]),
                (self.side, self.side),
            )
            for row, (image, small) in enumerate(zip(images, resized, strict=True))
        ]

    def decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        with self._device.run_uncast():
            return self._decode(embedded, points, min_iou)

    def _decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        """Run the prompt encoder and the mask decoder once."""
        prompts, decoder = self._sam.prompt_encoder, self._sam.mask_decoder
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(len(points), -1, -1), _embed_points(prompts, points)], dim=1)
        image = embedded.features + prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        queries, keys = _run_two_way(decoder.transformer, image, self._positions, tokens)
        # The first mask token is for several prompts at once; a single point has the others.
        predicted_iou = decoder.iou_prediction_head(queries[:, 0])[:, 1:]
        passed = predicted_iou > min_iou if min_iou > 0 else torch.ones_like(predicted_iou, dtype=torch.bool)
        has_passed = passed.any(1)
        # The host waits for the device here and nowhere else, and learns both sizes.
        num_rows, num_masks = torch.stack([has_passed.sum(), passed.sum()]).tolist()
        rows = _find_true(has_passed, num_rows)
        chosen = _find_true(passed[rows].flatten(), num_masks)
        grid = embedded.features.shape[-2:]
        upscaled = decoder.output_upscaling(keys[rows].transpose(1, 2).unflatten(2, grid))
        hyper = torch.stack(
            [mlp(queries[rows, 1 + token]) for token, mlp in enumerate(decoder.output_hypernetworks_mlps) if token > 0],
            dim=1,
        )
        logits = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return Decoded(logits.flatten(0, 1)[chosen], predicted_iou[rows].flatten()[chosen])


def _embed_points(prompts: Any, points: Tensor) -> Tensor:
    """Run `PromptEncoder` on foreground points `[P, 2]`, each followed by the point that stands for no box.

    The encoder itself looks for the two kinds of points, which makes the host wait for the device six times.

    Returns:
        `[P, 2, C]`.
    """
    centres = points[:, None] + 0.5
    positions = prompts.pe_layer.forward_with_coords(
        torch.cat([centres, torch.zeros_like(centres)], dim=1), prompts.input_image_size
    )
    foreground = positions[:, 0] + prompts.point_embeddings[1].weight
    return torch.stack([foreground, prompts.not_a_point_embed.weight.expand_as(foreground)], dim=1)


def _find_true(flags: Tensor, count: int) -> Tensor:
    """Return the indices of the true ones of `[N]` flags, in order, without waiting: how many there are is known."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _run_two_way(transformer: Any, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run `TwoWayTransformer` for many prompts on one image.

    Args:
        transformer: `segment_anything.modeling.TwoWayTransformer`.
        image, image_pe: `[1, C, h, w]`, the embedding (with that of no mask) and its positions.
        tokens: `[P, T, C]`.

    Returns:
        Tokens `[P, T, C]` and image `[P, h * w, C]`.
    """
    keys, key_pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
    queries = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = layer.norm1(_attend(layer.self_attn, queries, queries, queries))
        else:
            query = queries + tokens
            queries = layer.norm1(queries + _attend(layer.self_attn, query, query, queries))
        key = keys + key_pe
        queries = layer.norm2(queries + _attend(layer.cross_attn_token_to_image, queries + tokens, key, keys))
        queries = layer.norm3(queries + layer.mlp(queries))
        # In the first layer `keys` has one row, which serves all prompts; from here on each prompt has its own.
        keys = layer.norm4(keys + _attend(layer.cross_attn_image_to_token, key, queries + tokens, queries))
    query = queries + tokens
    queries = queries + _attend(transformer.final_attn_token_to_image, query, keys + key_pe, keys)
    return transformer.norm_final_attn(queries), keys


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run `segment_anything`'s attention; one row of queries, or of keys and values, may serve all prompts."""
    heads = attention.num_heads
    q = attention.q_proj(query).unflatten(2, (heads, -1)).transpose(1, 2)
    k = attention.k_proj(key).unflatten(2, (heads, -1)).transpose(1, 2)
    v = attention.v_proj(value).unflatten(2, (heads, -1)).transpose(1, 2)
    prompts, length = len(q), q.shape[2]
    if len(k) == 1 < prompts:
        # One image for all prompts: their tokens are one long row of queries.
        q = q.transpose(0, 1).flatten(1, 2)[None]
        out = F.scaled_dot_product_attention(q, k, v)[0].unflatten(1, (prompts, length)).transpose(0, 1)
    elif q.device.type == "cpu" and k.shape[2] < 64:
        # With few keys, softmax over the last dimension is what takes the time on a CPU.
        weights = (k @ (q / math.sqrt(q.shape[-1])).transpose(2, 3)).softmax(2)
        out = weights.transpose(2, 3) @ v
    else:
        out = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)
    result: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return result
