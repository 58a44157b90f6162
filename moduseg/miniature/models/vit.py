"""The miniature ViT: a timm `VisionTransformer` of 1.2 M parameters with patches of 8 pixels.

Its patches are cut from the output of a convolution with stride 4 (timm's hybrid with a bare ResNetV2 stem) instead
of from the pixels: from pixels, so small a model learns colours at once and shapes hardly at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from moduseg.miniature.models.weights import load_weights

VIT_NAME = "vit_tiny_r_s16_p8_224"
VIT_ARGS: dict[str, Any] = {
    "img_size": 128,
    "patch_size": 2,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
    "dynamic_img_size": True,
}
"""Arguments of `timm.create_model(VIT_NAME, ...)` that make the miniature."""
VIT_MEAN = VIT_STD = (0.5, 0.5, 0.5)
"""Normalisation of inputs in [0, 1]."""


def build_miniature_vit(checkpoint: Path | None = None) -> Any:
    """Build the miniature ViT, in evaluation mode.

    Args:
        checkpoint: safetensors file; random weights if omitted.

    Returns:
        A timm model whose `forward_features` maps `[B, 3, H, W]` float32 (normalised by `VIT_MEAN`, `VIT_STD`; `H`
        and `W` multiples of 8) to `[B, 1 + H/8 * W/8, 128]` normalised tokens, the class token first.

    Raises:
        MissingError: no such file.
        ArtefactError: names or shapes do not fit the model.
    """
    model = timm.create_model(VIT_NAME, pretrained=False, **VIT_ARGS)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.eval()
