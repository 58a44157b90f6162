"""Image + image-level labels -> class scores -> label map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moduseg.backbones.base import Backbone
from moduseg.config.construct import build_named, takes_key
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.cam import CamGenerator
from moduseg.pseudo_masks.cam_neighbours import NeighbourCamGenerator
from moduseg.pseudo_masks.class_tokens import ClassTokenGenerator
from moduseg.pseudo_masks.clip_dense import ClipDenseGenerator
from moduseg.pseudo_masks.corrclip import CorrClipGenerator
from moduseg.pseudo_masks.diffsegmenter import DiffSegmenterGenerator
from moduseg.pseudo_masks.files import FilePseudoMasks
from moduseg.pseudo_masks.fusion import PARTS, FusionGenerator
from moduseg.pseudo_masks.ground_truth import GroundTruthPseudoMasks
from moduseg.pseudo_masks.iseg import ISegGenerator
from moduseg.pseudo_masks.sam3_concepts import Sam3ConceptsGenerator

GENERATORS: dict[str, type[PseudoMaskGenerator]] = {
    "cam": CamGenerator,
    "cam_neighbours": NeighbourCamGenerator,
    "class_tokens": ClassTokenGenerator,
    "clip_dense": ClipDenseGenerator,
    "corrclip": CorrClipGenerator,
    "diffsegmenter": DiffSegmenterGenerator,
    "files": FilePseudoMasks,
    "fusion": FusionGenerator,
    "ground_truth": GroundTruthPseudoMasks,
    "iseg": ISegGenerator,
    "sam3_concepts": Sam3ConceptsGenerator,
}

__all__ = ["GENERATORS", "PseudoMaskGenerator", "build", "set_words"]


def set_words(cfg: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generator's configuration with the words of a vocabulary, in both parts of a fusion.

    Args:
        cfg: its configuration.
        words: `class_words` and `background_words`.

    Raises:
        ConfigError: a generator that compares no words.
    """
    name = str(cfg.get("name"))
    if name == "fusion":
        return {**cfg, **{part: set_words(cfg[part], words) for part in PARTS if isinstance(cfg.get(part), Mapping)}}
    if name not in GENERATORS:
        return dict(cfg)
    if not takes_key(GENERATORS[name], "class_words"):
        able = ", ".join(other for other, generator in GENERATORS.items() if takes_key(generator, "class_words"))
        raise ConfigError(
            f"pseudo_masks.generator.name: got {name!r}, which compares no words, expected one of {able} with a "
            "vocabulary; try pseudo_masks=clip_dense"
        )
    return {**cfg, **{key: value for key, value in words.items() if takes_key(GENERATORS[name], key)}}


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
