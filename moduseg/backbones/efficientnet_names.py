"""Names of EfficientNet's tensors: those of PyTorch ports with TensorFlow's weights (`_blocks.3._bn1`), and timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""Layers of a block that first widens its input."""
_PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
"""Layers of the other blocks, those of the first stage."""


def has_port_names(state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have the names of those ports."""
    return "_conv_stem.weight" in state


def to_timm_names(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the tensors under timm's names, in the order of `state`.

    The ports number the blocks of all stages in one row; timm counts stages, and blocks in each.

    Args:
        state: tensors by the ports' names.
        model: timm's EfficientNet of the same architecture.

    Returns:
        The same tensors; what has no counterpart keeps its name.
    """
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    return {_translate(name, blocks, state): tensor for name, tensor in state.items()}


def _translate(name: str, blocks: list[str], state: Mapping[str, Tensor]) -> str:
    """Return timm's name of a tensor; `blocks` are timm's names of all blocks in order."""
    parts = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", name)
    if parts is None:
        return name
    number, layer, tensor = parts.groups()
    if number is None:
        return f"{_OUTER[layer]}.{tensor}" if layer in _OUTER else name
    layers = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN
    if int(number) >= len(blocks) or layer not in layers:
        return name
    return f"{blocks[int(number)]}.{layers[layer]}.{tensor}"
