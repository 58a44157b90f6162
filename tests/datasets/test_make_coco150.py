from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.datasets import build
from moduseg.datasets.coco150 import make_coco150, read_coco150_ids, semantic_from_panoptic
from moduseg.errors import DataError, MissingError
from tests.conftest import external_folder

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_coco150.py"
IDS = {"train2017": ["000000000009", "000000070000"], "val2017": ["000000000139"]}
CATEGORIES = [
    {"id": 92, "name": "banner", "isthing": 0},
    {"id": 90, "name": "toothbrush", "isthing": 1},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 13, "name": "stop sign", "isthing": 1},
]
SEGMENTS = {7: 92, 300: 90, 70000: 1, 8: 13}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO 2017 tree of three pictures, four categories, segment ids that need all three channels."""
    root = tmp_path / "coco"
    segments = np.repeat(np.array([[0, 7, 300, 70000]]), 6, axis=0)
    colours = np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=2).astype(np.uint8)
    for split, ids in IDS.items():
        annotations = []
        for id in ids:
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 4, 3), 90, dtype=np.uint8)).save(root / split / f"{id}.jpg")
            (root / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours).save(root / "annotations" / f"panoptic_{split}" / f"{id}.png")
            listed = [{"id": s, "category_id": c, "iscrowd": 0} for s, c in SEGMENTS.items()]
            annotations.append({"image_id": int(id), "file_name": f"{id}.png", "segments_info": listed})
        content = {"images": [], "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root


def test_folder_is_what_the_data_set_reads(coco: Path, tmp_path: Path) -> None:
    out = make_coco150(coco, tmp_path / "out", IDS)
    assert (out / "classes.txt").read_text() == "background\nperson\nstop sign\ntoothbrush\n"
    data = build({"name": "coco150", "root": str(out)}, "train2017")
    assert data.ids == tuple(IDS["train2017"])
    sample = data.load("000000070000", truth=True)
    assert sample.labels == (1, 3)
    np.testing.assert_array_equal(sample.semantic, np.repeat(np.array([[255, 0, 3, 1]]), 6, axis=0))
    name = "train2017/000000000009.jpg"
    assert (out / "images" / name).read_bytes() == (coco / name).read_bytes()
    entry = json.loads((out / "image_labels.json").read_text())["images"][2]
    assert entry == {"img_id": "000000000139", "file_name": "images/val2017/000000000139.jpg", "labels": [1, 3]}


def test_writing_twice_gives_the_same_bytes(coco: Path, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()}

    make_coco150(coco, tmp_path / "out", IDS)
    first = content()
    make_coco150(coco, tmp_path / "out", IDS)
    assert content() == first
    assert len(first) == 3 + 3 + 4


def test_missing_parts_of_the_download(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="000000000001"):
        make_coco150(coco, tmp_path / "out", {"val2017": ["000000000001"]})
    (coco / "val2017").rename(coco / "elsewhere")
    with pytest.raises(MissingError, match="val2017: no such folder"):
        make_coco150(coco, tmp_path / "out", IDS)
    with pytest.raises(MissingError, match=r"panoptic_val2017\.json: no such file"):
        make_coco150(tmp_path, tmp_path / "out", {"val2017": []})
    (coco / "annotations" / "panoptic_val2017.json").write_text("{}")
    with pytest.raises(DataError, match="not COCO's panoptic format"):
        make_coco150(coco, tmp_path / "out", {"val2017": []})


def test_segments_the_list_does_not_name() -> None:
    with pytest.raises(DataError, match=r"x\.png: got segment 5"):
        semantic_from_panoptic(np.array([[[5, 0, 0]]], dtype=np.uint8), {}, {}, "x.png")


def test_shipped_ids() -> None:
    ids = read_coco150_ids()
    assert {split: len(set(listed)) for split, listed in ids.items()} == {"train2017": 100, "val2017": 50}


def test_shipped_ids_are_those_of_the_folder() -> None:
    root = external_folder("MODUSEG_COCO150")
    assert read_coco150_ids() == {s: (root / f"{s}.txt").read_text().split() for s in ("train2017", "val2017")}


def test_script_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("moduseg: error: ")
    assert said.count("\n") == 1
