"""Class-agnostic masks of an image. Each backend is one file; `build` makes the one that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.proposers.base import Proposer
from moduseg.proposers.contours import ContourProposer
from moduseg.proposers.files import FileProposer
from moduseg.proposers.ground_truth import GroundTruthProposer
from moduseg.proposers.sam import SamProposer
from moduseg.proposers.sam_transformers import SamTransformersProposer
from moduseg.proposers.superpixels import SuperpixelProposer
from moduseg.proposers.universal import UniversalProposer

PROPOSERS: dict[str, type[Proposer]] = {
    "contours": ContourProposer,
    "files": FileProposer,
    "ground_truth": GroundTruthProposer,
    "sam": SamProposer,
    "sam_transformers": SamTransformersProposer,
    "superpixels": SuperpixelProposer,
    "universal": UniversalProposer,
}


def build(cfg: Mapping[str, Any], device: Device) -> Proposer:
    """Build the proposer that `cfg["name"]` names, with the other keys of `cfg` as its options.

    Args:
        cfg: the configuration group `proposer`.
        device: passed to the backends that run a model.

    Raises:
        ConfigError: an unknown name or key, a wrong type, or a value out of range.
        MissingError: a folder or file that the backend needs is not there.
    """
    return build_named("proposer", PROPOSERS, cfg, device=device)


__all__ = ["PROPOSERS", "Proposer", "build"]
