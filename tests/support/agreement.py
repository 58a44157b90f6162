"""Ours against other implementations, on the same random weights: `python -m tests.support.agreement` prints the table.

A comparison makes a tiny model of the other library, writes its weights under the names of a published checkpoint, and
loads them through the backend; so the loader, the normalisation and the padding are compared as well.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

COMPARISONS = [
    "tests.support.agree_vit:compare_dinov2",
    "tests.support.agree_vit:compare_dinov3",
    "tests.support.agree_vit:compare_dino",
    "tests.support.agree_vit:compare_siglip",
    "tests.support.agree_vit:compare_radio",
    "tests.support.agree_clip:compare_clip",
    "tests.support.agree_sam:compare_sam",
    "tests.support.agree_sam:compare_packaged",
    "tests.support.agree_sam:compare_sam_hq",
]
"""Where each comparison is; it takes an empty folder and returns its rows."""
TOLERANCE = 1e-4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, and the largest difference over the largest value."""

    model: str
    implementations: str
    output: str
    size: str
    error: float


def measure_relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def picture(height: int, width: int) -> np.ndarray:
    """Return `[height, width, 3]` uint8 noise."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_padded_input(image: np.ndarray, patch: int) -> Tensor:
    """Return the normalised image, padded with black to a multiple of the patch, `[1, 3, H', W']`; in numpy."""
    height, width = (-(-side // patch) * patch for side in image.shape[:2])
    canvas = np.zeros((height, width, 3), np.float32)
    canvas[: image.shape[0], : image.shape[1]] = image / np.float32(255)
    return torch.from_numpy((canvas - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Make every tensor random and large enough to matter: also norms, biases, layer scales and positions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "pos" in name or "token" in name or "class" in name:
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            parameter.copy_(2 * noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(noise * 0.2 + (1.0 if name.endswith(("norm.weight", "gamma", "lambda1")) else 0.0))
    return model.eval()


def rename_tensors(state: State, rules: Iterable[tuple[str, str]]) -> State:
    """Return the tensors under other names; queries, keys and values of a block become one tensor."""
    result: State = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        result[new] = tensor
    for name in [n for n in result if ".q." in n]:
        parts = [result.pop(name.replace(".q.", f".{part}."), None) for part in "qkv"]
        assert all(part is not None for part in parts), name
        result[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return result


def encode_tokens(backbone: Any, image: np.ndarray) -> Tensor:
    """Return the tokens of an image, `[n, C]`."""
    return backbone.tokens([image])[0].tokens.flatten(0, 1)


def compare_tokens(
    model: str, implementations: str, backbone: Any, image: np.ndarray, theirs: Tensor, *, output: str = "patch tokens"
) -> Row:
    """Return the row of a backbone's tokens of an image beside another implementation's."""
    error = measure_relative_error(encode_tokens(backbone, image), theirs)
    return Row(model, implementations, output, f"{image.shape[0]} x {image.shape[1]}", error)


def to_markdown(rows: Iterable[Row]) -> str:
    """Return the rows as a table."""
    lines = ["| model | implementations | output | size | max relative error |", "|---|---|---|---|---:|"]
    lines += [f"| {r.model} | {r.implementations} | {r.output} | {r.size} | {r.error:.1e} |" for r in rows]
    return "\n".join(lines)


def find_comparison(name: str) -> Callable[[Path], list[Row]]:
    """Return the comparison that an entry of `COMPARISONS` names."""
    module, function = name.split(":")
    comparison: Callable[[Path], list[Row]] = getattr(importlib.import_module(module), function)
    return comparison


if __name__ == "__main__":
    table: list[Row] = []
    for entry in COMPARISONS:
        with tempfile.TemporaryDirectory() as temporary:
            table += find_comparison(entry)(Path(temporary))
    print(to_markdown(table))
    sys.exit(any(not r.error < TOLERANCE for r in table))
