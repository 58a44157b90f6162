"""Image -> patch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip import ClipBackbone
from moduseg.backbones.concat import ConcatBackbone
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.backbones.token_cache import CachedBackbone, TokenStore
from moduseg.config.construct import build_named
from moduseg.devices import Device

BACKBONES: dict[str, type[Backbone]] = {"clip": ClipBackbone, "concat": ConcatBackbone, "timm": TimmBackbone}

__all__ = ["BACKBONES", "Backbone", "TimmBackbone", "TimmOptions", "build"]


def build(cfg: Mapping[str, Any], device: Device, where: str = "backbone", store: TokenStore | None = None) -> Backbone:
    """Return the backbone that `cfg["name"]` names, on `device`; its model is loaded on first use.

    Args:
        cfg: its configuration.
        device: where its model runs.
        where: the configuration key of `cfg`, for messages.
        store: keeps the tokens of every model; those of parts that are joined are kept one by one.

    Raises:
        ConfigError: unknown name or key, or a value that the backend refuses.
    """
    build_part = partial(build, device=device, store=store)
    backbone = build_named(where, BACKBONES, cfg, device=device, build_part=build_part)
    is_joined = isinstance(backbone, ConcatBackbone)
    return backbone if store is None or is_joined else CachedBackbone(backbone, store, cfg, device)
