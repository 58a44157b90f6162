"""Image + image-level labels -> class scores -> label map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moduseg.backbones.base import Backbone
from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.cam import CamGenerator
from moduseg.pseudo_masks.cam_neighbours import NeighbourCamGenerator
from moduseg.pseudo_masks.clip_dense import ClipDenseGenerator
from moduseg.pseudo_masks.corrclip import CorrClipGenerator
from moduseg.pseudo_masks.files import FilePseudoMasks
from moduseg.pseudo_masks.fusion import FusionGenerator
from moduseg.pseudo_masks.ground_truth import GroundTruthPseudoMasks

GENERATORS: dict[str, type[PseudoMaskGenerator]] = {
    "cam": CamGenerator,
    "cam_neighbours": NeighbourCamGenerator,
    "clip_dense": ClipDenseGenerator,
    "corrclip": CorrClipGenerator,
    "files": FilePseudoMasks,
    "fusion": FusionGenerator,
    "ground_truth": GroundTruthPseudoMasks,
}

__all__ = ["GENERATORS", "PseudoMaskGenerator", "build"]


def build(
    cfg: Mapping[str, Any], device: Device, backbone: Callable[[], Backbone], classes: Sequence[str]
) -> PseudoMaskGenerator:
    """The generator that `cfg["name"]` names; no model is loaded.

    Args:
        cfg: `pseudo_masks.generator` of the configuration.
        device: where scores are computed.
        backbone: makes the run's backbone; called by generators that need one, on first use.
        classes: class names of the data set, background first.

    Raises:
        ConfigError: unknown name or key, or a value that the generator refuses.
    """
    return build_named(
        "pseudo_masks.generator", GENERATORS, cfg, device=device, backbone=backbone, classes=tuple(classes)
    )
