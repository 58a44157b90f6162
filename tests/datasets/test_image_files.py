"""Which files below a folder are images, and what is said of the others."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.datasets import image_files
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import HEIF_SUFFIXES, IMAGE_SUFFIXES, read_image
from moduseg.errors import DataError, MissingError

PIXELS = np.full((12, 16, 3), (200, 40, 40), np.uint8)


def _save(path: Path, file_format: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, format=file_format)
    return path


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("a.jfif", "JPEG"),
        ("a.JPE", "JPEG"),
        ("a.gif", "GIF"),
        pytest.param(
            "a.avif", "AVIF", marks=pytest.mark.skipif(".avif" not in IMAGE_SUFFIXES, reason="this Pillow has no AVIF")
        ),
    ],
)
def test_other_endings_of_photographs_are_read(tmp_path: Path, name: str, file_format: str) -> None:
    path = _save(tmp_path / name, file_format)
    assert find_images([tmp_path]) == {"a": path}
    assert np.abs(read_image(path).astype(int) - PIXELS).max() < 12


def test_a_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (250, 3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").min() > 240


def test_heic_is_read_with_its_extra(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.register_heif_opener()
    _save(tmp_path / "a.HEIC", "HEIF")
    assert np.abs(read_image(find_images([tmp_path])["a"]).astype(int) - PIXELS).max() < 25


def test_files_that_are_not_read_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path / "a.jpg")
    for name in ("b.psd", "trip/c.CR2", "trip/d.cr2", "e.x", "labels.csv", ".hidden", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert list(find_images([tmp_path])) == ["a"]
        find_images([tmp_path])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 4 files are not read (2 .cr2, 1 .psd, 1 .x): b.psd, e.x, trip/c.CR2, ...; convert photographs "
        "among them to JPEG or PNG"
    ]


def test_heic_without_its_extra_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in HEIF_SUFFIXES)
    monkeypatch.setattr(image_files, "IMAGE_SUFFIXES", plain)
    _save(tmp_path / "a.jpg")
    _save(tmp_path / "p1.HEIC")
    find_images([tmp_path])
    assert "1 file is not read (1 .heic): p1.HEIC; pip install 'moduseg[heif]'" in caplog.text
    with pytest.raises(DataError, match=r"p1\.HEIC, expected a file that ends in .*moduseg\[heif\]"):
        find_images([tmp_path / "p1.HEIC"])


def test_loops_of_links_are_one_folder(tmp_path: Path) -> None:
    root, other = tmp_path / "images", tmp_path / "other"
    _save(root / "a.jpg")
    _save(other / "b.jpg")
    (root / "self").symlink_to(root)
    (root / "x").symlink_to(other)
    (other / "back").symlink_to(root)
    (root / "y").symlink_to(other)
    assert list(find_images([root])) == ["a", "x/b", "y/b"]


def test_names_are_composed(tmp_path: Path) -> None:
    name = "Größe é"
    _save(tmp_path / f"{unicodedata.normalize('NFD', name)}.jpg")
    assert list(find_images([tmp_path])) == [name]
    _save(tmp_path / f"{name}.jpg")
    with pytest.raises(DataError, match="twice"):
        find_images([tmp_path])


def test_a_folder_without_images_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"holds no image; expected files that end in \.jpg"):
        find_images([tmp_path])
