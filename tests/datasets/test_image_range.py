"""16-bit pictures that use a small part of their range."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.config import compose
from moduseg.datasets import build
from moduseg.datasets.io import check_image_range, find_dark_range, read_image
from moduseg.errors import ConfigError
from moduseg.tools import check_data

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
