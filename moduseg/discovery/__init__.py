"""Image -> segments without names, which a matching to the truth scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.discovery.base import Discoverer
from moduseg.discovery.diffseg import DiffSegDiscoverer
from moduseg.discovery.iseg_propagation import ISegPropagationDiscoverer
from moduseg.discovery.tokens import KMeansDiscoverer, SpectralDiscoverer

DISCOVERERS: dict[str, type[Discoverer]] = {
    "diffseg": DiffSegDiscoverer,
    "iseg_propagation": ISegPropagationDiscoverer,
    "kmeans": KMeansDiscoverer,
    "spectral": SpectralDiscoverer,
}

__all__ = ["DISCOVERERS", "Discoverer", "build"]


def build(cfg: Mapping[str, Any], device: Device) -> Discoverer:
    """Return the discoverer that `cfg["name"]` names; no model is loaded.

    Args:
        cfg: its configuration.
        device: where models run.

    Raises:
        ConfigError: unknown name or key, or a value that the discoverer refuses.
    """
    return build_named("discoverer", DISCOVERERS, cfg, device=device)
