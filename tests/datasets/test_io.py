from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.datasets import io as reading
from moduseg.datasets.io import (
    label_png_kind,
    read_image,
    read_index_png,
    read_label_png,
    read_size,
    write_label_png,
    write_rgb_png,
)
from moduseg.errors import DataError
from moduseg.masks.palette import voc_palette

H, W = 6, 9


def _save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.fixture
def colours(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (H, W, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path: Path, colours: np.ndarray) -> None:
    path = _save(tmp_path / "a.png", colours)
    np.testing.assert_array_equal(read_image(path), colours)
    assert read_size(path) == (H, W)


def test_grey_becomes_three_equal_channels(tmp_path: Path, colours: np.ndarray) -> None:
    image = read_image(_save(tmp_path / "a.png", colours[:, :, 0]))
    np.testing.assert_array_equal(image, np.repeat(colours[:, :, :1], 3, axis=2))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", np.array([[0, 257, 257 * 100], [65535, 128, 129]], dtype=np.uint16))
    np.testing.assert_array_equal(read_image(path)[:, :, 0], [[0, 1, 100], [255, 0, 1]])


def test_one_bit(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", np.array([[0, 255, 0]], dtype=np.uint8), "1")
    np.testing.assert_array_equal(read_image(path)[0, :, 1], [0, 255, 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_black(tmp_path: Path, mode: str) -> None:
    rgba = np.full((1, 3, 4), 200, dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    image = read_image(_save(tmp_path / "a.png", rgba, None if mode == "RGBA" else mode))
    np.testing.assert_allclose(image[0, :, 0], [0, 100, 200], atol=1)


def test_indexed_picture_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[0, 0, 0], [0, 255, 0]]])


def test_cmyk(tmp_path: Path) -> None:
    red = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    image = read_image(_save(tmp_path / "a.jpg", red, "CMYK", quality=100))
    assert image.shape == (8, 8, 3)
    assert image[4, 4, 0] > 240
    assert image[4, 4, 1:].max() < 15


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:8, :8] = 255  # top left of the stored picture, top right once turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(array).save(path, exif=exif)
    image = read_image(path)
    assert image.shape == (32, 16, 3)
    assert read_size(path) == (32, 16)
    assert image[2, 13].min() > 240
    assert image[2, 2].max() < 15


def test_every_orientation_agrees_with_pillow(tmp_path: Path, colours: np.ndarray) -> None:
    from PIL import ImageOps

    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.webp")[0, 0], [255, 0, 0])


def _jpeg(size: int = 64) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"this is a text file, no picture", "not an image"),
        (_jpeg()[:700], "unreadable"),
        (write_rgb_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:500], "unreadable"),
        (b"\x89PNG\r\n\x1a\n", "unreadable"),
        (None, "no such file"),
    ],
)
def test_broken_files_end_in_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    for read in (read_image, read_label_png, read_index_png):
        with pytest.raises(DataError, match=words) as caught:
            read(path)
        assert "broken.jpg" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, suffix: str, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in range(80):
            content = bytearray(whole[: int(rng.integers(1, len(whole)))] if trial % 2 else whole)
            for position in rng.integers(0, min(len(content), 120), 4):
                content[position] = int(rng.integers(0, 256))
            (tmp_path / f"b.{suffix}").write_bytes(content)
            try:
                assert read_image(tmp_path / f"b.{suffix}").dtype == np.uint8
            except DataError as error:
                refused += 1
                lines = str(error).count("\n")
                if lines:
                    pytest.fail(f"{lines + 1} lines: {error}")
    assert refused > 10


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unreadable"):
        read_image(tmp_path)


def test_too_large_pictures_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / "big.png", np.zeros((20, 30), dtype=np.uint8))
    monkeypatch.setattr(reading, "MAX_PIXELS", 599)
    for read in (read_image, read_size, read_label_png):
        with pytest.raises(DataError, match=r"big\.png.*too large"):
            read(path)
    monkeypatch.setattr(reading, "MAX_PIXELS", 600)
    assert read_image(path).shape == (20, 30, 3)


def test_pillows_own_limit_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / "bomb.png", np.zeros((20, 30), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png.*too large"):
        read_image(path)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    array = np.full((4, 4), 70000, dtype=np.float32 if mode == "F" else np.int32)
    with pytest.raises(DataError, match="convert it to 8-bit"):
        read_image(_save(tmp_path / "a.tif", array))


def test_label_map_round_trip_is_deterministic(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 256, (H, W), dtype=np.uint8)
    content = write_label_png(labels)
    assert content == write_label_png(labels.astype(np.int64))
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(read_label_png(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == voc_palette().ravel().tolist()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.float32), np.array([[256]]), np.array([[-1]])]
)
def test_label_maps_that_cannot_be_written(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="label map: got"):
        write_label_png(array)


def test_label_maps_stored_in_other_ways(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 20, 255]], dtype=np.uint8)
    for name, path in {
        "grey": _save(tmp_path / "grey.png", labels),
        "colour": _save(tmp_path / "colour.png", voc_palette()[labels]),
        "16 bit": _save(tmp_path / "deep.png", labels.astype(np.uint16)),
    }.items():
        np.testing.assert_array_equal(read_label_png(path), labels, err_msg=name)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_label_maps_of_few_bits_keep_their_ids(tmp_path: Path, depth: int) -> None:
    """Pillow stretches low-bit grey; such files are written here by hand, one row of pixels packed in bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ids = np.arange(8) % (1 << depth)
    bits = "".join(f"{int(i):0{depth}b}" for i in ids)
    row = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    np.testing.assert_array_equal(read_label_png(tmp_path / "a.png"), ids[None])


def test_colours_outside_the_palette_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 colours outside the VOC palette \(first \(1, 2, 3\)\)"):
        read_label_png(_save(tmp_path / "a.png", np.array([[[0, 0, 0], [1, 2, 3]]], dtype=np.uint8)))


def test_label_ids_over_255_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label id 300"):
        read_label_png(_save(tmp_path / "a.png", np.array([[300]], dtype=np.uint16)))


def test_instance_maps_keep_16_bits(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    found = read_index_png(_save(tmp_path / "a.png", ids))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids)
    with pytest.raises(DataError, match="expected an indexed or grey"):
        read_index_png(_save(tmp_path / "b.png", np.zeros((2, 2, 3), dtype=np.uint8)))


def test_how_label_maps_are_stored(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 20, 255]], dtype=np.uint8)
    (tmp_path / "voc.png").write_bytes(write_label_png(ids))
    with Image.open(tmp_path / "voc.png") as picture:
        picture.putpalette([0, 0, 0, 9, 9, 9] * 128)
        picture.save(tmp_path / "indexed.png")
    _save(tmp_path / "grey.png", ids)
    _save(tmp_path / "colour.png", voc_palette()[ids])
    for kind in ("voc", "indexed", "grey", "colour"):
        assert label_png_kind(tmp_path / f"{kind}.png") == kind


@pytest.mark.parametrize("read", [read_image, read_label_png, read_size])
def test_a_name_with_a_nul_byte_is_one_line(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\\x00b\.png: unreadable as an image"):
        read(tmp_path / "a\0b.png")
