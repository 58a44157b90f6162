"""The short way to a label map gives what Pillow gives, or nothing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from moduseg.datasets.io import MAX_PIXELS, read_label_png, write_label_png
from moduseg.datasets.png import SIGNATURE, parse_png_header, read_plain_png
from moduseg.errors import DataError

IDS = np.array([[0, 1, 20], [255, 7, 7]], dtype=np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*, depth: int = 8, colour: int = 0, rows: bytes | None = None, size: tuple[int, int] = (3, 2)) -> bytes:
    """A PNG by hand; rows come with their filter bytes."""
    filtered = b"".join(b"\0" + row.tobytes() for row in IDS) if rows is None else rows
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(filtered)) + _chunk(b"IEND", b"")


def _read(tmp_path: Path, data: bytes) -> np.ndarray | None:
    (tmp_path / "a.png").write_bytes(data)
    return read_plain_png(tmp_path / "a.png", MAX_PIXELS)


def _pillow(array: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_what_we_write_takes_the_short_way(tmp_path: Path, rng: np.random.Generator) -> None:
    for shape in ((1, 1), (7, 300), (300, 7)):
        ids = rng.integers(0, 256, shape).astype(np.uint8)
        found = _read(tmp_path, write_label_png(ids))
        assert found is not None
        np.testing.assert_array_equal(found, ids)
        assert found.flags.writeable
        assert found.flags.c_contiguous
    np.testing.assert_array_equal(_read(tmp_path, _png()), IDS)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_pillow(np.arange(5000, dtype=np.int64).reshape(50, 100).astype(np.uint8)), id="filtered grey"),
        pytest.param(cv2.imencode(".png", IDS)[1].tobytes(), id="OpenCV"),
        pytest.param(_pillow(IDS > 0), id="1 bit"),
        pytest.param(_pillow(IDS.astype(np.uint16)), id="16 bits"),
        pytest.param(_pillow(IDS, "LA"), id="grey and alpha"),
        pytest.param(_pillow(np.minimum(IDS, 15), "P", bits=4), id="4 bits"),
    ],
)
def test_other_kinds_read_as_pillow_reads_them(tmp_path: Path, data: bytes) -> None:
    picture = Image.open(io.BytesIO(data))
    expected = np.asarray(picture.getchannel(0) if picture.mode == "LA" else picture)
    short = _read(tmp_path, data)
    assert short is None or np.array_equal(short, expected)
    np.testing.assert_array_equal(read_label_png(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xd8" + bytes(80), id="not a PNG"),
        pytest.param(_png()[:-12], id="no end"),
        pytest.param(_png()[:60], id="cut in the rows"),
        pytest.param(_png()[:50] + b"\x00" + _png()[51:], id="checksum"),
        pytest.param(_png(size=(3, 3)), id="too few rows"),
        pytest.param(_png(size=(3, 1)), id="too many rows"),
        pytest.param(_png(colour=3), id="no palette"),
        pytest.param(_png(rows=b"\1abc\0abc"), id="a filter"),
        pytest.param(_png(size=(0, 2)), id="no pixel"),
        pytest.param(_png(size=(100_000, 100_000)), id="too large"),
        pytest.param(_png(rows=bytes(50_000_000)), id="a bomb"),
    ],
)
def test_damaged_files_are_left_to_pillow(tmp_path: Path, data: bytes) -> None:
    assert _read(tmp_path, data) is None


def test_an_absent_file_and_a_folder(tmp_path: Path) -> None:
    assert read_plain_png(tmp_path / "none.png", MAX_PIXELS) is None
    assert read_plain_png(tmp_path, MAX_PIXELS) is None
    with pytest.raises(DataError, match="no such file"):
        read_label_png(tmp_path / "none.png")


def test_header() -> None:
    assert parse_png_header(_png()) == (3, 2, 8, 0, 0)
    assert parse_png_header(_png()[:32]) is None


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    whole = write_label_png(IDS)
    for position in range(len(whole)):  # each is under a checksum, a signature or a length
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        assert _read(tmp_path, bytes(damaged)) is None
