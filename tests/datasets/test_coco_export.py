"""Annotations of one's own in COCO's format, as annotation tools export them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moduseg.config import compose
from moduseg.datasets import build
from moduseg.datasets.base import Dataset
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.stages.infer import Infer
from moduseg.tools import check_data
from tests.support.skeletons import H, W, box, noise, picture

Change = Callable[[dict[str, Any]], object]


def _content() -> dict[str, Any]:
    """Three images, ids from 0, with a row that is only the parent of the others, as Roboflow writes it."""
    return {
        "images": [{"id": i, "file_name": f"p{i}.png", "height": H, "width": W} for i in range(3)],
        "categories": [
            {"id": 0, "name": "things", "supercategory": "none"},
            {"id": 1, "name": "disc", "supercategory": "things"},
            {"id": 2, "name": "square", "supercategory": "things"},
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "segmentation": box(5, 10, 20, 30), "iscrowd": 0}
            for i in range(3)
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        picture(tmp_path / "images" / f"p{i}.png", noise(i))
    return tmp_path


def _open(root: Path, content: dict[str, Any], split: str = "train", **arguments: object) -> Dataset:
    (root / "own.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    cfg = {"name": "coco_json", "annotations": str(root / "own.json"), "images": str(root / "images"), **arguments}
    return build(cfg, split)


def test_own_categories_are_the_classes(root: Path) -> None:
    data = _open(root, _content())
    assert data.classes == ("background", "disc", "square")
    assert (data.ids, data.label_source, data.has_truth) == (("p0", "p1", "p2"), "instances", True)
    assert [data.labels_of(i) for i in data.ids] == [(1,), (2,), (1,)]
    sample = data.load("p1", truth=True)
    expected = np.zeros((H, W), np.uint8)
    expected[5:25, 10:40] = 2
    np.testing.assert_array_equal(sample.semantic, expected)


def _as_text(content: dict[str, Any]) -> None:
    for part in ("images", "categories", "annotations"):
        for entry in content[part]:
            for key in ("id", "image_id", "category_id", "height", "width", "iscrowd"):
                if key in entry:
                    entry[key] = str(entry[key])


def _rename(path: str) -> Change:
    return lambda content: [entry.update(file_name=path + entry["file_name"]) for entry in content["images"]]


def _shift_categories(content: dict[str, Any]) -> None:
    for entry in content["categories"]:
        entry["id"] += 40
    for entry in content["annotations"]:
        entry["category_id"] += 40


def _with_background(content: dict[str, Any]) -> None:
    content["categories"][0] = {"id": 0, "name": "_background_"}
    content["annotations"].append({**content["annotations"][0], "id": 9, "category_id": 0})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_as_text, id="ids as text"),
        pytest.param(_rename("./images/"), id="paths below another folder"),
        pytest.param(_rename("C:\\\\work\\\\images\\\\"), id="paths of Windows"),
        pytest.param(_rename("../../media/upload/1/"), id="paths that climb"),
        pytest.param(_shift_categories, id="categories from 40"),
        pytest.param(_with_background, id="background as a category"),
        pytest.param(lambda c: c["categories"].reverse(), id="categories in another order"),
        pytest.param(lambda c: c.update(info={}, licenses=[]), id="other lists"),
        pytest.param(lambda c: [e.pop("iscrowd") for e in c["annotations"]], id="no iscrowd"),
        pytest.param(lambda c: [e.update(height=float(H)) for e in c["images"]], id="sizes as fractions"),
    ],
)
def test_dialects_mean_the_same(root: Path, change: Change) -> None:
    content = _content()
    change(content)
    data = _open(root, content)
    assert (data.ids, data.classes) == (("p0", "p1", "p2"), ("background", "disc", "square"))
    assert [data.labels_of(i) for i in data.ids] == [(1,), (2,), (1,)]
    semantic = data.semantic_of("p1")
    assert semantic is not None
    assert int((semantic == 2).sum()) == 20 * 30


def test_a_byte_order_mark_and_unicode_names(root: Path) -> None:
    content = _content()
    content["categories"][1]["name"] = "Größe"
    data = _open(root, content)
    (root / "own.json").write_bytes(b"\xef\xbb\xbf" + (root / "own.json").read_bytes())
    assert data.classes == ("background", "Größe", "square")
    assert data.semantic_of("p0") is not None


def test_files_in_subfolders_are_recognised(root: Path) -> None:
    picture(root / "images" / "deep" / "q.png", noise(4))
    content = _content()
    content["images"][0]["file_name"] = "q.png"
    content["images"][1]["file_name"] = "other/p1.jpg"
    assert _open(root, content).ids == ("deep/q", "p1", "p2")


def test_boxes_without_outlines_give_labels_alone(root: Path) -> None:
    content = _content()
    for entry in content["annotations"]:
        entry.update(segmentation=[], bbox=[1, 1, 9, 9])
    data = _open(root, content)
    assert (data.has_truth, data.labels_of("p1"), data.semantic_of("p1")) == (False, (2,), None)


def test_a_second_file_for_val_has_the_classes_of_train(root: Path) -> None:
    content = _content()
    content["categories"] = [{"id": 7, "name": "square"}, {"id": 9, "name": "disc"}]
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": box(5, 10, 4, 4)}]
    (root / "val.json").write_text(json.dumps(content))
    val = _open(root, _content(), "val", val_annotations=str(root / "val.json"))
    assert (val.classes, val.labels_of("p1"), val.labels_of("p2")) == (("background", "disc", "square"), (2,), ())
    content["categories"][0]["name"] = "Square"
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"got category 'Square'.*did you mean 'square'\?"):
        _ = _open(root, _content(), "val", val_annotations=str(root / "val.json")).classes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), "no 'categories'.*correct the file or export it again"),
        (lambda c: c["images"][0].pop("height"), "no 'height'"),
        (lambda c: c["images"][0].update(height=None), "got None, expected a number"),
        (lambda c: c["annotations"][0].update(category_id=5), "has category 5, which is not listed"),
        (lambda c: c["annotations"][0].update(image_id="x"), "image 'x', which is not listed"),
        (lambda c: c["images"].append({**c["images"][0], "id": 8}), "two images that are 'p0'"),
        (lambda c: c["categories"].append({"id": 8, "name": "disc"}), "expected a name not used before"),
        (lambda c: c["categories"].clear(), "got 0 classes|not listed"),
    ],
)
def test_broken_files_name_the_remedy(root: Path, change: Change, words: str) -> None:
    content = _content()
    change(content)
    data = _open(root, content)
    with pytest.raises(DataError, match=words) as caught:
        _ = data.ids, data.classes
    assert "\n" not in str(caught.value)
    assert "fetch it again" not in str(caught.value)


def test_missing_pieces_name_their_key(root: Path) -> None:
    with pytest.raises(MissingError, match=r"dataset\.annotations: got '.*absent\.json', no such file"):
        _ = _open(root, _content(), annotations=str(root / "absent.json")).ids
    with pytest.raises(MissingError, match=r"dataset\.images: got '.*absent'"):
        _ = _open(root, _content(), images=str(root / "absent")).ids
    (root / "empty").mkdir()
    with pytest.raises(MissingError, match=r"holds none of the 3 images of .*own\.json \(first 'p0'\)"):
        _ = _open(root, _content(), images=str(root / "empty")).ids
    with pytest.raises(ConfigError, match=r"split: got 'test', expected train or val; set dataset\.val_annotations"):
        _open(root, _content(), "test")


def test_own_classes_in_cocos_place_name_this_data_set(root: Path) -> None:
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(_content()))
    data = build({"name": "coco", "root": str(root), "year": 2017}, "train")
    with pytest.raises(DataError, match=r"dataset=coco_json dataset\.annotations='.*json' dataset\.images=<folder>"):
        _ = data.ids


def test_an_export_from_end_to_end(root: Path) -> None:
    _open(root, _content())
    cfg = compose(
        [
            "dataset=coco_json", f"dataset.annotations={root / 'own.json'}", f"dataset.images={root / 'images'}",
            "backbone=miniature_random", "proposer=ground_truth", "pseudo_masks=ground_truth", "retrieval.top_k=1",
            f"runtime.outputs={root / 'outputs'}", "runtime.device=cpu", "evaluation.bootstrap=0",
            "evaluation.panels=0", "evaluation.report=false",
        ]
    )  # fmt: skip
    assert not check_data.run(cfg).is_broken
    results = json.loads((Infer.run(cfg) / "results.json").read_text())
    assert (results["images"], list(results["iou"])) == (3, ["background", "disc", "square"])
