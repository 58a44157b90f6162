"""The miniature ViT as a teacher: other image encoders learn to predict its patch tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moduseg.miniature.models.inputs import normalize_pixels
from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD, build_miniature_vit
from moduseg.miniature.models.weights import weights_path
from moduseg.miniature.training.loop import TrainingSettings


def load_teacher(weights: str | None, device: torch.device) -> Any | None:
    """Load the miniature ViT from a file; `"vit"` stands for the shipped one, `None` for no teacher.

    Raises:
        MissingError: no such file.
        ArtefactError: names or shapes do not fit the model.
    """
    if weights is None:
        return None
    return build_miniature_vit(weights_path("vit") if weights == "vit" else Path(weights)).to(device)


@dataclass
class TeacherSettings(TrainingSettings):
    """Settings of the trainings that a teacher helps.

    Args:
        teacher: weights of the miniature ViT whose tokens are predicted: a file, `"vit"` for the shipped ones, or none.
        teacher_weight: weight of that prediction in the loss.
    """

    teacher: str | None = None
    teacher_weight: float = 1.0


def prediction_loss(predicted: torch.Tensor, teacher: Any | None, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance to the teacher's patch tokens, each of zero mean and unit variance.

    Args:
        predicted: `[B, N, C]`.
        teacher: the miniature ViT; `None` gives a loss of zero.
        pixels: `[B, 3, H, W]` in [0, 1].
    """
    if teacher is None:
        return predicted.new_zeros(())
    with torch.no_grad():
        tokens = teacher.forward_features(normalize_pixels(pixels, VIT_MEAN, VIT_STD))[:, teacher.num_prefix_tokens :]
    return F.mse_loss(predicted.float(), F.layer_norm(tokens.float(), tokens.shape[-1:]))
