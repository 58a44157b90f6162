"""The miniature SAM: the classes of `segment_anything.modeling` at a small size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moduseg.miniature.models.weights import load_weights

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

SAM_SIZE = 128
SAM_PATCH = 8
SAM_WIDTH = 128
SAM_DEPTH = 5
SAM_HEADS = 4
SAM_GLOBAL_BLOCKS = (1, 4)
SAM_WINDOW = 8
SAM_DECODER_WIDTH = 64
SAM_GENERATOR: dict[str, Any] = {
    "points_per_side": 14,
    "points_per_batch": 256,
    "pred_iou_thresh": 0.4,
    "stability_score_thresh": 0.6,
    "box_nms_thresh": 0.9,
}
"""Options of `SamAutomaticMaskGenerator` that suit the miniature."""


def build_miniature_sam(checkpoint: Path | None = None) -> Sam:
    """Build the miniature SAM, in evaluation mode, for `SamPredictor` and `SamAutomaticMaskGenerator` as they are.

    Images are resized so that their longest side is 128, normalised by SAM's own pixel mean and deviation, and padded
    to a square. It was trained on single foreground points: boxes and mask prompts are accepted but were not learnt.

    Args:
        checkpoint: safetensors file; random weights if omitted.

    Raises:
        MissingError: no such file.
        ArtefactError: names or shapes do not fit the model.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = SAM_SIZE // SAM_PATCH
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=SAM_SIZE,
            patch_size=SAM_PATCH,
            embed_dim=SAM_WIDTH,
            depth=SAM_DEPTH,
            num_heads=SAM_HEADS,
            mlp_ratio=4,
            out_chans=SAM_DECODER_WIDTH,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=SAM_WINDOW,
            global_attn_indexes=SAM_GLOBAL_BLOCKS,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=SAM_DECODER_WIDTH,
            image_embedding_size=(grid, grid),
            input_image_size=(SAM_SIZE, SAM_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=SAM_DECODER_WIDTH, mlp_dim=4 * SAM_DECODER_WIDTH, num_heads=4
            ),
            transformer_dim=SAM_DECODER_WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=SAM_DECODER_WIDTH,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    if checkpoint is not None:
        load_weights(sam, checkpoint)
    return sam.eval()
