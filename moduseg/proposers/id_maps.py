"""Proposals as one map of ids, one file an image: `.npz` with `instance_mask`, or a PNG of up to 16 bits.

EntitySeg and CorrCLIP users have them in this form. Id 0, and any below, is no region; every other id is one proposal,
and they are disjoint. An `.npz` may hold `scores` beside the map; a PNG has none.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from moduseg.errors import DataError
from moduseg.proposers.sa1b import MAX_MASK_PIXELS, MAX_PIXELS
from moduseg.structures import Proposals

SUFFIXES = (".npz", ".png")
MAP_NAME = "instance_mask"
SCORES_NAME = "scores"
MAX_UNCHECKED_MASK_PIXELS = 1 << 30
"""Most pixels in all the masks of a file together if its image, which would bound them, is not at hand."""
MAX_SCORES = 1 << 20
_AGAIN = "write it again"


def read_id_map(path: Path, expected_size: tuple[int, int] | None = None) -> Proposals:
    """Return the regions of a map, in ascending id.

    Args:
        path: an `.npz` or `.png` file.
        expected_size: `(H, W)` of the image, or `None` to take the map's.

    Returns:
        Disjoint, non-empty masks on the CPU; scores are 1 if the file has none.

    Raises:
        DataError: the file is absent, damaged, of another content or of another size; one line.
    """
    is_archive = path.suffix.lower() == ".npz"
    ids, scores = _read_npz(path, expected_size) if is_archive else (read_png(path, expected_size), None)
    height, width = ids.shape
    region_ids = np.unique(ids)
    region_ids = region_ids[region_ids > 0].astype(np.int64)
    max_pixels = MAX_MASK_PIXELS if expected_size is not None else MAX_UNCHECKED_MASK_PIXELS
    if len(region_ids) * ids.size > max_pixels:
        raise DataError(
            f"{path}: {len(region_ids)} regions of {height} x {width} pixels are more than the {max_pixels} "
            "pixels that fit in memory; keep fewer regions or a smaller image"
        )
    numbered = np.full(ids.shape, -1, dtype=np.int32)
    for row, row_ids in enumerate(ids):  # a row at a time, because the positions take 8 bytes a pixel
        is_region = row_ids > 0
        numbered[row, is_region] = np.searchsorted(region_ids, row_ids[is_region])
    return Proposals.of_id_map(
        torch.from_numpy(numbered),
        len(region_ids),
        None if scores is None else _select_scores(scores, region_ids, path),
    )


def _check_size(size: tuple[int, ...], expected_size: tuple[int, int] | None, path: Path) -> None:
    """Raise an error if a map that is not yet in memory has another size than its image, or is too large."""
    if expected_size is not None and tuple(size) != tuple(expected_size):
        raise DataError(
            f"{path}: the map is {size[0]} x {size[1]} (height x width), the image is {expected_size[0]} x "
            f"{expected_size[1]}; make the proposals from the same file as the image"
        )


def _select_scores(scores: np.ndarray, ids: np.ndarray, path: Path) -> torch.Tensor:
    """Return the score of each id; the file has one for each region in ascending id, or one for each number from 1."""
    if len(scores) == len(ids):
        chosen = scores
    elif len(ids) == 0 or len(scores) >= ids[-1]:
        chosen = scores[ids - 1]
    else:
        raise DataError(
            f"{path}: got {len(scores)} {SCORES_NAME!r} for {len(ids)} regions with ids up to {ids[-1]}, expected one "
            f"for each region in ascending id, or one for each id from 1; {_AGAIN}"
        )
    return torch.from_numpy(chosen.astype(np.float32))


def _read_npz(path: Path, expected_size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the map as `[H, W]` integers, and `[S]` float64 scores if there are any."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if MAP_NAME not in names:
                raise DataError(
                    f"{path}: holds {', '.join(sorted(names)[:5]) or 'nothing'}, expected an array {MAP_NAME!r}; "
                    f"save it with numpy.savez_compressed(path, {MAP_NAME}=ids)"
                )
            ids = _read_array(archive, MAP_NAME, path, dimensions=2, kinds="iub", expected_size=expected_size)
            scores = None
            if SCORES_NAME in names:
                scores = _read_array(archive, SCORES_NAME, path, dimensions=1, kinds="fiu").astype(np.float64)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected a map of ids; {_AGAIN}") from error
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not readable as .npz ({_one_line(error)}); {_AGAIN}") from error
    if scores is not None and not (np.abs(scores) <= 1e6).all():
        raise DataError(f"{path}: {SCORES_NAME!r} holds values that are no numbers up to 1e6; {_AGAIN}")
    if ids.max() > np.iinfo(np.int32).max:
        raise DataError(f"{path}: got id {ids.max()}, expected ids up to {np.iinfo(np.int32).max}; number them from 1")
    return ids, scores


def _read_array(
    archive: zipfile.ZipFile,
    name: str,
    path: Path,
    *,
    dimensions: int,
    kinds: str,
    expected_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read an array of an archive, whose header is checked before its data are read."""
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _read_header(file)
    empty = dimensions == 2 and 0 in shape
    if len(shape) != dimensions or dtype.kind not in kinds or empty:
        expected = "[H, W] whole numbers" if dimensions == 2 else "[S] numbers"
        raise DataError(f"{path}: {name!r} is {list(shape)} {dtype}, expected {expected}; {_AGAIN}")
    max_values = MAX_PIXELS if dimensions == 2 else MAX_SCORES
    if int(np.prod(shape, dtype=np.float64)) > max_values:
        raise DataError(f"{path}: {name!r} is {list(shape)}, expected {max_values} values at most; {_AGAIN}")
    _check_size(shape, expected_size, path)
    with archive.open(f"{name}.npy") as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the type that the header of an `.npy` file states."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def read_png(path: Path, expected_size: tuple[int, int] | None) -> np.ndarray:
    """Return the values of a grey or indexed PNG of up to 16 bits as `[H, W]` integers.

    Args:
        path: the file.
        expected_size: `(H, W)` that it must have, or `None` for any.

    Raises:
        DataError: absent, damaged, of another kind or of another size.
    """
    try:
        with path.open("rb") as file:
            header = file.read(26)
        with Image.open(path) as picture:
            if picture.format != "PNG":
                raise ValueError(f"a {picture.format} file")
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, {MAX_PIXELS} are read at most")
            _check_size((picture.height, picture.width), expected_size, path)
            mode, ids = picture.mode, np.asarray(picture)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, expected a map of ids; {_AGAIN}") from error
    except (
        OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: not readable as a PNG ({_one_line(error)}); {_AGAIN}") from error
    if ids.ndim != 2 or mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DataError(f"{path}: got {mode} pixels, expected a grey or indexed PNG of up to 16 bits with ids in it")
    # Pillow stretches grey of 2 and 4 bits to 0..255, which would turn id 1 into 85 or 17.
    return ids // {2: 85, 4: 17}.get(header[24], 1) if mode == "L" else ids


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
