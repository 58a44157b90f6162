"""Image + image-level labels -> class scores -> label map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    cfg: Mapping[str, Any],
    device: Device,
    backbone: Callable[[], Backbone],
    classes: Sequence[str],
    where: str = "pseudo_masks.generator",
) -> PseudoMaskGenerator:
    """Return the generator that `cfg["name"]` names; no model is loaded.

    Args:
        cfg: its configuration.
        device: where scores are computed.
        backbone: makes the run's backbone; called by generators that need one, on first use.
        classes: class names of the data set, background first.
        where: the configuration key of `cfg`, for messages.

    Raises:
        ConfigError: unknown name or key, or a value that the generator refuses.
    """
    supplied: dict[str, Any] = {"device": device, "backbone": backbone, "classes": tuple(classes)}
    return build_named(where, GENERATORS, cfg, **supplied, build_part=partial(build, **supplied))
