from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from moduseg.datasets import build
from moduseg.datasets.base import Dataset, present_classes
from moduseg.datasets.classes import COCO_CLASSES, COCO_CONTIGUOUS
from moduseg.datasets.coco import CocoDataset
from moduseg.datasets.coco_json import read_index
from moduseg.errors import ConfigError, DataError, MissingError
from tests.support.skeletons import H, W, box, coco_entries, indexed, noise, picture, runs, write_coco

TWO, CROWDED = "COCO_train2014_000000000009", "COCO_train2014_000000000070"


def _coco(root: Path, split: str = "train", **arguments: object) -> CocoDataset:
    data = build({"name": "coco", "root": str(root), **arguments}, split)
    assert isinstance(data, CocoDataset)
    return data


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def _rewrite(root: Path, change: Callable[[dict[str, Any]], object], split: str = "train") -> None:
    content = coco_entries(2014, split)
    change(content)
    (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))


def test_the_ids_are_those_of_annotated_images_in_order(coco: Path) -> None:
    data = _coco(coco)
    assert data.ids == (TWO, CROWDED)
    assert (data.name, data.classes, data.label_source, data.has_truth) == ("coco2014", COCO_CLASSES, "masks", True)
    assert _coco(coco, keep_unannotated=True).ids == (TWO, "COCO_train2014_000000000025", CROWDED)
    assert _coco(coco, keep_unannotated=True).labels_of("COCO_train2014_000000000025") == ()


def test_category_ids_become_contiguous() -> None:
    assert len(COCO_CLASSES) == 81
    assert (COCO_CONTIGUOUS[1], COCO_CONTIGUOUS[13], COCO_CONTIGUOUS[90]) == (1, 12, 80)
    assert (COCO_CLASSES[12], COCO_CLASSES[80]) == ("stop sign", "toothbrush")


def test_the_smaller_object_lies_on_top(coco: Path) -> None:
    """Whichever stands first in the file: the small dog (18 -> 17) stands before the person (1) that holds it."""
    sample = _coco(coco).load(TWO, truth=True)
    expected = np.zeros((H, W), np.uint8)
    expected[5:35, 10:50] = 1
    expected[10:20, 20:30] = 17
    np.testing.assert_array_equal(sample.semantic, expected)
    assert sample.labels == (1, 17)
    assert sample.instances is not None
    np.testing.assert_array_equal(sample.instances, np.select([expected == 17, expected == 1], [1, 2]))


def test_crowds_count_or_are_ignored(coco: Path) -> None:
    crowd = np.zeros((H, W), bool)
    crowd[10:20, 10:30] = True
    crowd[12, 12] = False
    for option, value, labels, objects in (("count", 80, (1, 80), {0, 1, 2}), ("ignore", 255, (1,), {0, 1})):
        sample = _coco(coco, crowd=option).load(CROWDED, truth=True)
        assert sample.semantic is not None
        np.testing.assert_array_equal(sample.semantic == value, crowd)
        assert sample.semantic[12, 12] == 1
        assert sample.labels == labels
        assert sample.instances is not None
        assert set(np.unique(sample.instances)) == objects


def test_the_same_as_pycocotools(tmp_path: Path, rng: np.random.Generator) -> None:
    """Random outlines, painted by its own decoder from large to small."""
    root = tmp_path / "coco"
    write_coco(root)
    objects: list[tuple[Any, int]] = []
    for i in range(12):
        points = np.round(rng.uniform([0, 0], [W, H], (rng.integers(3, 9), 2)), 2).ravel().tolist()
        outline: Any = [points, *box(int(rng.integers(30)), int(rng.integers(40)), 5, 7)]
        if i % 3 == 1:
            outline = runs(rng.random((H, W)) < 0.02 * i)
        if i % 3 == 2:
            compressed = coco_mask.encode(np.asfortranarray(rng.random((H, W)) < 0.02 * i))
            outline = {"size": [H, W], "counts": compressed["counts"].decode()}
        objects.append((outline, list(COCO_CONTIGUOUS)[i]))
    entries = [
        {"id": i, "image_id": 9, "category_id": c, "segmentation": s, "iscrowd": int(isinstance(s, dict))}
        for i, (s, c) in enumerate(objects)
    ]
    _rewrite(root, lambda content: content.update(annotations=entries))
    theirs = COCO(str(root / "annotations" / "instances_train2014.json"))
    masks = [theirs.annToMask(theirs.anns[i]) for i in range(len(objects))]
    expected = np.zeros((H, W), np.uint8)
    for i in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        expected[masks[i] > 0] = COCO_CONTIGUOUS[objects[i][1]]
    np.testing.assert_array_equal(_coco(root).semantic_of(TWO), expected)


def test_labels_of_the_annotations_know_hidden_objects(coco: Path) -> None:
    def hide(content: dict[str, Any]) -> None:
        content["annotations"].append(
            {"id": 1, "image_id": 9, "category_id": 90, "segmentation": box(11, 21, 4, 4), "iscrowd": 1}
        )
        content["annotations"].append(
            {"id": 2, "image_id": 9, "category_id": 3, "segmentation": box(11, 21, 4, 4), "iscrowd": 0}
        )

    _rewrite(coco, hide)
    masks, annotated = _coco(coco), _coco(coco, labels="instances")
    assert (masks.labels_of(TWO), annotated.labels_of(TWO)) == ((1, 3, 17), (1, 3, 17, 80))
    assert annotated.label_source == "instances"
    assert _coco(coco, labels="instances", crowd="ignore").labels_of(TWO) == (1, 3, 17)
    assert masks.fingerprint() != annotated.fingerprint()


def test_masks_on_disk_win(coco: Path) -> None:
    mask = np.full((H, W), 5, np.uint8)
    indexed(coco / "SegmentationClass" / "train2014" / f"{TWO}.png", mask)
    indexed(coco / "SegmentationClass" / "train2014" / "000000000070.png", mask)  # as some name them
    data = _coco(coco)
    assert data.labels_of(TWO) == data.labels_of(CROWDED) == (5,)
    assert present_classes(_coco(coco, mask_dir="absent").semantic_of(TWO)) == (1, 17)  # type: ignore[arg-type]


def test_2017_and_the_published_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path, 2017)
    with caplog.at_level(logging.WARNING):
        assert _coco(root, year=2017).ids == ("000000000009", "000000000070")
    assert "got 2 images, the published split 'train' of coco2017 has 117266" in caplog.text
    sizes = [_coco(root, s, year=y).published_size for y in (2014, 2017) for s in ("train", "val")]
    assert sizes == [82081, 40137, 117266, 4952]
    assert _coco(root, keep_unannotated=True).published_size == 82783


@pytest.mark.parametrize("key", [TWO, "000000000009", 9])
def test_label_files_may_count_images(coco: Path, key: object) -> None:
    vector = [0] * 80
    vector[79] = 1
    np.save(coco / "cls_labels.npy", {key: np.array(vector)}, allow_pickle=True)  # type: ignore[arg-type]
    data = _coco(coco, labels="cls_labels.npy")
    assert (data.labels_of(TWO), data.labels_of(CROWDED), data.label_source) == ((80,), None, "npy")


def test_the_index_is_small_and_right(coco: Path) -> None:
    path = coco / "annotations" / "instances_train2014.json"
    index = read_index(path)
    content = path.read_bytes()
    for i, (offset, length) in enumerate(zip(index.offsets, index.lengths, strict=True)):
        entry = json.loads(content[offset : offset + length])
        assert COCO_CONTIGUOUS[entry["category_id"]] == index.classes[i]
    arrays = [v for v in vars(index).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) < 40 * 3 + 40 * 4


def test_fingerprints_follow_annotations_and_crowds(coco: Path) -> None:
    before = _coco(coco).fingerprint()
    assert _coco(coco).fingerprint() == before
    assert _coco(coco, crowd="ignore").fingerprint() != before
    _rewrite(coco, lambda content: content["annotations"][0].update(segmentation=box(4, 4, 31, 40)))
    assert _coco(coco).fingerprint() != before


def _annotation(field: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][1].update({field: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("annotations"), "no 'annotations'"),
        (lambda c: c.pop("categories"), "no 'categories'"),
        (_annotation("category_id", 12), "has category 12"),
        (_annotation("image_id", 4), "an annotation of image 4, which is not listed"),
        (lambda c: c["images"].append(c["images"][0]), "image 70 is listed twice"),
        (lambda c: c["images"][0].update(width=0), "image 70 is 48 x 0"),
        (lambda c: c["images"][0].update(width=10**9), "image 70 is 48 x 1000000000"),
        (lambda c: c["images"][0].update(height="48"), "image 70 is '48' x 64"),
        (lambda c: c["images"][0].pop("file_name"), "'file_name'"),
        (lambda c: c["categories"].append({"id": 91, "name": "unicorn"}), "category 91 is 'unicorn'"),
        (lambda c: c.update(annotations={}), "expected '\\['"),
        (lambda c: c.update(annotations=[3]), "holds a int"),
    ],
)
def test_files_of_another_format(coco: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    _rewrite(coco, change)
    with pytest.raises(DataError, match=rf"instances_train2014\.json: not COCO's instances format.*{words}") as caught:
        _ = _coco(coco).ids
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_half_a_file(coco: Path, part: float) -> None:
    path = coco / "annotations" / "instances_train2014.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match="not COCO's instances format"):
        _ = _coco(coco).ids


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5, "x"]], "a polygon is"),
        ([], "empty list"),
        (None, "cannot be rasterised"),
        ({"size": [H, W], "counts": [5, 5]}, f"do not sum to {H * W}"),
        ({"size": [H, W], "counts": "~~~"}, "cannot be rasterised"),
        ({"size": [W, H], "counts": [H * W]}, r"a mask of \[64, 48\], the image is \[48, 64\]"),
        ({"counts": [H * W]}, "'size'"),
        ([[0, 0, 1e12, 1, 2, 2]], "within 128 pixels"),
    ],
)
def test_broken_outlines_cost_their_own_image(coco: Path, outline: object, words: str) -> None:
    _rewrite(coco, _annotation("segmentation", outline))  # of image 9
    data = _coco(coco)
    with pytest.raises(DataError, match=rf"annotation 101 cannot be rasterised.*{words}|annotation 101.*{words}"):
        data.load(TWO, truth=True)
    assert data.load(CROWDED, truth=True).labels == (1, 80)


def test_ids_that_leave_the_folder(coco: Path) -> None:
    _rewrite(coco, lambda content: content["images"][1].update(file_name="../../x.jpg"))
    with pytest.raises(DataError, match=r"got image id '\.\./\.\./x'"):
        _ = _coco(coco).ids


def test_missing_pieces_say_what_to_fetch(coco: Path, tmp_path: Path) -> None:
    cases: list[tuple[Dataset, str]] = [
        (_coco(tmp_path / "absent"), r"dataset\.root: got '.*absent'.*train2014/ and annotations/instances_train2014"),
        (_coco(coco, annotation_dir="labels"), r"without labels/instances_train2014\.json.*annotations_trainval2014"),
        (_coco(coco, year=2017), "train2017"),
        (_coco(coco, list_dir="lists"), r"dataset\.list_dir: no such list .*train2014\.txt.*prepare_data"),
    ]
    for data, words in cases:
        with pytest.raises(MissingError, match=words) as caught:
            _ = data.ids
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "split", "words"),
    [
        ({"year": 2015}, "train", "year: got 2015, expected 2014 or 2017"),
        ({}, "train2014", "split: got 'train2014', expected train or val"),
        ({"crowd": "drop"}, "train", r"dataset\.crowd: got 'drop'.*one of count, ignore"),
        ({"labels": "xml.txt"}, "train", r"labels: got 'xml\.txt', expected auto, masks, instances, a \.json"),
    ],
)
def test_wrong_settings(arguments: dict[str, object], split: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _coco(Path("x"), split, **arguments)


def test_images_that_the_annotations_do_not_know(coco: Path) -> None:
    picture(coco / "train2014" / "COCO_train2014_000000000001.jpg", noise(1))
    (coco / "lists").mkdir()
    (coco / "lists" / "train2014.txt").write_text(f"COCO_train2014_000000000001\n{TWO}\n")
    data = _coco(coco, list_dir="lists")
    with pytest.raises(DataError, match=r"'COCO_train2014_000000000001': not in .*instances_train2014"):
        data.load(data.ids[0], truth=True)
    assert data.load(TWO, truth=True).labels == (1, 17)
