"""Photographs as Python programs hold them all give the same pixels, or an error that names the shape."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.datasets.io import read_image
from moduseg.datasets.photographs import is_one_picture, read_picture
from moduseg.errors import DataError


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)


def encode(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def open_half(image: np.ndarray) -> Image.Image:
    """A picture whose file ends in its middle."""
    content = encode(image).getvalue()
    return Image.open(io.BytesIO(content[: len(content) // 2]))


def open_closed(image: np.ndarray) -> Image.Image:
    """A picture whose file was closed before it was looked at."""
    picture = Image.open(encode(image))
    picture.close()
    return picture


@pytest.mark.parametrize("make", [
    pytest.param(lambda a: a, id="array"),
    pytest.param(lambda a: a[::-1][::-1], id="view"),
    pytest.param(lambda a: a / 255, id="float64 in [0, 1]"),
    pytest.param(lambda a: (a / 255).astype(np.float32), id="float32 in [0, 1]"),
    pytest.param(lambda a: a.astype(np.int64), id="int64"),
    pytest.param(lambda a: a.astype(np.uint16) * 257, id="uint16"),
    pytest.param(lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]), id="opaque RGBA"),
    pytest.param(Image.fromarray, id="Pillow"),
    pytest.param(lambda a: Image.fromarray(a).convert("RGBA"), id="Pillow RGBA"),
    pytest.param(encode, id="file object"),
    pytest.param(torch.from_numpy, id="tensor, channels last"),
    pytest.param(lambda a: torch.from_numpy(a).permute(2, 0, 1), id="tensor, channels first"),
    pytest.param(lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255, id="tensor of torchvision"),
])  # fmt: skip
def test_every_form_gives_the_same_pixels(image: np.ndarray, make: Callable[[np.ndarray], Any]) -> None:
    pixels = read_picture(make(image)).pixels
    assert (pixels.dtype, pixels.flags["C_CONTIGUOUS"]) == (np.uint8, True)
    np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize("make", [
    pytest.param(lambda a: a, id="[H, W]"),
    pytest.param(lambda a: a[:, :, None] / 255, id="[H, W, 1] float"),
    pytest.param(lambda a: torch.from_numpy(a)[None], id="[1, H, W] tensor"),
    pytest.param(Image.fromarray, id="Pillow L"),
    pytest.param(lambda a: Image.fromarray(a.astype(np.uint16) * 257), id="Pillow I;16"),
])  # fmt: skip
def test_grey_becomes_three_channels(image: np.ndarray, make: Callable[[np.ndarray], Any]) -> None:
    np.testing.assert_array_equal(read_picture(make(image[:, :, 0])).pixels, image[:, :, :1].repeat(3, 2))


def test_transparency_and_orientation_are_those_of_files(image: np.ndarray, tmp_path: Path) -> None:
    rgba = np.dstack([image, np.arange(120, dtype=np.uint8).reshape(12, 10)])
    file = tmp_path / "a.png"
    Image.fromarray(rgba).save(file)
    for value in (rgba, Image.fromarray(rgba), file, str(file), file.open("rb"), rgba / 255):
        np.testing.assert_array_equal(read_picture(value).pixels, read_image(file))
    turned = tmp_path / "b.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(turned, exif=exif)
    with Image.open(turned) as picture:
        read = read_picture(picture)
    np.testing.assert_array_equal(read.pixels, read_image(turned))
    assert read.pixels.shape == (10, 12, 3)
    assert (read.name, read.path) == ("b", turned)
    assert read_picture(image).name == "image"


@pytest.mark.parametrize(("make", "error", "message"), [
    pytest.param(lambda a: np.moveaxis(a, 2, 0), ValueError, r"got \(3, 12, 10\) uint8, expected .*moveaxis",
                 id="channels first"),
    pytest.param(lambda a: a[:, :, :2], ValueError, r"got \(12, 10, 2\)", id="two channels"),
    pytest.param(lambda a: a[0, 0], ValueError, r"got \(3,\)", id="one dimension"),
    pytest.param(lambda a: a[:0], ValueError, r"got \(0, 10, 3\)", id="empty"),
    pytest.param(lambda a: a.astype(float), ValueError, r"float64 values from 0 to 255, expected \[0, 1\]; divide",
                 id="float 0..255"),
    pytest.param(lambda a: (a / 255 - 0.5) / 0.2, ValueError, r"undo the normalisation", id="normalised"),
    pytest.param(lambda a: a.astype(int) - 9, ValueError, r"int64 values from -9", id="negative"),
    pytest.param(lambda a: {"image": a}, TypeError, r"got dict, expected a path", id="dictionary"),
    pytest.param(lambda a: io.StringIO("x"), TypeError, r"opened for text.*'rb'", id="text file"),
    pytest.param(lambda a: io.BytesIO(b"no picture"), DataError, r"file object", id="no picture"),
    pytest.param(open_half, DataError, r"image: got a Pillow image that cannot be decoded \(.*open it again",
                 id="half a file"),
    pytest.param(open_closed, DataError, r"cannot be decoded", id="a closed file"),
    pytest.param(lambda a: "missing.png", DataError, r"missing\.png", id="no file"),
])  # fmt: skip
def test_what_is_no_photograph_is_named(
    image: np.ndarray, make: Callable[[np.ndarray], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read_picture(make(image))
    assert "\n" not in str(caught.value)


def test_one_is_told_from_many(image: np.ndarray) -> None:
    assert all(map(is_one_picture, (image, "a.png", Path("a"), encode(image), torch.from_numpy(image))))
    assert not any(map(is_one_picture, ([image], (), iter([image]), image[None], torch.from_numpy(image)[None])))
