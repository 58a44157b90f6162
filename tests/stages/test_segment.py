"""Labels from words: which classes compete, what counts as the same run, resume, shards, reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moduseg import Vocabulary
from moduseg.config import compose
from moduseg.errors import ConfigError, DataError, IncompleteError
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import Workspace
from moduseg.pseudo_masks.labels import make_label_map, region_vote
from moduseg.report.finished_run import open_run, read_run_config
from moduseg.stages.segment import Segment
from tests.backbones.test_clip import tiny_config
from tests.conftest import external_folder
from tests.stages.test_shards import shard
from tests.support.runs import overrides, read_labels, result_bytes

CLIP = ("pseudo_masks=clip_dense", "evaluation.panels=1", "evaluation.bootstrap=0")


@pytest.fixture(scope="module")
def segmented(world: Path) -> Path:
    """The folder of a run in which all classes compete."""
    return Segment.run(compose(overrides(world, *CLIP)))


def test_all_classes_compete_by_default(segmented: Path, world: Path) -> None:
    """Label maps are those of generator, rule and vote by themselves."""
    work = Workspace(compose(overrides(world, *CLIP)))
    for image_id, labels in read_labels(segmented).items():
        sample = work.dataset("val").load(image_id, truth=True)
        scores = work.generator.generate(sample, tuple(range(1, 13)), None)
        expected = region_vote(make_label_map(scores, "given"), work.proposer.propose(sample))
        assert np.array_equal(labels, expected.numpy())
    results = json.loads((segmented / "results.json").read_text())
    assert (results["images"], results["label_source"]) == (4, "none, all words compete")
    assert len(list((segmented / "panels").iterdir())) == 1


def test_a_tagger_limits_the_classes(segmented: Path, world: Path, tmp_path: Path) -> None:
    dataset = Workspace(compose(overrides(world, *CLIP))).dataset("val")
    given = read_labels(Segment.run(compose(overrides(world, *CLIP, "tagger=given"))))
    assert all(set(np.unique(labels)) <= {0, *(dataset.labels_of(i) or ())} for i, labels in given.items())
    assert any(set(np.unique(labels)) - {0, *dataset.labels_of(i)} for i, labels in read_labels(segmented).items())  # type: ignore[misc]
    # The same tags from a file give the same maps under another key.
    rows = "".join(f"{i},{';'.join(dataset.classes[c] for c in dataset.labels_of(i) or ())}\n" for i in dataset.ids)
    (tmp_path / "tags.csv").write_text(f"image,labels\n{rows}")
    from_file = Segment.run(compose(overrides(world, *CLIP, "tagger=file", f"tagger.path={tmp_path / 'tags.csv'}")))
    assert result_bytes(from_file.parent)[f"{from_file.name}/labels/val_00000.png"]
    assert all(np.array_equal(labels, given[i]) for i, labels in read_labels(from_file).items())


def test_words_replace_the_classes(world: Path) -> None:
    """Words that are shuffled classes are scored; others are not, and every pixel is one of them."""
    names = Workspace(compose(overrides(world))).dataset("val").classes[:0:-1]
    stuff = "background: grass, sand, water, wood"
    shuffled = Segment.run(compose([*overrides(world, *CLIP), f"vocabulary=[{','.join(names)}]"]))
    assert json.loads((shuffled / "results.json").read_text())["miou"] > 0
    folder = Segment.run(compose([*overrides(world, *CLIP, "evaluation.report=true"), "vocabulary=a disc;a star"]))
    assert not (folder / "results.json").exists()
    assert {int(i) for labels in read_labels(folder).values() for i in np.unique(labels)} <= {1, 2}
    run = open_run(folder, Workspace(read_run_config(folder)))
    assert (run.dataset.classes, run.what) == (("background", "a disc", "a star"), "prediction")
    assert (folder / "report" / "index.html").is_file()
    with_background = Segment.run(compose([*overrides(world, *CLIP), f"vocabulary={stuff};a disc;a star"]))
    assert 0 in {int(i) for labels in read_labels(with_background).values() for i in np.unique(labels)}


def test_from_python(world: Path, segmented: Path) -> None:
    dataset = Workspace(compose(overrides(world))).dataset("val")
    words = [*dataset.classes[1:], "background: grass, sand, water"]
    arguments = ["proposer=superpixels", "pseudo_masks=clip_dense", "pseudo_masks.refine=region_vote"]
    vocabulary = Vocabulary(words, arguments, device="cpu")
    prediction = vocabulary.segment(dataset.image_path("val_00000"))
    image = dataset.load("val_00000").image
    assert np.array_equal(vocabulary.segment(image).label_map, prediction.label_map)
    assert prediction.class_ids == tuple(range(1, 13))
    assert prediction.label_map.shape == image.shape[:2]
    assert 0 < len(np.unique(prediction.label_map)) < 14
    with pytest.raises(ConfigError, match=r"generator\.name: got 'cam', which compares no words"):
        Vocabulary(words, ["pseudo_masks=cam"], device="cpu")
    with pytest.raises(ConfigError, match=r"^vocabulary: got no word"):
        Vocabulary([])


def test_shards_give_the_same_bytes(segmented: Path, world: Path, tmp_path: Path) -> None:
    arguments = overrides(tmp_path, *CLIP, world=world)
    for _ in range(3):
        for index in (0, 1):
            try:
                Segment.run(compose([*arguments, *shard(index, 2)]))
            except IncompleteError:
                continue
    expected = {k: v for k, v in result_bytes(world).items() if f"/{segmented.name}/" in k}
    assert expected
    assert {k: v for k, v in result_bytes(tmp_path).items() if f"/{segmented.name}/" in k} == expected


def test_a_broken_image_costs_itself_and_is_tried_again(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "world-6-4", tmp_path / "world-6-4")
    arguments = overrides(tmp_path, *CLIP, "pseudo_masks.refine=none")
    image = tmp_path / "world-6-4" / "JPEGImages" / "val_00001.png"
    content = image.read_bytes()
    image.write_bytes(content[:99])
    folder = Segment.run(compose(arguments))
    assert count_failures(folder) == 1
    image.write_bytes(content)
    assert Segment.run(compose(arguments)) == folder
    assert (count_failures(folder), len(read_labels(folder))) == (0, 4)


def test_a_fitted_generator_uses_training_images(world: Path) -> None:
    folder = Segment.run(compose(overrides(world, "pseudo_masks=cam", *CLIP[1:], "tagger=given")))
    assert folder.name.startswith("cam-given-val-")
    assert len(read_labels(folder)) == 4


def test_no_training_images_are_needed(world: Path, tmp_path: Path) -> None:
    """A folder with images and nothing else."""
    (tmp_path / "mine" / "images").mkdir(parents=True)
    shutil.copy(world / "world-6-4" / "JPEGImages" / "val_00000.png", tmp_path / "mine" / "images" / "a.png")
    arguments = ["dataset=folder", f"dataset.root={tmp_path / 'mine'}", f"runtime.outputs={tmp_path / 'out'}"]
    arguments += ["pseudo_masks.refine=none", "runtime.device=cpu", "vocabulary=red disc;yellow star"]
    folder = Segment.run(compose(arguments))
    assert list(read_labels(folder)) == ["a"]
    assert (folder / "report" / "index.html").is_file()


def test_images_without_tags_fail_by_name(world: Path, tmp_path: Path) -> None:
    cfg = compose([*overrides(world, *CLIP, "tagger=given"), "vocabulary=a disc;a star"])
    stage = Segment(Workspace(cfg))
    with pytest.raises(DataError, match="val_00000: no image-level labels, which tagger=given needs"):
        stage.load("val_00000")


def test_results_name_the_refinement(segmented: Path) -> None:
    assert json.loads((segmented / "results.json").read_text())["refinement"].startswith("region_vote (no CRF")


def test_photographs_by_a_random_model(words: tuple[Path, int, int], tmp_path: Path) -> None:
    """Twelve photographs from words, end to end; the quality of random weights means nothing."""
    photographs = sorted((external_folder("MODUSEG_COCO150") / "images" / "val2017").glob("*.jpg"))[:12]
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for photograph in photographs:
        shutil.copy(photograph, tmp_path / "mine" / "images")
    config = {**tiny_config(words[1], words[2])}
    config["vision_config"] |= {"image_size": 224, "patch_size": 16}
    generator = "pseudo_masks.generator"
    arguments = [
        *("dataset=folder", f"dataset.root={tmp_path / 'mine'}", f"runtime.outputs={tmp_path / 'out'}"),
        *("runtime.device=cpu", "pseudo_masks=sclip", f"{generator}.weights=random", f"{generator}.activation=null"),
        *(f"{generator}.templates=single", "evaluation.report=false"),
        *("vocabulary=a dog;grass;background: sky, wall", "pseudo_masks.background.value=0.4"),
    ]
    cfg = compose(arguments)
    model = {**cfg.pseudo_masks.generator, "config": config, "tokenizer": str(words[0])}
    settings = dataclasses.replace(cfg.pseudo_masks, generator=model)
    folder = Segment.run(dataclasses.replace(cfg, pseudo_masks=settings))
    labels = read_labels(folder)
    assert list(labels) == [photograph.stem for photograph in photographs]
    assert all(set(np.unique(array)) <= {0, 1, 2} for array in labels.values())
