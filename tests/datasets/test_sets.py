from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.config import compose, config_dir
from moduseg.datasets import DATASETS, Dataset, build
from moduseg.datasets.io import write_label_png
from moduseg.datasets.voc import VOC_CLASSES
from moduseg.errors import ConfigError, DataError, MissingError, ModusegError
from tests.conftest import external_folder

H, W = 8, 10


def _picture(path: Path, seed: int = 0, size: tuple[int, int] = (H, W)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def _labels(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_label_png(array))


def _mask(*values: int) -> np.ndarray:
    mask = np.zeros((H, W), dtype=np.uint8)
    for i, value in enumerate(values):
        mask[i + 1] = value
    return mask


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three training images and one for validation, in VOC layout."""
    for i, id in enumerate(("a_1", "a_2", "a_3", "b_1")):
        _picture(tmp_path / "JPEGImages" / f"{id}.jpg", i)
        _labels(tmp_path / "SegmentationClass" / f"{id}.png", _mask(3 + i, 12, 255))
        _labels(tmp_path / "SegmentationObject" / f"{id}.png", _mask(1, 2, 255))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a_1\na_2\na_3\n\n")
    (lists / "val.txt").write_text("b_1\n")
    (lists / "mini.txt").write_text("/JPEGImages/a_2.jpg /SegmentationClassAug/a_2.png\n")
    return tmp_path


def _voc(root: Path, split: str = "mini", **arguments: object) -> Dataset:
    return build({"name": "voc", "root": str(root), "train_split": "train", "val_split": "val", **arguments}, split)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nested images of several kinds, labels by name for two of three."""
    for i, name in enumerate(("park/dog 1.jpg", "park/deep/x.y.PNG", "top.webp")):
        _picture(tmp_path / "images" / name, i)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / ".hidden.jpg").write_text("")
    (tmp_path / "labels.csv").write_text("image,labels\npark/dog 1.jpg,dog; big sofa\ntop,cat\ntop.webp,dog\n")
    return tmp_path


def _folder(root: Path, split: str) -> Dataset:
    return build({"name": "folder", "root": str(root), "train_split": "train", "val_split": "val"}, split)


# VOC ------------------------------------------------------------------------------------------------------------------


def test_voc_layout(voc: Path) -> None:
    data = _voc(voc, classes_file=None)
    assert data.ids == ("a_2",)
    assert data.classes == VOC_CLASSES
    assert (data.num_classes, data.label_source, data.has_truth, len(data)) == (20, "masks", True, 1)
    assert data.image_size("a_2") == (H, W)
    sample = data.load("a_2", truth=True)
    assert sample.labels == (4, 12)
    np.testing.assert_array_equal(sample.semantic, _mask(4, 12, 255))
    np.testing.assert_array_equal(sample.instances, _mask(1, 2, 0))


def test_truth_is_given_only_where_asked_for(voc: Path) -> None:
    sample = _voc(voc).load("a_2")
    assert (sample.semantic, sample.instances, sample.labels) == (None, None, (4, 12))
    assert _voc(voc).load("a_2", labels=False).labels is None


@pytest.mark.parametrize(
    ("split", "published"), [("train", 1464), ("train_aug", 10582), ("val", 1449), ("trainval", 2913), ("test", 1456)]
)
def test_sizes_of_published_splits_are_checked(
    voc: Path, split: str, published: int, caplog: pytest.LogCaptureFixture
) -> None:
    (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a_1\na_2\n")
    assert _voc(voc, split).ids == ("a_1", "a_2")
    assert f"got 2 images, the published split '{split}' of voc has {published}" in caplog.text


def test_lists_that_nobody_published_are_used_in_silence(voc: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(_voc(voc, "mini")) == 1
    (voc / "c.txt").write_text("background\ncat\n")
    assert len(_voc(voc, "train", classes_file="c.txt")) == 3
    assert caplog.text == ""


def test_the_augmented_list_has_two_names(voc: Path) -> None:
    line = "/JPEGImages/a_3.jpg /SegmentationClassAug/a_3.png\n"
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(line)
    assert _voc(voc, "train_aug").ids == _voc(voc, "trainaug").ids == ("a_3",)
    assert _voc(voc, "train_aug").published_size == 10582


def test_voc_test_has_no_truth(voc: Path) -> None:
    """The folder of masks is there for the other splits."""
    _picture(voc / "JPEGImages" / "t_1.jpg")
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("t_1\n")
    data = _voc(voc, "test")
    assert (data.has_truth, data.label_source, data.labels_of("t_1")) == (False, "none", None)


def test_label_file_wins_over_masks(voc: Path) -> None:
    entries = [{"img_id": "a_2", "labels": [20, 1, 1]}]
    (voc / "image_labels.json").write_text(json.dumps({"images": entries}))
    data = _voc(voc)
    assert data.label_source == "json"
    assert data.load("a_2", truth=True).labels == (1, 20)


def test_images_without_entry_have_no_labels(voc: Path) -> None:
    (voc / "image_labels.json").write_text("{}")
    assert _voc(voc).load("a_2").labels is None


@pytest.mark.parametrize("label", [21, -1, 255])
def test_label_out_of_range_names_image_and_classes(voc: Path, label: int) -> None:
    (voc / "image_labels.json").write_text(json.dumps({"a_2": [label]}))
    with pytest.raises(DataError, match=rf"'a_2' has label {label}, expected ids 1\.\.20"):
        _voc(voc).load("a_2")


def test_mask_with_unknown_id(voc: Path) -> None:
    _labels(voc / "SegmentationClass" / "a_2.png", _mask(21))
    data = _voc(voc)
    with pytest.raises(DataError, match=r"'a_2' has label id 21, expected 0\.\.20 or 255"):
        data.load("a_2", truth=True)
    assert data.load("a_2", labels=False).image.shape == (H, W, 3)


@pytest.mark.parametrize("where", ["SegmentationClass", "SegmentationObject"])
def test_truth_of_another_size(voc: Path, where: str) -> None:
    _labels(voc / where / "a_2.png", np.zeros((H, W + 1), dtype=np.uint8))
    with pytest.raises(DataError, match=rf"'a_2'.*has {W + 1} x {H} pixels, expected the image's {W} x {H}"):
        _voc(voc).load("a_2", truth=True)


def test_data_sets_without_truth(voc: Path) -> None:
    shutil.rmtree(voc / "SegmentationClass")
    shutil.rmtree(voc / "SegmentationObject")
    data = _voc(voc)
    sample = data.load("a_2", truth=True)
    assert (data.has_truth, data.label_source, sample.labels, sample.semantic) == (False, "none", None, None)


def test_missing_image_names_what_was_tried(voc: Path) -> None:
    (voc / "JPEGImages" / "a_2.jpg").unlink()
    with pytest.raises(DataError, match=r"'a_2'.*\.jpg, \.png"):
        _voc(voc).load("a_2")


def test_ids_of_other_splits_are_refused(voc: Path) -> None:
    for use in (Dataset.load, Dataset.image_size, Dataset.labels_of):
        with pytest.raises(DataError, match="not in split 'mini'"):
            use(_voc(voc), "../outside")


def test_lists_with_escaping_or_repeated_ids(voc: Path) -> None:
    for content, words in (("../../secret\n", "'../../secret'"), ("a_1\na_1\n", "'a_1' twice")):
        (voc / "ImageSets" / "Segmentation" / "mini.txt").write_text(content)
        with pytest.raises(DataError, match=words):
            _ = _voc(voc).ids


def test_missing_pieces_name_key_and_remedy(voc: Path, tmp_path: Path) -> None:
    cases = [
        (_voc(tmp_path / "absent"), r"dataset\.root: got '.*absent'.*JPEGImages/.*set dataset\.root"),
        (_voc(voc, image_dir="Images"), r"dataset\.image_dir: got .*Images"),
        (_voc(voc, "trian"), r"got 'trian'.*expected one of: empty, mini, train, val"),
    ]
    (voc / "ImageSets" / "Segmentation" / "empty.txt").write_text("\n")
    cases.append((_voc(voc, "empty"), "got no image for split 'empty'"))
    for data, words in cases:
        with pytest.raises(MissingError, match=words) as caught:
            _ = data.ids
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingError, match=r"dataset\.classes_file: got 'c\.txt'"):
        _ = _voc(voc, classes_file="c.txt").classes


def test_making_a_data_set_reads_nothing(tmp_path: Path) -> None:
    assert _voc(tmp_path / "absent").name == "voc"


# Fingerprint ----------------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_on_another_machine(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(voc, other)
    for path in other.rglob("*.jpg"):
        path.touch()
    assert _voc(voc).fingerprint() == _voc(other).fingerprint()


@pytest.mark.parametrize("change", ["mask", "labels", "ids", "classes"])
def test_fingerprint_sees_what_changes_results(voc: Path, change: str) -> None:
    (voc / "image_labels.json").write_text('{"a_2": [4]}')
    before = _voc(voc).fingerprint()
    arguments: dict[str, object] = {}
    if change == "mask":
        _labels(voc / "SegmentationClass" / "a_2.png", np.random.default_rng(0).integers(0, 9, (H, W)))
    elif change == "labels":
        (voc / "image_labels.json").write_text('{"a_2": [5]}')
    elif change == "ids":
        (voc / "ImageSets" / "Segmentation" / "mini.txt").write_text("a_3\n")
    else:
        (voc / "c.txt").write_text("\n".join(("background", *VOC_CLASSES[:0:-1])))
        arguments["classes_file"] = "c.txt"
    assert _voc(voc, **arguments).fingerprint() != before


# Folder ---------------------------------------------------------------------------------------------------------------


def test_folder_with_nested_names(folder: Path) -> None:
    train, val = _folder(folder, "train"), _folder(folder, "val")
    assert train.ids == ("park/dog 1", "top")
    assert val.ids == ("park/deep/x.y", "park/dog 1", "top")
    assert train.classes == ("background", "big sofa", "cat", "dog")
    assert (train.label_source, train.has_truth) == ("csv", False)
    assert train.load("park/dog 1").labels == (1, 3)
    assert train.load("top").labels == (2, 3)  # two rows of one image are joined
    assert val.load("park/deep/x.y", truth=True).labels is None


def test_folder_lists_and_what_they_leave(folder: Path) -> None:
    (folder / "val.txt").write_text("images/top.webp\npark/deep/x.y\n")
    assert _folder(folder, "val").ids == ("top", "park/deep/x.y")
    assert _folder(folder, "train").ids == ("park/dog 1",)
    (folder / "extra.txt").write_text("top\n")
    assert _folder(folder, "extra").ids == ("top",)


def test_folder_labels_from_masks(folder: Path) -> None:
    (folder / "labels.csv").unlink()
    (folder / "classes.txt").write_text("background\r\ncat\r\ndog\r\n")
    _labels(folder / "masks" / "park" / "deep" / "x.y.png", _mask(2, 255))
    data = _folder(folder, "train")
    assert (data.ids, data.label_source, data.has_truth) == (("park/deep/x.y",), "masks", True)
    assert data.load("park/deep/x.y").labels == (2,)


def test_folder_json_forms_agree(folder: Path) -> None:
    (folder / "labels.csv").unlink()
    (folder / "classes.txt").write_text("background\ncat\ndog\n")
    for content in (
        {"top": ["dog", 1], "park/dog 1.jpg": []},
        {"images": [{"img_id": "top", "labels": [2, "cat"]}, {"file_name": "park/dog 1.jpg", "labels": []}]},
    ):
        (folder / "labels.json").write_text(json.dumps(content))
        data = _folder(folder, "train")
        assert data.label_source == "json"
        assert [data.load(id).labels for id in data.ids] == [(), (1, 2)]


def test_folder_errors(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(MissingError, match=r"dataset\.root: got .*images.*data/README\.md"):
        _ = _folder(empty, "val").ids
    with pytest.raises(MissingError, match="got 'other', no such list"):
        _ = _folder(folder, "other").ids
    (folder / "val.txt").write_text("park/dog 1\ngone\n")
    with pytest.raises(DataError, match="'gone': no file"):
        _folder(folder, "val").load("gone")
    _picture(folder / "images" / "top.png")
    with pytest.raises(DataError, match="got image id 'top' twice"):
        _ = _folder(folder, "train").ids
    (folder / "labels.csv").unlink()
    (folder / "images" / "top.png").unlink()
    with pytest.raises(MissingError, match="without image-level labels"):
        _ = _folder(folder, "train").ids
    with pytest.raises(MissingError, match=r"without classes\.txt"):
        _ = _folder(folder, "val").classes


# Configurations, miniature, coco150 -----------------------------------------------------------------------------------


SHIPPED = sorted(path.stem for path in (config_dir() / "dataset").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_build(name: str) -> None:
    # Composed with the rest, because a root may be given in terms of `runtime.outputs`.
    cfg = compose([f"dataset={name}"]).dataset
    for split in (cfg["train_split"], cfg["val_split"]):
        data = build(cfg, split)
        kind = {"voc_aug": "voc", "context": "context60", "miniature_large": "miniature"}.get(name, name)
        assert (data.name, data.split) == (kind, split)


def test_every_data_set_has_a_configuration() -> None:
    assert {compose([f"dataset={name}"]).dataset["name"] for name in SHIPPED} == set(DATASETS)


@pytest.mark.parametrize(
    ("cfg", "split", "words"),
    [
        (
            {"name": "vocc"},
            "val",
            "dataset.name: got 'vocc', expected one of ade20k, cityscapes, cityscapes27, coco, coco150",
        ),
        ({"name": "voc"}, "val", "dataset.root: missing"),
        ({"name": "voc", "root": "x", "maskdir": "y"}, "val", "did you mean dataset.mask_dir"),
        ({"name": "voc", "root": 3}, "val", "dataset.root: got 3"),
        ({"name": "voc", "root": "x", "suffixes": ["jpg"]}, "val", "suffixes: got"),
        ({"name": "miniature"}, "test", "split: got 'test'"),
        ({"name": "miniature", "train": -1}, "val", "seed, train, val"),
        ({"name": "miniature", "size": 8}, "val", "size: got 8"),
        ({"name": "coco150", "root": "x"}, "val", "split: got 'val', expected one of train2017"),
        ({"name": "coco150", "root": "x", "fold": 5}, "val2017", "fold, folds: got 5, 5"),
    ],
)
def test_wrong_configurations_end_in_one_line(cfg: dict, split: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(cfg, split)


def test_miniature_is_drawn_on_demand(tmp_path: Path) -> None:
    cfg = {"name": "miniature", "root": str(tmp_path / "w"), "train": 3, "val": 2, "size": 64, "seed": 5}
    data = build({**cfg, "train_split": "train", "val_split": "val"}, "val")
    assert not (tmp_path / "w").exists()
    assert (data.label_source, len(data), data.num_classes, data.has_truth) == ("json", 2, 12, True)
    for id in data.ids:
        sample = data.load(id, truth=True)
        assert sample.semantic is not None
        assert sample.instances is not None
        assert sample.labels == tuple(int(v) for v in np.unique(sample.semantic) if v)
        np.testing.assert_array_equal(sample.instances > 0, sample.semantic > 0)
    assert len(build(cfg, "train")) == 3
    with pytest.raises(ModusegError, match="another"):
        _ = build({**cfg, "seed": 6}, "val").ids


def test_miniature_writes_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(build({"name": "miniature", "train": 1, "val": 1, "size": 64, "seed": 7}, "train")) == 1
    assert (tmp_path / "outputs" / "miniature" / "world-7-1-1-64" / "classes.txt").is_file()


def test_coco150_photographs() -> None:
    root = str(external_folder("MODUSEG_COCO150"))
    train = build({"name": "coco150", "root": root}, "train2017")
    val = build({"name": "coco150", "root": root}, "val2017")
    assert (len(train), len(val), train.num_classes, train.label_source) == (100, 50, 80, "json")
    assert len({label for id in train.ids for label in train.labels_of(id) or ()}) == 69
    for data in (train, val):
        for id in data.ids[:5]:
            sample = data.load(id, truth=True)
            assert sample.semantic is not None
            assert sample.labels == tuple(int(v) for v in np.unique(sample.semantic) if 0 < v < 255)
            assert data.image_size(id) == sample.size


def test_coco150_folds_split_the_training_images() -> None:
    root = str(external_folder("MODUSEG_COCO150"))
    everything = build({"name": "coco150", "root": root}, "train2017").ids
    held_out: list[str] = []
    for fold in range(3):
        cfg = {"name": "coco150", "root": root, "fold": fold, "folds": 3}
        train, val = build(cfg, "train2017"), build(cfg, "val2017")
        assert sorted(train.ids + val.ids) == sorted(everything)
        assert train.split != val.split
        assert val.load(val.ids[0], truth=True).semantic is not None
        held_out += val.ids
    assert sorted(held_out) == sorted(everything)


def test_truth_without_its_photograph(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(b"not a picture")
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.txt").write_text("background\ndog\n")
    data = _folder(tmp_path, "val")
    assert not data.has_truth  # a folder of masks, none of them of this split
    assert data.has_background
    labels = np.array([[0, 1, 255]], dtype=np.uint8)
    (tmp_path / "masks" / "b.png").write_bytes(write_label_png(labels))
    (tmp_path / "masks" / "c.png").write_bytes(write_label_png(labels + np.uint8(1)))
    assert data.has_truth
    assert data.semantic_of("a") is None
    np.testing.assert_array_equal(data.semantic_of("b"), labels)
    with pytest.raises(DataError, match=r"c\.png: image 'c' has label id 2, expected 0\.\.1 or 255"):
        data.semantic_of("c")
    with pytest.raises(DataError, match="image 'd': not in split"):
        data.semantic_of("d")
