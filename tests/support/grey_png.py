"""Grey PNGs of fewer than 8 bits, which Pillow stretches when it reads them and cannot write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def encode_grey_png(ids: np.ndarray, bits: int) -> bytes:
    """Encode `[H, W]` ids below `2 ** bits` as a grey PNG of 1, 2, 4 or 8 bits a pixel."""
    height, width = ids.shape
    digits = np.unpackbits(ids.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - bits :]
    rows = np.packbits(digits.reshape(height, width * bits), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return join_chunks(header, data)


def join_chunks(header: bytes, rows: bytes) -> bytes:
    """Return the PNG of a header chunk's content and uncompressed rows."""
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
