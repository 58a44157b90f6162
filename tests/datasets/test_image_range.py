"""16-bit pictures that use a small part of their range."""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from moduseg.config import compose
from moduseg.datasets import build
from moduseg.datasets.io import check_image_range, find_dark_range, read_image, read_size
from moduseg.errors import ConfigError, DataError
from moduseg.tools import check_data
from tests.support.deep_png import encode_deep_png

VALUES = np.array([[0, 1000, 2048], [3000, 4000, 4095]], np.uint16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.fromarray(VALUES).save(tmp_path / "images" / f"{name}.tif")
    (tmp_path / "labels.csv").write_text("image,labels\na,disc\nb,disc\n")
    return tmp_path


@pytest.mark.parametrize(
    ("image_range", "expected"),
    [
        pytest.param(None, [0, 4, 8, 12, 16, 16], id="the whole range"),
        pytest.param([0, 4095], [0, 62, 128, 187, 249, 255], id="12 bits"),
        pytest.param("auto", [0, 62, 128, 187, 249, 255], id="auto"),
        pytest.param([1000, 3000], [0, 0, 134, 255, 255, 255], id="values beyond the range"),
        pytest.param([0, 65535], [0, 4, 8, 12, 16, 16], id="the whole range, said"),
    ],
)
def test_the_range_becomes_black_to_white(root: Path, image_range: object, expected: list[int]) -> None:
    data = build({"name": "folder", "root": str(root), "image_range": image_range}, "train")
    assert data.load("a").image[:, :, 1].ravel().tolist() == expected


def _count_dark(report: check_data.Report) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table.splitlines()]
    return next((row[1:] for row in rows if row[0] == "16-bit images that become dark"), [])


def test_dark_pictures_are_said_once_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["dataset=folder", f"dataset.root={root}", f"runtime.outputs={root / 'outputs'}"]
    with caplog.at_level(logging.WARNING):
        report = check_data.run(compose(options))
    messages = [r.getMessage() for r in caplog.records if "16-bit" in r.getMessage()]
    assert len(messages) == 1
    assert messages[0].endswith("(up to 4095 of 65535), become nearly black; set dataset.image_range=[0,4095], or auto")
    assert _count_dark(report) == ["2", "2", "note", "a"]
    problem = json.loads((report.path / "problems.jsonl").read_text().splitlines()[0])
    assert "its values are 0 to 4095" in problem["problem"]
    report = check_data.run(compose([*options, "dataset.image_range=auto"]))
    assert _count_dark(report) in (["0", "0", "ok", ""], [])


def test_the_range_decides_keys_only_where_it_is_set(root: Path) -> None:
    cfg = {"name": "folder", "root": str(root)}
    default, scaled = build(cfg, "train"), build({**cfg, "image_range": [0, 4095]}, "train")
    assert default.fingerprint() == build({**cfg, "image_range": None}, "train").fingerprint()
    assert default.fingerprint() != scaled.fingerprint()


def test_pictures_of_8_and_of_16_bits_are_not_dark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray((VALUES // 16).astype(np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray(VALUES * np.uint16(16)).save(tmp_path / "sixteen.png")
    for name in ("eight.png", "sixteen.png"):
        assert find_dark_range(tmp_path / name) is None
        read_image(tmp_path / name)
    assert "16-bit" not in caplog.text


@pytest.mark.parametrize("image_range", ["full", [3], [5, 5], [-1, 9], [0, 65536]])
def test_ranges_that_are_none(tmp_path: Path, image_range: object) -> None:
    with pytest.raises(ConfigError, match="image_range: got"):
        build({"name": "folder", "root": str(tmp_path), "image_range": image_range}, "train")
    assert check_image_range((0, 9)) == (0, 9)


COLOURS = np.stack([VALUES, VALUES // 2, VALUES[:, ::-1]], 2)
OPACITY = np.full((2, 3, 1), 65535, np.uint16)
TWELVE_BITS = (COLOURS.astype(np.int64) * 510 + 4095) // (2 * 4095)
ROUNDED = (COLOURS.astype(np.int64) + 128) // 257


def _encode_tiff(colours: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, colours, photometric="rgb", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "image_range", "expected"),
    [
        pytest.param("a.png", encode_deep_png(COLOURS), (0, 4095), TWELVE_BITS, id="PNG"),
        pytest.param("a.png", encode_deep_png(COLOURS), "auto", TWELVE_BITS, id="auto is of all channels"),
        pytest.param("a.png", encode_deep_png(COLOURS), None, ROUNDED, id="the whole range"),
        pytest.param(
            "a.png", encode_deep_png(np.concatenate([COLOURS, OPACITY], 2)), (0, 4095), TWELVE_BITS, id="opaque"
        ),
        pytest.param(
            "a.png", encode_deep_png(np.concatenate([COLOURS, OPACITY * 0], 2)), "auto", TWELVE_BITS * 0, id="invisible"
        ),
        pytest.param(
            "a.png", encode_deep_png(np.concatenate([VALUES[:, :, None], OPACITY], 2)), (0, 4095),
            np.repeat(TWELVE_BITS[:, :, :1], 3, 2), id="grey with opacity",
        ),
        pytest.param("a.tif", _encode_tiff(COLOURS), (0, 4095), TWELVE_BITS, id="TIFF"),
        pytest.param(
            "a.tif", _encode_tiff(COLOURS, extratags=[(274, "H", 1, 6, True)]), (0, 4095), np.rot90(TWELVE_BITS, -1),
            id="lying TIFF",
        ),
        pytest.param("a.tif", _encode_tiff(COLOURS, byteorder=">"), None, ROUNDED, id="big-endian TIFF"),
    ],
)  # fmt: skip
def test_colours_of_16_bits_keep_their_range(
    tmp_path: Path, name: str, content: bytes, image_range: object, expected: np.ndarray
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_image(tmp_path / name, image_range).tolist() == expected.tolist()
    assert read_size(tmp_path / name) == expected.shape[:2]


def test_dark_colours_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(encode_deep_png(COLOURS))
    read_image(tmp_path / "a.png")
    assert "such as a.png (up to 4095 of 65535)" in caplog.text
    assert find_dark_range(tmp_path / "a.png") == (0, 4095)


def test_a_tiff_of_planes_is_refused(tmp_path: Path) -> None:
    planes = _encode_tiff(COLOURS.transpose(2, 0, 1), planarconfig="separate")
    (tmp_path / "a.tif").write_bytes(planes)
    with pytest.raises(DataError, match="channels are stored in planes"):
        read_image(tmp_path / "a.tif")


def test_orientation_of_a_png_is_applied_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    plain = encode_deep_png(COLOURS)
    (tmp_path / "a.png").write_bytes(plain[:33] + chunk + plain[33:])
    assert read_image(tmp_path / "a.png", (0, 4095)).tolist() == np.rot90(TWELVE_BITS, -1).tolist()
