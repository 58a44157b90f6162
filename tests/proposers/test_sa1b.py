from __future__ import annotations

import json
import string
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from moduseg.errors import DataError
from moduseg.masks.rle import decode_counts
from moduseg.proposers import sa1b
from moduseg.structures import Proposals

SIZE = (37, 53)


def random_proposals(rng: np.random.Generator, count: int = 6, size: tuple[int, int] = SIZE) -> Proposals:
    """Blocks, noise, a full and an empty mask."""
    masks = rng.random((count, *size)) < rng.random((count, 1, 1))
    masks[0], masks[1] = True, False
    masks[2] = False
    masks[2, 5:20, 7:30] = True
    scores = rng.random(count).astype(np.float32)
    return Proposals(torch.from_numpy(masks), torch.from_numpy(scores), torch.from_numpy(scores[::-1].copy()))


def test_reads_back_exactly(rng: np.random.Generator, device: torch.device, tmp_path: Path) -> None:
    stored = random_proposals(rng)
    data = sa1b.dump(sa1b.to_annotations(stored.to(device), "folder/a"))
    assert data == sa1b.dump(sa1b.to_annotations(stored, "folder/a"))
    (tmp_path / "a.json").write_bytes(data)
    for expected in (SIZE, None):
        read = sa1b.read_proposals(tmp_path / "a.json", expected)
        for name in ("masks", "predicted_iou", "stability_score"):
            assert torch.equal(getattr(read, name), getattr(stored, name)), name
        assert read.masks.is_contiguous()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 33)])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_disjoint_masks_come_with_a_map(size: tuple[int, int], count: int, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(rng.integers(-1, max(count, 1), size)).clamp(max=count - 1)
    masks = ids == torch.arange(count + 2)[:, None, None]  # the last two are empty
    found = sa1b.from_annotations(sa1b.to_annotations(Proposals(masks), "a"), None, "a")
    assert torch.equal(found.masks, masks)
    assert found.id_map is not None
    assert torch.equal(found.id_map.long(), ids)
    masks[count] = torch.zeros(size, dtype=torch.bool)
    masks[count, -1, -1] = masks[count + 1, -1, -1] = True  # one pixel in two masks
    overlapping = sa1b.from_annotations(sa1b.to_annotations(Proposals(masks), "a"), None, "a")
    assert overlapping.id_map is None
    assert torch.equal(overlapping.masks, masks)


def test_fields_are_those_of_sa1b(rng: np.random.Generator) -> None:
    stored = random_proposals(rng)
    data = json.loads(sa1b.dump(sa1b.to_annotations(stored, "folder/a")))
    assert data["image"] == {"image_id": "folder/a", "width": 53, "height": 37, "file_name": "folder/a"}
    assert [a["id"] for a in data["annotations"]] == list(range(1, 7))
    assert [a["area"] for a in data["annotations"]] == stored.areas.tolist()
    assert data["annotations"][2]["bbox"] == [7, 5, 23, 15]
    for mask, annotation in zip(stored.masks, data["annotations"], strict=True):
        np.testing.assert_array_equal(coco.decode(annotation["segmentation"]).astype(bool), mask.numpy())


@pytest.mark.parametrize("count", [255, 256, 600])
def test_more_masks_than_a_byte_counts(count: int, rng: np.random.Generator, tmp_path: Path) -> None:
    proposals = Proposals(torch.from_numpy(rng.random((count, 5, 7)) < 0.5))
    data = sa1b.to_annotations(proposals, "a")
    assert [a["area"] for a in data["annotations"]] == proposals.areas.tolist()
    (tmp_path / "a.json").write_bytes(sa1b.dump(data))
    assert torch.equal(sa1b.read_proposals(tmp_path / "a.json").masks, proposals.masks)


def test_no_proposals() -> None:
    data = sa1b.to_annotations(Proposals(torch.zeros((0, 4, 7), dtype=torch.bool)), "a")
    assert data["annotations"] == []
    assert sa1b.from_annotations(data, None, "a.json").masks.shape == (0, 4, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_json_has_no_word_for(value: float) -> None:
    stored = Proposals(torch.ones((1, 2, 2), dtype=torch.bool), torch.tensor([value]))
    with pytest.raises(ValueError, match=r"JSON compliant"):
        sa1b.dump(sa1b.to_annotations(stored, "a"))


def test_counts_agree_with_pycocotools(rng: np.random.Generator) -> None:
    for _ in range(50):
        size = tuple(rng.integers(1, 400, 2))
        mask = np.asfortranarray(rng.random(size) < rng.choice([0.001, 0.1, 0.5, 0.999]))
        counts = decode_counts(coco.encode(mask.astype(np.uint8))["counts"].decode())
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        np.testing.assert_array_equal(flat.reshape(size, order="F"), mask)


def one(segmentation: Any, **others: Any) -> dict[str, Any]:
    """A file with one annotation of a 4 x 3 image."""
    annotation = {"segmentation": segmentation, "predicted_iou": 0.5, "stability_score": 0.5, **others}
    return {"image": {"width": 3, "height": 4}, "annotations": [annotation]}


GOOD = {"size": [4, 3], "counts": [5, 2, 5]}
EXPECTED = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]], bool)


@pytest.mark.parametrize(
    "data",
    [
        one(GOOD),
        one({"size": [4, 3], "counts": [5, 1, 0, 1, 5]}),
        one({"size": [4, 3], "counts": "525"}),
        one({"size": [4, 3], "counts": b"525"}),
        one([[1, 1, 2, 1, 2, 3, 1, 3]]),
        one([[1, 1, 2, 1, 2, 2, 1, 2], [1, 2, 2, 2, 2, 3, 1, 3]]),
        {"annotations": one(GOOD)["annotations"]},
        one(GOOD)["annotations"],
        {"image": {}, "annotations": [{"segmentation": GOOD}]},
        one(GOOD, predicted_iou=[0.5]),
    ],
    ids=[
        "list",
        "zero run",
        "string",
        "bytes",
        "polygon",
        "polygons",
        "no image",
        "bare list",
        "no scores",
        "list score",
    ],
)
@pytest.mark.parametrize("expected", [(4, 3), None])
def test_other_writers(data: Any, expected: tuple[int, int] | None) -> None:
    proposals = sa1b.from_annotations(data, expected, "a.json")
    np.testing.assert_array_equal(proposals.masks[0].numpy(), EXPECTED)


def test_polygon_without_a_size() -> None:
    bare = one([[1, 1, 2, 1, 2, 3, 1, 3]])["annotations"]
    np.testing.assert_array_equal(sa1b.from_annotations(bare, (4, 3), "a.json").masks[0].numpy(), EXPECTED)
    with pytest.raises(DataError, match="image size is None"):
        sa1b.from_annotations(bare, None, "a.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "'annotations' is missing"),
        (3, "'annotations' is int"),
        ({}, "'annotations' is missing"),
        ({"annotations": [1]}, "a list of other things"),
        ({"annotations": []}, "image size is None"),
        ({"image": 1, "annotations": []}, "'image' is int"),
        ({"image": {"width": 3}, "annotations": []}, "image size"),
        ({"image": {"width": 3, "height": True}, "annotations": []}, "image size"),
        ({"image": {"width": 3, "height": -4}, "annotations": []}, "image size"),
        ({"image": {"width": 3.5, "height": 4}, "annotations": []}, "image size"),
        ({"image": {"width": 10**6, "height": 10**6}, "annotations": []}, "100000000 pixels at most"),
        ({"image": {"width": 10**4, "height": 10**4}, "annotations": [{}] * 30}, "fit in memory"),
        (one(None), "annotation 0: 'segmentation' is missing"),
        (one({}), "'segmentation' is"),
        (one({"size": [3, 4], "counts": [12]}), r"the mask is \[3, 4\]"),
        (one({"size": [4], "counts": [12]}), "the mask is"),
        (one({"counts": [12]}), "the mask is None"),
        (one({"size": [4, 3], "counts": None}), "NoneType"),
        (one({"size": [4, 3], "counts": [13]}), "whole number from 0 to 12"),
        (one({"size": [4, 3], "counts": [6, 7]}), "sum to 12"),
        (one({"size": [4, 3], "counts": [-1, 13]}), "whole number"),
        (one({"size": [4, 3], "counts": [6.0, 6]}), "whole number"),
        (one({"size": [4, 3], "counts": ["6", 6]}), "whole number"),
        (one({"size": [4, 3], "counts": [2**64]}), "whole number"),
        (one({"size": [4, 3], "counts": []}), "sum to 12"),
        (one({"size": [4, 3], "counts": ""}), "sum to 12"),
        (one({"size": [4, 3], "counts": "52"}), "sum to 12"),
        (one({"size": [4, 3], "counts": "52P"}), "stops inside a number"),
        (one({"size": [4, 3], "counts": "5 5"}), "out of range"),
        (one({"size": [4, 3], "counts": "5é5"}), "out of range"),
        (one({"size": [4, 3], "counts": "o" * 100}), "stops inside"),
        (one({"size": [4, 3], "counts": "o" * 20 + "0"}), "more than 32 bits"),
        (one({"size": [4, 3], "counts": "O5"}), "negative run"),
        (one([]), "empty list"),
        (one([[1, 1, 2]]), "three points or more"),
        (one([[1, 1, 2, 1, 2, 3, 1]]), "three points or more"),
        (one([[1, 1, 2, 1, 2, float("nan")]]), "three points or more"),
        (one([[1, 1, 2, 1, 2, 1e9]]), "within 8 pixels"),
        (one([{"size": [4, 3]}]), "three points or more"),
        (one([[0, 0, 3, 4] * 1000]), "outline"),
        (one(GOOD, predicted_iou="high"), "'predicted_iou' is high"),
        (one(GOOD, stability_score=None), "'stability_score' is None"),
        (one(GOOD, predicted_iou=float("nan")), "'predicted_iou' is nan"),
        (one(GOOD, predicted_iou=10**400), "'predicted_iou'"),
    ],
)
def test_malformed(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        sa1b.from_annotations(data, None, "folder/a.json")
    text = str(error.value)
    assert text.startswith("folder/a.json: ")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"annotations": [' + b"9" * 5000 + b"]}", b"null", b"\x00" * 50],
)
def test_broken_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: .*; ") as error:
        sa1b.read_proposals(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        sa1b.read_proposals(tmp_path / "none.json")


def test_mutilated_counts(rng: np.random.Generator) -> None:
    """Whatever the string, it is refused or it describes a mask of the right size."""
    data = sa1b.to_annotations(random_proposals(rng), "a")
    alphabet = string.printable + "éÿ"
    messages = []
    for _ in range(400):
        broken = deepcopy(data["annotations"][int(rng.integers(2, 6))])
        text = list(broken["segmentation"]["counts"])
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(text) or 1))
            kind = int(rng.integers(4))
            text[place : place + (kind != 0)] = [] if kind == 1 else [alphabet[int(rng.integers(len(alphabet)))]]
            if kind == 3:
                text = text[:place]
        broken["segmentation"]["counts"] = "".join(text)
        try:
            read = sa1b.from_annotations([broken], SIZE, "a.json")
        except DataError as error:
            messages.append(str(error))
        else:
            assert read.masks.shape == (1, *SIZE)
    assert len(messages) > 300
    assert not any("\n" in message for message in messages)


def test_mutilated_files(rng: np.random.Generator, tmp_path: Path) -> None:
    """Bytes changed anywhere in a file: refused with one line, or read as masks of the right size."""
    whole = sa1b.dump(sa1b.to_annotations(random_proposals(rng, 3, (8, 9)), "a"))
    path = tmp_path / "a.json"
    messages = []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(bytes(content[: int(rng.integers(len(content)))] if rng.random() < 0.2 else content))
        try:
            read = sa1b.read_proposals(path, (8, 9))
        except DataError as error:
            messages.append(str(error))
        else:
            assert read.masks.shape[1:] == (8, 9)
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("kind", [int, bool])
def test_matrices_of_0_and_1_are_masks(rng: np.random.Generator, kind: type) -> None:
    stored = random_proposals(rng)
    data = sa1b.to_annotations(stored, "a")
    for annotation, mask in zip(data["annotations"], stored.masks, strict=True):
        annotation["segmentation"] = [[kind(value) for value in row] for row in mask.tolist()]
    assert torch.equal(sa1b.from_annotations(data, SIZE, "a").masks, stored.masks)


def test_other_matrices_are_refused(rng: np.random.Generator) -> None:
    data = sa1b.to_annotations(random_proposals(rng), "a")
    data["annotations"][0]["segmentation"] = [[2] * SIZE[1]] * SIZE[0]
    with pytest.raises(DataError, match="annotation 0"):
        sa1b.from_annotations(data, SIZE, "a")


@pytest.mark.parametrize("area", [0, 1, 37 * 53 - 1, 10**9, 0.5])
def test_a_mask_that_contradicts_its_area_is_refused(rng: np.random.Generator, area: float) -> None:
    data = sa1b.to_annotations(random_proposals(rng), "a")
    data["annotations"][0]["area"] = area
    with pytest.raises(DataError, match=rf"annotation 0: the mask has {37 * 53} pixels, 'area' says {area}"):
        sa1b.from_annotations(data, SIZE, "a")


def test_outlines_may_differ_a_little_from_their_area() -> None:
    square = {"segmentation": [[2, 2, 22, 2, 22, 22, 2, 22]]}
    for area in (400, 435, 380):
        assert len(sa1b.from_annotations([{**square, "area": area}], SIZE, "a")) == 1
    with pytest.raises(DataError, match="'area' says 900"):
        sa1b.from_annotations([{**square, "area": 900}], SIZE, "a")


@pytest.mark.parametrize("parents", [[-1, 0, 0, 2, -1, 4], [-1] * 6, [5, 5, 1, 1, 1, -1]])
def test_parents_read_back(rng: np.random.Generator, tmp_path: Path, parents: list[int]) -> None:
    stored = replace(random_proposals(rng), parents=torch.tensor(parents))
    (tmp_path / "a.json").write_bytes(sa1b.encode_proposals(stored, "a"))
    read = sa1b.read_proposals(tmp_path / "a.json").parents
    assert read is not None
    assert read.dtype == torch.int64
    assert read.tolist() == parents


def test_files_without_parents_are_those_of_before(rng: np.random.Generator) -> None:
    data = sa1b.to_annotations(random_proposals(rng), "a")
    assert not any("parent" in annotation for annotation in data["annotations"])
    assert sa1b.from_annotations(data, None, "a").parents is None
    data["annotations"][2]["parent"] = 0
    parents = sa1b.from_annotations(data, None, "a").parents
    assert parents is not None
    assert parents.tolist() == [-1, -1, 0, -1, -1, -1]


def test_disjoint_masks_keep_their_parents() -> None:
    masks = torch.eye(3, dtype=torch.bool)[:, None]
    data = sa1b.to_annotations(Proposals(masks, parents=torch.tensor([-1, -1, -1])), "a")
    read = sa1b.from_annotations(data, None, "a")
    assert read.id_map is not None
    assert read.parents is not None
    assert read.parents.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        pytest.param(6, "'parent' is 6, expected null or the position of one of the 6 annotations", id="no such mask"),
        pytest.param(-1, "'parent' is -1", id="negative"),
        pytest.param(True, "'parent' is True", id="truth value"),
        pytest.param(1.0, "'parent' is 1.0", id="fraction"),
        pytest.param("1", "'parent' is 1", id="text"),
        pytest.param(1, "mask 1 has itself among its ancestors", id="circle"),
    ],
)
def test_parents_that_are_none_are_refused(rng: np.random.Generator, parent: Any, message: str) -> None:
    data = sa1b.to_annotations(random_proposals(rng), "a")
    data["annotations"][1]["parent"] = parent
    with pytest.raises(DataError, match=message) as error:
        sa1b.from_annotations(data, SIZE, "folder/a.json")
    assert str(error.value).startswith("folder/a.json: ")
    assert "remove the field" in str(error.value)
