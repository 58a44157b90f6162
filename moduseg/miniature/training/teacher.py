"""The miniature ViT as teacher: other image encoders learn to predict its patch tokens while they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD, build_miniature_vit
from moduseg.miniature.models.weights import weights_path


def load_teacher(weights: str | None, device: torch.device) -> Any | None:
    """The miniature ViT of a file, the shipped one for `"vit"`, or none.

    Raises:
        MissingError, ArtefactError: see `load_weights`.
    """
    if weights is None:
        return None
    return build_miniature_vit(weights_path("vit") if weights == "vit" else Path(weights)).to(device)


def prediction_loss(predicted: torch.Tensor, teacher: Any | None, pixels: torch.Tensor) -> torch.Tensor:
    """Mean squared distance to the teacher's patch tokens, each brought to zero mean and unit variance.

    Args:
        predicted: `[B, N, C]`.
        teacher: the miniature ViT; without one the loss is zero.
        pixels: `[B, 3, H, W]` in [0, 1].
    """
    if teacher is None:
        return predicted.new_zeros(())
    with torch.no_grad():
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (VIT_MEAN, VIT_STD))
        tokens = teacher.forward_features((pixels - mean) / std)[:, teacher.num_prefix_tokens :]
    return F.mse_loss(predicted.float(), F.layer_norm(tokens.float(), tokens.shape[-1:]))
