"""A timm ViT small enough for a test."""

from __future__ import annotations

from typing import Any

import torch

from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.devices import Device

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
"""Arguments of timm that make a model tiny."""


def make_vit(device: torch.device | None = None, **more: Any) -> TimmBackbone:
    """Return a tiny ViT with random weights; `more` are further options, `model_kwargs` beside those of `TINY`."""
    kwargs = TINY | more.pop("model_kwargs", {})
    device = device or torch.device("cpu")
    return TimmBackbone(TimmOptions("vit_tiny_patch16_224", model_kwargs=kwargs, **more), Device(device))
