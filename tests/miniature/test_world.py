"""The miniature world: determinism, consistent masks, captions, and the data set on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from moduseg.datasets import build
from moduseg.errors import ArtefactError, ConfigError
from moduseg.masks.palette import voc_palette
from moduseg.miniature.world.drawing import STUFF
from moduseg.miniature.world.scenes import (
    CLASSES,
    DATASET_SEEDS,
    HUES,
    PRETRAIN_SEED,
    QUALITY_SEED,
    SHAPES,
    Scene,
    WorldConfig,
    describe,
    render_scene,
)
from moduseg.miniature.world.voc_writer import write_voc


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(3, "train", index) for index in range(150)]


def test_same_arguments_give_the_same_bytes() -> None:
    first = render_scene(1, "val", 7)
    render_scene(1, "val", 8)
    again = render_scene(1, 1, 7)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.instances.tobytes() == again.instances.tobytes()
    assert (first.instance_classes, first.stuff) == (again.instance_classes, again.stuff)


@pytest.mark.parametrize("other", [(2, "val", 7), (1, "train", 7), (1, "val", 8)])
def test_seed_split_and_index_all_matter(other: tuple[int, str, int]) -> None:
    assert render_scene(1, "val", 7).image.tobytes() != render_scene(*other).image.tobytes()


def test_types_shapes_and_longest_side(scenes: list[Scene]) -> None:
    for scene in scenes:
        h, w = scene.semantic.shape
        assert scene.image.shape == (h, w, 3)
        assert scene.instances.shape == scene.stuff_map.shape == (h, w)
        assert (scene.image.dtype, scene.semantic.dtype, scene.instances.dtype) == (np.uint8, np.uint8, np.uint16)
        assert max(h, w) == 128
        assert min(h, w) in (128, 112, 96)
    assert {scene.semantic.shape for scene in scenes} == {(128, 128), (112, 128), (128, 112), (96, 128), (128, 96)}


def test_semantic_is_the_class_of_the_instance(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert (scene.semantic == np.array([0, *scene.instance_classes])[scene.instances]).all()
        assert set(np.unique(scene.instances)) - {0} == set(range(1, len(scene.instance_classes) + 1))
        assert scene.labels == tuple(sorted(set(np.unique(scene.semantic).tolist()) - {0}))
        assert 1 <= len(scene.instance_classes) <= 5
        assert set(scene.stuff) <= set(STUFF)
        assert scene.stuff_map.max() < len(scene.stuff)


def test_all_classes_occur_and_neither_hue_nor_shape_decides(scenes: list[Scene]) -> None:
    assert {label for scene in scenes for label in scene.labels} == set(range(1, 13))
    pairs = [name.split() for name in CLASSES[1:]]
    assert len(CLASSES) == len(set(CLASSES)) == 13
    for hue in HUES:
        assert sum(pair[0] == hue for pair in pairs) == 2
    for shape in SHAPES:
        assert sum(pair[1] == shape for pair in pairs) == 2


def test_objects_touch_overlap_and_leave_the_picture(scenes: list[Scene]) -> None:
    cut = sum(
        bool(edge.any())
        for scene in scenes
        for edge in (scene.semantic[0], scene.semantic[-1], scene.semantic[:, 0], scene.semantic[:, -1])
    )
    touching = 0
    for scene in scenes:
        a, b = scene.instances[:, :-1].astype(int), scene.instances[:, 1:].astype(int)
        classes = np.array([0, *scene.instance_classes])
        touching += bool(((a != b) & (classes[a] == classes[b]) & (a > 0)).any())
    assert cut > 30
    assert touching > 10


@pytest.mark.parametrize("size", [64, 192])
def test_other_sizes(size: int) -> None:
    scene = render_scene(0, "train", 0, WorldConfig(size=size))
    assert max(scene.semantic.shape) == size


def measure_distance(instances: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel's centre from the nearest outline, in pixels, `[H, W]` float64."""
    ids = range(int(instances.max()) + 1)
    # An outline runs half a pixel before the centre of the first pixel beyond it.
    distances = [cv2.distanceTransform((instances == i).astype(np.uint8), cv2.DIST_L2, 5) - 0.5 for i in ids]
    return np.choose(instances, distances)


def test_outlines_are_mixed_by_the_stated_width() -> None:
    """Without lens and sensor every pixel beyond half of the width is that of the world with sharp outlines."""
    plain = WorldConfig(size=256, blur=0.0, noise=0.0)
    changed, distances = [], []
    for index in range(12):
        sharp = render_scene(7, "train", index, plain)
        mixed = render_scene(7, "train", index, replace(plain, mixing=8.0))
        changed.append((sharp.image != mixed.image).any(2).ravel())
        distances.append(measure_distance(sharp.instances).ravel())
    share = {
        d: np.concatenate(changed)[np.abs(np.concatenate(distances) - d) < 0.1].mean() for d in (1.5, 2.5, 3.5, 4.5)
    }
    # One pixel in two at the outline is the other side's, none at a distance of half the width.
    assert share[1.5] == pytest.approx(0.5 - 1.5 / 8, abs=0.04)
    assert share[2.5] == pytest.approx(0.5 - 2.5 / 8, abs=0.04)
    assert share[3.5] == pytest.approx(0.5 - 3.5 / 8, abs=0.04)
    assert not np.concatenate(changed)[np.concatenate(distances) > 4.5].any()


def test_mixing_changes_neither_truth_nor_what_else_is_drawn() -> None:
    for index in range(8):
        sharp, mixed = (render_scene(3, "val", index, WorldConfig(size=256, mixing=m)) for m in (0.0, 12.0))
        assert sharp.semantic.tobytes() == mixed.semantic.tobytes()
        assert sharp.instances.tobytes() == mixed.instances.tobytes()
        assert (sharp.instance_classes, sharp.stuff) == (mixed.instance_classes, mixed.stuff)
        # The lens blurs by up to 1.8 pixels, of which it sees four deviations.
        far = measure_distance(sharp.instances) > 6 + 4 * 1.8
        assert far.any()
        assert (sharp.image == mixed.image)[far].all()
        assert sharp.image.tobytes() != mixed.image.tobytes()


def test_a_mixed_world_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a world with sharp outlines do not name the width, so that older folders stay valid."""
    monkeypatch.chdir(tmp_path)
    settings = {"name": "miniature", "train": 1, "val": 1}
    sharp, mixed = build(settings, "train"), build({**settings, "mixing": 4.0}, "train")
    assert [len(sharp.ids), len(mixed.ids)] == [1, 1]
    worlds = {path.parent.name: json.loads(path.read_text())["config"] for path in tmp_path.rglob("world.json")}
    assert set(worlds) == {"world-0-1-1-128", "world-0-1-1-128-mixed-4"}
    assert "mixing" not in worlds["world-0-1-1-128"]
    assert worlds["world-0-1-1-128-mixed-4"]["mixing"] == 4.0


def test_caption_names_every_object_and_texture(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes[:50]:
        caption = scene.caption(rng)
        for label in scene.labels:
            assert CLASSES[label] in caption
        for name in scene.stuff:
            assert name in caption


def test_caption_counts_and_empty_scenes() -> None:
    rng = np.random.default_rng(0)
    words = {describe([12, 12], ["sand"], rng) for _ in range(40)}
    assert any("two magenta discs" in text for text in words)
    assert describe([], ["sand"], rng) == "a photo of sand"
    assert describe([], [], rng) == "a photo"


def test_seeds_of_data_sets_training_and_quality_are_disjoint() -> None:
    assert max(DATASET_SEEDS) < PRETRAIN_SEED < QUALITY_SEED
    assert QUALITY_SEED not in DATASET_SEEDS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": 16}, "size"),
        ({"aspects": ()}, "aspects"),
        ({"max_objects": 0}, "max_objects"),
        ({"radius": (0.3, 0.2)}, "radius"),
        ({"cluster": 2.0}, "cluster"),
        ({"blur": -1.0}, "blur"),
        ({"mixing": -1.0}, "mixing"),
    ],
)
def test_settings_out_of_range(arguments: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word}.*got.*expected"):
        WorldConfig(**arguments)


@pytest.mark.parametrize("arguments", [(-1, "train", 0), (0, "holdout", 0), (0, "train", -1), (0, -2, 0)])
def test_bad_scene_arguments(arguments: tuple) -> None:
    with pytest.raises(ConfigError, match="expected"):
        render_scene(*arguments)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_write_voc_layout(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "world", seed=5, train=4, val=2)
    listed = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    assert listed == [f"train_{i:05d}" for i in range(4)]
    assert (root / "classes.txt").read_text().split("\n")[:-1] == list(CLASSES)
    entries = json.loads((root / "image_labels.json").read_text())["images"]
    assert [entry["img_id"] for entry in entries] == [*listed, "val_00000", "val_00001"]
    for index, img_id in enumerate(listed):
        scene = render_scene(5, "train", index)
        with Image.open(root / "JPEGImages" / f"{img_id}.png") as picture:
            assert (np.asarray(picture) == scene.image).all()
        for folder, truth in (("SegmentationClass", scene.semantic), ("SegmentationObject", scene.instances)):
            with Image.open(root / folder / f"{img_id}.png") as picture:
                assert picture.mode == "P"
                assert (np.asarray(picture) == truth).all()
                palette = np.array(picture.getpalette()).reshape(-1, 3)
                assert (palette == voc_palette()[: len(palette)]).all()
        assert entries[index]["labels"] == list(scene.labels)


def test_write_voc_is_idempotent_and_completes_what_is_missing(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "world", seed=5, train=3, val=1)
    before = _contents(root)
    kept = root / "JPEGImages" / "train_00000.png"
    stamp = kept.stat().st_mtime_ns
    (root / "SegmentationClass" / "train_00001.png").unlink()
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    write_voc(root, seed=5, train=3, val=1)
    assert _contents(root) == before
    assert kept.stat().st_mtime_ns == stamp


def test_write_voc_refuses_a_folder_of_another_world(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "world", seed=5, train=1, val=1)
    with pytest.raises(ArtefactError, match=r"seed.*expected.*6.*another folder"):
        write_voc(root, seed=6, train=1, val=1)
    (root / "world.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"world\.json.*not JSON"):
        write_voc(root, seed=5, train=1, val=1)
    with pytest.raises(ConfigError, match="train"):
        write_voc(tmp_path / "other", seed=5, train=-1)
