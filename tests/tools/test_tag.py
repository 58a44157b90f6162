"""A folder without tags, from words to a bank."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.config.command_keys import TagOptions
from moduseg.datasets.labels import read_label_file
from moduseg.errors import ConfigError, MissingError
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.segment import Segment
from moduseg.stages.tag import TagImages
from moduseg.tools import tag
from tests.backbones.test_clip import tiny_config
from tests.conftest import external_folder
from tests.support.runs import overrides

STARS = "red star;yellow star;background: grass, sand, water"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/` and nothing else: three scenes of the embedded world."""
    outputs = tmp_path_factory.mktemp("photographs")
    dataset = Workspace(compose(overrides(outputs, train=3))).dataset("train")
    (outputs / "mine" / "images").mkdir(parents=True)
    for image_id in dataset.ids:
        shutil.copy(dataset.image_path(image_id), outputs / "mine" / "images")
    return outputs / "mine"


@pytest.fixture
def root(photographs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photographs, tmp_path / "mine")


def test_a_bank_from_untagged_images(root: Path, tmp_path: Path) -> None:
    outputs = f"runtime.outputs={tmp_path / 'out'}"
    assert tag.main(TagOptions(str(root), STARS), [outputs, "runtime.device=cpu"]) == 0
    entries = read_label_file(root / "labels.csv").entries
    assert sorted(entries) == [f"train_{i:05d}" for i in range(3)]
    assert all(set(names) <= {"red star", "yellow star"} and names for names in entries.values())
    (root / "classes.txt").write_text("background\nred star\nyellow star\n")
    arguments = ["dataset=folder", f"dataset.root={root}", outputs, "proposer=superpixels", "runtime.device=cpu"]
    bank = json.loads((BuildBank.run(compose(arguments)) / "bank.json").read_text())
    assert bank["classes"] == ["background", "red star", "yellow star"]


def test_photographs_are_tagged_by_a_random_model(words: tuple[Path, int, int], tmp_path: Path) -> None:
    """TagCLIP's whole way on twelve photographs, of patches of 16 pixels; the tags of random weights mean nothing."""
    photographs = sorted((external_folder("MODUSEG_COCO150") / "images" / "val2017").glob("*.jpg"))[:12]
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for photograph in photographs:
        shutil.copy(photograph, tmp_path / "mine" / "images")
    config = tiny_config(words[1], words[2])
    config["vision_config"] |= {"image_size": 224, "patch_size": 16}
    arguments = ["dataset=folder", f"dataset.root={tmp_path / 'mine'}", f"runtime.outputs={tmp_path / 'out'}"]
    cfg = compose([*arguments, "runtime.device=cpu", "tagger=tagclip_coco", "vocabulary=a dog;grass;background: sky"])
    assert cfg.tagger is not None
    tagger = {**cfg.tagger, "weights": "random", "activation": None, "templates": "single", "config": config}
    folder = TagImages.run(dataclasses.replace(cfg, tagger={**tagger, "tokenizer": str(words[0])}))
    entries = read_label_file(folder / "tags.csv").entries
    assert sorted(entries) == [photograph.stem for photograph in photographs]
    assert all(names and set(names) <= {"a dog", "grass"} for names in entries.values())


@pytest.mark.parametrize("inside", [True, False], ids=["images named", "root named"])
def test_either_folder_may_be_named(inside: bool, root: Path) -> None:
    named = root / "images" if inside else root
    assert tag.find_root(named) == (root, root / "images")


def test_a_plain_folder_gets_its_labels_inside(root: Path) -> None:
    plain = (root / "images").rename(root / "pictures")
    assert tag.find_root(plain) == (plain, plain)


def test_labels_that_exist_stay(root: Path) -> None:
    (root / "labels.csv").write_text("image,labels\n")
    with pytest.raises(ConfigError, match=r"^out: got .*labels\.csv', which exists; remove it"):
        tag.main(TagOptions(str(root), STARS), [])
    assert (root / "labels.csv").read_text() == "image,labels\n"


def test_mistakes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^vocabulary: got none, expected words"):
        tag.main(TagOptions(str(root)), [f"runtime.outputs={tmp_path / 'out'}"])
    with pytest.raises(MissingError, match=r"^images: got 'absent', no such folder"):
        tag.main(TagOptions("absent", STARS), [])


def test_tags_of_a_data_set_are_compared_with_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And `segment` takes the tags that are there."""
    arguments = overrides(tmp_path, "pseudo_masks=clip_dense", "tagger.keep=0.3", "evaluation.panels=0")
    with caplog.at_level(logging.INFO, "moduseg"):
        folder = tag.main(TagOptions(), arguments)
    assert isinstance(folder, Path)
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["num_images"] == 4
    assert 0 < quality["recall"] <= 100
    assert f"recall {quality['recall']:.1f}" in caplog.text
    segmented = Segment.run(compose(["tagger=tagclip", *arguments]))
    manifest = json.loads((segmented / "manifest.json").read_text())
    assert manifest["inputs"]["tags"] == str(folder)
    assert json.loads((segmented / "results.json").read_text())["label_source"] == "tagger tagclip"
