"""Class scores as bytes: half precision, compressed, without code that reading could execute."""

from __future__ import annotations

import zlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from moduseg.errors import DataError
from moduseg.structures import ScoreMaps

SUFFIX = ".safetensors.z"
"""Suffix of a stored file: a zlib stream of a safetensors file with `class_ids`, `scores` and, where there are any,
`background` and `ignore`."""

_COMPRESSION = 1
"""Level of zlib, 1 to 9: the default, 6, takes twice the time for the same size. Any level is read alike."""


def pack(maps: ScoreMaps) -> bytes:
    """Return scores as bytes, in float16, whose step is 0.0005 near 1 and finer below."""
    tensors = {
        "class_ids": torch.tensor(maps.class_ids, dtype=torch.int32),
        "scores": maps.scores.half().cpu().contiguous(),
    }
    if maps.background is not None:
        tensors["background"] = maps.background.half().cpu().contiguous()
    if maps.ignore is not None:
        tensors["ignore"] = maps.ignore.to(torch.uint8).cpu().contiguous()
    return zlib.compress(save(tensors), _COMPRESSION)


def unpack(data: bytes, device: torch.device | None = None, name: str = "scores") -> ScoreMaps:
    """Return the scores that `pack` wrote, as float32.

    Args:
        data: of a stored file.
        device: where the scores are put; the CPU if omitted.
        name: of the file, for messages.

    Raises:
        DataError: not a stored score file, or a damaged one.
    """
    try:
        tensors = {key: tensor.to(device or tensor.device) for key, tensor in load(zlib.decompress(data)).items()}
        background, ignore = tensors.get("background"), tensors.get("ignore")
        return ScoreMaps(
            tuple(int(i) for i in tensors["class_ids"].tolist()),
            tensors["scores"].float(),
            None if background is None else background.float(),
            None if ignore is None else ignore.bool(),
        )
    except (zlib.error, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{name}: not readable as class scores ({error}); remove the file and run again") from error
