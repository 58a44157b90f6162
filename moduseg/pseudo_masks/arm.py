"""An ARM of a generator's settings: found, checked against its CLIP, and applied to token maps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from moduseg.backbones.arm import Arm, ArmRecord, check_widths, load_arm, read_record
from moduseg.backbones.clip_model import ClipSource
from moduseg.devices import Device
from moduseg.files import file_digest
from moduseg.structures import TokenMap
from moduseg.weights.sources import find_weights

log = logging.getLogger("moduseg")


class ArmSource:
    """The file of an ARM, read on first use.

    Args:
        weights: what the configuration names; see `moduseg.weights.sources.find_weights`.
        source: the CLIP whose features are refined.
    """

    def __init__(self, weights: str, source: ClipSource) -> None:
        self._weights, self._source = weights, source
        self._key = source.key.rsplit(".", 1)[0] + ".arm"

    @cached_property
    def _path(self) -> Path:
        return find_weights(self._weights, self._key)

    @cached_property
    def record(self) -> ArmRecord:
        """What the file says of itself, which fits the CLIP.

        Raises:
            MissingError: there is no such file.
            ArtefactError: it holds no ARM.
            ConfigError: other widths or fewer blocks than the CLIP's.
        """
        record = read_record(self._path, self._key)
        sizes = self._source.sizes
        check_widths(
            record.shape,
            self._path,
            self._key,
            shallow_width=sizes.width,
            deep_width=sizes.joint_width,
            depth=sizes.depth,
        )
        return record

    @property
    def digest(self) -> str:
        """sha256 of the file, which fits the CLIP; errors are those of `record`."""
        self.record  # noqa: B018 - checks the file
        return file_digest(self._path)

    def load(self) -> Arm:
        """Return the ARM on the CLIP's device; errors are those of `record`."""
        if self.record.clip != self._source.digest:
            log.warning(
                "%s: %s was trained beside a CLIP of other weights than %s",
                *(self._key, self._path, self._source.options.weights),
            )
        return load_arm(self._path, self._key).to(self._source.device.torch_device)


def refine_maps(arm: Arm, maps: Sequence[TokenMap], device: Device) -> list[TokenMap]:
    """Return token maps whose features an ARM has sharpened.

    Args:
        arm: the module.
        maps: their tokens are features with the mean output of the shallow blocks appended.
        device: where the module runs, and in which precision.

    Returns:
        float32 maps without the shallow features, in the order of `maps`.
    """
    refined: dict[int, TokenMap] = {}
    members: dict[tuple[int, int], list[int]] = {}
    for index, token_map in enumerate(maps):
        members.setdefault((token_map.tokens.shape[0], token_map.tokens.shape[1]), []).append(index)
    for group in members.values():
        tokens = torch.stack([maps[index].tokens for index in group])
        deep_width = arm.shape.deep_width
        with device.autocast():
            features = arm(tokens[..., :deep_width], tokens[..., deep_width:]).float()
        for index, grid in zip(group, features, strict=True):
            refined[index] = dataclasses.replace(maps[index], tokens=grid)
    return [refined[index] for index in range(len(maps))]
