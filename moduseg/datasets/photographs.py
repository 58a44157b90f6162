"""Photographs as Python programs hold them: files, file objects, Pillow images, arrays, tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from moduseg.datasets.io import DAMAGE, ImageRange, read_image
from moduseg.errors import DataError
from moduseg.structures import Sample

Picture: TypeAlias = "str | Path | IO[bytes] | Image.Image | np.ndarray | torch.Tensor"
"""One photograph: a path, a file opened for reading bytes, a Pillow image, an array or a tensor (`read_picture`)."""

_CHANNELS = (1, 3, 4)
_EXPECTED = (
    "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8, or float in [0, 1] (tensors may have their channels first)"
)


@dataclass(frozen=True)
class NamedPicture:
    """A photograph and where it came from.

    Attributes:
        pixels: `[H, W, 3]` uint8, RGB.
        name: the file's name without suffix, or `image`.
        path: the file; `None` for what was in memory.
    """

    pixels: np.ndarray
    name: str = "image"
    path: Path | None = None

    @property
    def sample(self) -> Sample:
        """The photograph as models take it."""
        return Sample(self.name, self.pixels)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the pixels, hexadecimal; of a large photograph it takes a tenth of a second."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


def is_one_picture(value: object) -> bool:
    """Return whether a value is one photograph, not several: lists, iterators and arrays `[N, ...]` are several."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim < 4
    is_single = isinstance(value, (str, os.PathLike, Image.Image)) or hasattr(value, "read")
    # Sets have no order, and mappings hold no photographs: `read_picture` refuses both.
    return is_single or not isinstance(value, Iterable) or isinstance(value, (Set, Mapping))


def read_picture(value: Any, image_range: ImageRange = None) -> NamedPicture:
    """Return a photograph as `[H, W, 3]` uint8 RGB, whatever holds it.

    Args:
        value: a path; a file opened for reading bytes, or anything with `read`; a Pillow image of any mode, turned as
            its EXIF says; an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8, bool, uint16 (divided by
            257) or float in [0, 1]; a tensor of these, or with channels first, as torchvision gives them. Transparency
            is composited on black, as in files.
        image_range: of 16-bit files, see `moduseg.datasets.io.read_image`.

    Raises:
        DataError: a file that cannot be read.
        ValueError: an array of another shape, dtype or range.
        TypeError: anything else.
    """
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        return NamedPicture(read_image(path, image_range), path.stem, path)
    if isinstance(value, Image.Image):
        file = getattr(value, "filename", "")
        name = Path(os.fsdecode(file)).stem if file else "image"
        return NamedPicture(_read_pillow(value), name, Path(os.fsdecode(file)) if file else None)
    if isinstance(value, torch.Tensor):
        return NamedPicture(_to_rgb(_put_channels_last(value)))
    if isinstance(value, np.ndarray):
        return NamedPicture(_to_rgb(value))
    if hasattr(value, "read"):
        return _read_file_object(value, image_range)
    raise TypeError(
        f"image: got {type(value).__name__}, expected a path, a file object, a Pillow image, an array or a tensor"
    )


def _read_file_object(file: IO[bytes], image_range: ImageRange) -> NamedPicture:
    """Return the photograph in an open file, as if it had been read from its path."""
    label = getattr(file, "name", None)
    name = Path(label).stem if isinstance(label, str) else "image"
    # The reader looks at files of 16 bits twice, so that it needs one that has a path.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "picture"
        with copy.open("wb") as target:
            try:
                shutil.copyfileobj(file, target)
            except TypeError as error:
                raise TypeError("image: got a file opened for text, expected bytes; open it with mode 'rb'") from error
        try:
            return NamedPicture(read_image(copy, image_range), name)
        except DataError as error:
            raise DataError(str(error).replace(str(copy), f"file object {label or ''}".strip())) from error


def _read_pillow(picture: Image.Image) -> np.ndarray:
    try:
        picture.load()  # Pillow reads no more than the header when it opens a file
        upright = ImageOps.exif_transpose(picture)
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"image: got a Pillow image that cannot be decoded ({reason}), expected one of a whole file that is open; "
            "open it again"
        ) from error
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright)
        # Pillow gives 16-bit grey as int32.
        if values.dtype != np.float32 and int(values.min(initial=0)) >= 0 and int(values.max(initial=0)) <= 65535:
            values = values.astype(np.uint16)
        return _to_rgb(values)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        return _to_rgb(np.asarray(upright.convert("RGBA")))
    return np.array(upright.convert("RGB"))


def _put_channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array; three dimensions of which the first is channels, as torchvision has them, change."""
    values = tensor.detach().cpu()
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if values.ndim == 3 and values.shape[0] in _CHANNELS and (values.shape[2] not in _CHANNELS or values.shape[0] == 3):
        values = values.permute(1, 2, 0)
    return np.ascontiguousarray(values.numpy())


def _to_rgb(array: np.ndarray) -> np.ndarray:
    """Return an array with channels last, or without, as `[H, W, 3]` uint8."""
    shape, dtype = array.shape, array.dtype
    pixels = array[:, :, None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in _CHANNELS or 0 in pixels.shape:
        hint = "; move the channels last with numpy.moveaxis(image, 0, -1)" if _has_channels_first(shape) else ""
        raise ValueError(f"image: got {tuple(shape)} {dtype}, expected {_EXPECTED}{hint}")
    pixels = _to_bytes(pixels)
    if pixels.shape[2] == 4:
        # Rounded as Pillow composites on black.
        rgba = Image.fromarray(pixels)
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        pixels = np.asarray(Image.alpha_composite(black, rgba))[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _has_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in _CHANNELS


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Return values as uint8: float in [0, 1] times 255, bool as black and white, uint16 divided by 257."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = pixels.min(), pixels.max()
    if np.issubdtype(pixels.dtype, np.floating):
        # Resizing overshoots a little.
        if not (np.isfinite(low) and np.isfinite(high)) or low < -0.01 or high > 1.01:
            raise ValueError(
                f"image: got {pixels.dtype} values from {low:.6g} to {high:.6g}, expected [0, 1]; divide by 255, or "
                "undo the normalisation"
            )
        return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.integer) and low >= 0 and high <= 255:
        return pixels.astype(np.uint8)
    raise ValueError(f"image: got {pixels.dtype} values from {low} to {high}, expected {_EXPECTED}")
