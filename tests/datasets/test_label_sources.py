"""Image-level labels from everywhere, and what results call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moduseg.datasets import Dataset, build
from moduseg.datasets.labels import read_label_file
from moduseg.datasets.voc import read_voc_xml
from moduseg.errors import ConfigError, DataError, MissingError
from tests.support.skeletons import VOC_LABELS, write_voc, write_xml

ID = "2007_000032"


def _voc(root: Path, labels: str, split: str = "train") -> Dataset:
    return build({"name": "voc", "root": str(root), "labels": labels}, split)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "VOC2012")


def _vector(*ids: int) -> np.ndarray:
    vector = np.zeros(20, np.float32)
    vector[[i - 1 for i in ids]] = 1
    return vector


def test_every_source_and_its_name(voc: Path) -> None:
    write_xml(voc, ID, "dog", "person", "dog")
    np.save(voc / "cls_labels.npy", {ID: _vector(2, 20)}, allow_pickle=True)  # type: ignore[arg-type]
    (voc / "l.csv").write_text(f"image,labels\n{ID}.jpg,cat;bird\n")
    (voc / "l.json").write_text(json.dumps({ID: ["cow"]}))
    made = {"source": "masks", "images": [{"img_id": ID, "labels": [5]}]}
    (voc / "image_labels").mkdir()
    (voc / "image_labels" / "train.json").write_text(json.dumps(made))
    for labels, source, expected in (
        ("auto", "masks", (1,)),
        ("masks", "masks", (1,)),
        ("xml", "xml", (12, 15)),
        ("cls_labels.npy", "npy", (2, 20)),
        ("l.csv", "csv", (3, 8)),
        ("l.json", "json", (10,)),
        ("image_labels", "masks", (5,)),
        (str(voc / "l.json"), "json", (10,)),
    ):
        data = _voc(voc, labels)
        assert (data.label_source, data.labels_of(ID), data.load(ID, truth=True).labels) == (source, expected, expected)
    prints = {_voc(voc, labels).fingerprint() for labels in ("masks", "xml", "cls_labels.npy", "l.csv", "l.json")}
    assert len(prints) == 5


def test_masks_by_request_though_there_is_a_file(voc: Path) -> None:
    (voc / "image_labels.json").write_text(json.dumps({ID: [9]}))
    assert (_voc(voc, "auto").labels_of(ID), _voc(voc, "masks").labels_of(ID)) == ((9,), (1,))


def test_images_by_number(voc: Path) -> None:
    np.save(voc / "l.npy", {2007000032: _vector(7)}, allow_pickle=True)  # type: ignore[arg-type]
    assert _voc(voc, "l.npy").labels_of(ID) == (7,)
    assert _voc(voc, "l.npy").labels_of("2007_000033") is None


def test_vectors_of_another_data_set(voc: Path) -> None:
    for size in (80, 21):  # COCO's, and one with the background in it
        np.save(voc / "l.npy", {ID: np.ones(size)}, allow_pickle=True)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=rf"vectors of {size} entries, expected 20"):
            _voc(voc, "l.npy").labels_of(ID)


def test_xml_of_every_image(voc: Path) -> None:
    data = _voc(voc, "xml")
    assert {id: data.labels_of(id) for id in data.ids} == {id: (VOC_LABELS[id],) for id in data.ids}
    (voc / "Annotations" / f"{ID}.xml").unlink()
    assert _voc(voc, "xml").labels_of(ID) is None
    write_xml(voc, ID)
    assert _voc(voc, "xml").labels_of(ID) == ()
    write_xml(voc, ID, "unicorn")
    with pytest.raises(DataError, match="label 'unicorn', expected one of the 20 class names"):
        _voc(voc, "xml").labels_of(ID)
    before = _voc(voc, "xml").fingerprint()
    write_xml(voc, ID, "cat")
    assert _voc(voc, "xml").fingerprint() != before


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><object><name>&b;</name></object></annotation>'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not XML"),
        (b"<annotation>", "not XML"),
        (b"<a/>", "got <a>"),
        (b"<annotation><object/></annotation>", "1 unnamed objects"),
        (b"<?xml version='1.0' encoding='nonsense'?><annotation/>", "not XML"),
        (BOMB.encode(), "declares entities"),
    ],
)
def test_broken_annotations(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.xml.*{words}") as caught:
        read_voc_xml(path)
    assert "\n" not in str(caught.value)


def test_missing_sources_are_one_line(voc: Path) -> None:
    with pytest.raises(MissingError, match=r"dataset\.labels: got 'image_labels', no such file or folder with train\."):
        _voc(voc, "image_labels").labels_of(ID)
    with pytest.raises(MissingError, match=r"dataset\.labels: got 'l\.json'.*expected auto, masks, xml, a \.json"):
        _ = _voc(voc, "l.json").label_source
    with pytest.raises(ConfigError, match=r"labels: got 'labels\.txt'"):
        _voc(voc, "labels.txt")
    (voc / "Annotations").rename(voc / "elsewhere")
    with pytest.raises(MissingError, match=r"dataset\.annotation_dir: got .*Annotations"):
        _voc(voc, "xml").labels_of(ID)


@pytest.mark.parametrize("source", [3, "", "two words", "x" * 41, None])
def test_sources_that_a_file_may_not_state(tmp_path: Path, source: object) -> None:
    (tmp_path / "l.json").write_text(json.dumps({"source": source, "images": []}))
    with pytest.raises(DataError, match="got source"):
        read_label_file(tmp_path / "l.json")


def test_a_folder_takes_other_files_too(tmp_path: Path) -> None:
    from tests.support.skeletons import noise, picture

    picture(tmp_path / "images" / "trip" / "a 1.png", noise(1))
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    (tmp_path / "labels.csv").write_text("image,labels\ntrip/a 1,cat\n")
    np.save(tmp_path / "other.npy", {"trip/a 1": np.array([1, 1])}, allow_pickle=True)  # type: ignore[arg-type]
    for labels, expected in (("auto", (1,)), ("other.npy", (1, 2))):
        data = build({"name": "folder", "root": str(tmp_path), "labels": labels}, "train")
        assert (data.ids, data.labels_of("trip/a 1")) == (("trip/a 1",), expected)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(DataError, match=r"got labels\.json and labels\.csv, expected one"):
        _ = build({"name": "folder", "root": str(tmp_path)}, "train").ids
