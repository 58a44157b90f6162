"""Class scores as bytes: half precision, compressed, without code that reading could execute."""

from __future__ import annotations

import zlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from moduseg.errors import DataError
from moduseg.structures import ScoreMaps

SUFFIX = ".safetensors.z"
"""Suffix of a stored file: a zlib stream of a safetensors file with `class_ids`, `scores` and, where there are any,
`background` and `ignore`; also `size`, the image's, if scores and background are stored smaller."""

_COMPRESSION = 1
"""Level of zlib, 1 to 9: the default, 6, takes twice the time and saves a tenth at most. Any level is read alike."""


def pack(maps: ScoreMaps, *, bits: int = 16, scale: int = 1) -> bytes:
    """Return scores as bytes.

    Args:
        maps: the scores.
        bits: 16 for float16, whose step is 0.0005 near 1 and finer below; 8 for steps of 1/255.
        scale: scores are averaged over squares of this side, in pixels.
    """
    tensors = {"class_ids": torch.tensor(maps.class_ids, dtype=torch.int32)}
    if scale > 1:
        tensors["size"] = torch.tensor(maps.scores.shape[1:], dtype=torch.int32)
    tensors["scores"] = _shrink(maps.scores, bits, scale)
    if maps.background is not None:
        tensors["background"] = _shrink(maps.background[None], bits, scale)[0]
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
        size = tuple(tensors["size"].tolist()) if "size" in tensors else None
        return ScoreMaps(
            tuple(int(i) for i in tensors["class_ids"].tolist()),
            _enlarge(tensors["scores"], size),
            None if background is None else _enlarge(background[None], size)[0],
            None if ignore is None else ignore.bool(),
        )
    except (zlib.error, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: not readable as class scores ({error}); remove the file and run again") from error


def _shrink(maps: Tensor, bits: int, scale: int) -> Tensor:
    """Return maps `[R, H, W]` in [0, 1] as uint8 or float16, at `1 / scale` of the size, rounded up."""
    if scale > 1 and len(maps):
        height, width = maps.shape[1:]
        # What lies beyond the border repeats it, so that the last cell is not mixed with zeros.
        padded = F.pad(maps[None].float(), (0, -width % scale, 0, -height % scale), mode="replicate")
        maps = F.avg_pool2d(padded, scale)[0]
    maps = (maps * 255).round().clamp(0, 255).to(torch.uint8) if bits == 8 else maps.half()
    return maps.cpu().contiguous()


def _enlarge(maps: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Return stored maps `[R, h, w]` as float32, `[R, H, W]` if a size is stored."""
    values = maps.float() / 255 if maps.dtype == torch.uint8 else maps.float()
    if size is None or not len(values):
        return values if size is None else values.new_zeros((0, *size))
    return F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
