"""A fast reader for the usual kind of label map: an 8-bit indexed or grey PNG without row filters.

Encoders store label maps so, because the filters of PNG help photographs and not ids. Such a file only has to be
inflated, which zlib-ng does in a sixth of the standard library's time. Pillow reads every other file.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, INDEXED = 0, 3
"""Colour types of a PNG that hold one value a pixel."""
_HEADER = struct.Struct(">IIBBBBB")
_CHUNK = struct.Struct(">I4s")
HEADER_BYTES = 33
"""Signature and header chunk."""


def parse_png_header(data: bytes) -> tuple[int, int, int, int, int] | None:
    """Return `(width, height, bit depth, colour type, interlace method)` of a PNG; `None` if `data` is no PNG.

    Args:
        data: the file, or its first `HEADER_BYTES`.
    """
    if len(data) < HEADER_BYTES or data[:8] != SIGNATURE or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour, _, _, interlace = _HEADER.unpack_from(data, 16)
    return width, height, depth, colour, interlace


def read_plain_png(path: Path, max_pixels: int, content: bytes | None = None) -> np.ndarray | None:
    """Read the values of an 8-bit indexed or grey PNG without row filters.

    Args:
        path: the file.
        max_pixels: larger pictures are not read.
        content: bytes of the file, if they were read already.

    Returns:
        `[H, W]` uint8; `None` for any other kind of file, and for one that is absent or damaged.
    """
    try:
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            data = file.read(HEADER_BYTES)
            header = parse_png_header(data)
            if header is None:
                return None
            width, height, depth, colour, interlace = header
            if depth != 8 or colour not in (GREY, INDEXED) or interlace or not 0 < width * height <= max_pixels:
                return None
            # No such file needs more bytes. A longer one is cut here, so its end is missed and Pillow reads it.
            data += file.read(2 * height * (width + 1) + 65536)
    except (OSError, ValueError):  # a NUL byte in the name
        return None
    packed = _packed_rows(data, needs_palette=colour == INDEXED)
    rows = None if packed is None else _inflate(packed, height * (width + 1))
    if rows is None:
        return None
    table = np.frombuffer(rows, dtype=np.uint8).reshape(height, width + 1)
    return None if table[:, 0].any() else table[:, 1:].copy()


def _inflate(packed: bytes, length: int) -> bytes | None:
    """Inflate exactly `length` bytes, or return `None`; a file that claims to hold more gets no more memory."""
    inflate = zlib_ng.decompressobj()
    try:
        rows = inflate.decompress(packed, length + 1)
    except zlib_ng.error:  # type: ignore[misc]  # the stubs call the class an instance
        return None
    return rows if inflate.eof and len(rows) == length else None


def _packed_rows(data: bytes, needs_palette: bool) -> bytes | None:
    """Return the compressed rows; `None` if a checksum is wrong or the file has no end."""
    parts: list[bytes] = []
    has_palette = False
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = _CHUNK.unpack_from(data, position)
        end = position + 8 + length
        if end + 4 > len(data) or zlib_ng.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if kind == b"IDAT":
            parts.append(data[position + 8 : end])
        elif kind == b"PLTE":
            has_palette = True
        elif kind == b"IEND":
            return b"".join(parts) if has_palette or not needs_palette else None
        elif kind == b"acTL":  # an animation; Pillow decides which picture counts
            return None
        position = end + 4
    return None
