"""ADE20K and Cityscapes: data sets whose truth has no background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moduseg.datasets import build
from moduseg.datasets.ade20k import Ade20kDataset
from moduseg.datasets.classes import ADE20K_CLASSES, CITYSCAPES_CLASSES
from moduseg.errors import ConfigError, DataError, LabelIdError, MissingError
from tests.support.skeletons import H, W, grey, noise, picture, write_ade20k, write_cityscapes


def test_ade20k_other_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = str(write_ade20k(tmp_path))
    train = build({"name": "ade20k", "root": root}, "train")
    assert train.ids == ("ADE_train_00000001", "ADE_train_00000002")
    assert "got 2 images, the published split 'train' of ade20k has 20210" in caplog.text
    assert (train.num_classes, train.classes[1], train.classes[150]) == (150, "wall", "flag")
    assert len(set(ADE20K_CLASSES)) == 151
    sample = train.load("ADE_train_00000001", truth=True)
    assert sample.semantic is not None
    assert (sample.semantic[0, 0], sample.semantic[0, 30], sample.semantic[40, 0]) == (255, 1, 150)
    assert (sample.labels, sample.instances, train.has_background) == ((1, 150), None, False)
    assert build({"name": "ade20k", "root": root}, "val").ids == ("ADE_val_00000001",)


def test_ade20k_test_split_and_lists(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    picture(root / "images" / "testing" / "ADE_test_00000001.jpg", noise(1))
    data = build({"name": "ade20k", "root": str(root)}, "test")
    assert (data.has_truth, data.label_source) == (False, "none")
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("ADE_train_00000002\n")
    assert build({"name": "ade20k", "root": str(root), "list_dir": "lists"}, "train").ids == ("ADE_train_00000002",)


def test_ade20k_ids_out_of_range(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    grey(root / "annotations" / "training" / "ADE_train_00000001.png", np.full((H, W), 151))
    with pytest.raises(LabelIdError, match=r"has label id 151, expected 0\.\.150 or 255"):
        build({"name": "ade20k", "root": str(root)}, "train").load("ADE_train_00000001", truth=True)


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    root = str(write_cityscapes(tmp_path))
    data = build({"name": "cityscapes", "root": root}, "train")
    assert data.ids == ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "ulm/ulm_000000_000019")
    assert (data.num_classes, data.published_size, data.has_background) == (19, 2975, False)
    sample = data.load("ulm/ulm_000000_000019", truth=True)
    assert sample.semantic is not None
    # sky 23, road 7, bicycle 33, caravan 29 (void), unlabelled 0 (void)
    assert sample.semantic[::10, 0].tolist() == [11, 1, 19, 255, 255]
    names = [CITYSCAPES_CLASSES[i] for i in sample.labels or ()]
    assert (names, sample.instances) == (["road", "sky", "bicycle"], None)


def test_cityscapes_annotations_of_test_are_blanks(tmp_path: Path) -> None:
    data = build({"name": "cityscapes", "root": str(write_cityscapes(tmp_path))}, "test")
    assert (len(data), data.has_truth, data.label_source) == (1, False, "none")
    assert data.load(data.ids[0], truth=True).semantic is None


def test_cityscapes_other_encodings_are_refused(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    path = root / "gtFine" / "val" / "lindau" / "lindau_000000_000019_gtFine_labelIds.png"
    data = build({"name": "cityscapes", "root": str(root)}, "val")
    grey(path, np.full((H, W), 34))
    with pytest.raises(LabelIdError, match=r"label id 34, expected 0\.\.33 or 255"):
        data.semantic_of(data.ids[0])
    grey(path, np.full((H, W), 255))  # licence plates
    assert np.all(data.semantic_of(data.ids[0]) == 255)
    (root / "leftImg8bit" / "val" / "lindau" / "lindau_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(MissingError, match="got no image for split 'val'"):
        _ = build({"name": "cityscapes", "root": str(root)}, "val").ids
    with pytest.raises(DataError, match="no file"):
        data.load(data.ids[0])


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_missing_folders_and_wrong_splits(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"dataset\.root: got .*data/README\.md.*set dataset\.root") as caught:
        _ = build({"name": name, "root": str(tmp_path / "absent")}, "train").ids
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="split: got 'minival', expected one of train, val, test"):
        build({"name": name, "root": "x"}, "minival")
    (write_ade20k if name == "ade20k" else write_cityscapes)(tmp_path)
    with pytest.raises(MissingError, match=r"dataset\.list_dir: no such list"):
        _ = build({"name": name, "root": str(tmp_path), "list_dir": "lists"}, "train").ids


def test_lists_cannot_leave_the_folder(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    (root / "train.txt").write_text("../validation/ADE_val_00000001\n")
    with pytest.raises(DataError, match=r"got image id '\.\./validation"):
        _ = Ade20kDataset(str(root), "train", list_dir=".").ids
