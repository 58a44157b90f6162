"""COCO-Stuff-27 and Cityscapes-27: ids to the pixel, the pictures of both protocols, and runs from raw files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg import datasets
from moduseg.config import compose
from moduseg.datasets.pictures import cut_picture, plan_square
from moduseg.errors import LabelIdError, MissingError
from moduseg.stages.discover import Discover
from moduseg.tools import check_data, prepare_data
from tests.support.skeletons import H, W, grey, write_cityscapes, write_coco_stuff, write_coco_stuff27

Write = Callable[[Path], Path]
SETS = [
    pytest.param("cityscapes27", write_cityscapes, id="cityscapes27"),
    pytest.param("coco_stuff27", write_coco_stuff27, id="coco_stuff27"),
]
ROWS = {
    # Stored 23, 7, 33 and 29 less 7, counted from 1; 0 is ignored.
    "cityscapes27": [17] * 10 + [1] * 10 + [27] * 10 + [23] * 10 + [255] * 8,
    # Person, indoor (89), textile (91), solid (181) and outdoor (11, an id that no category has).
    "coco_stuff27": [10] * 8 + [5] * 8 + [18] * 8 + [25] * 8 + [9] * 8 + [255] * 8,
}
"""The first column of the drawn label maps, by data set."""


def open_set(name: str, root: Path, *more: str) -> datasets.Dataset:
    return datasets.build(compose([f"dataset={name}", f"dataset.root={root}", *more]).dataset, "val")


@pytest.mark.parametrize(("name", "write"), SETS)
def test_ids_to_the_pixel(name: str, write: Write, tmp_path: Path) -> None:
    dataset = open_set(name, write(tmp_path))
    (image_id,) = dataset.ids
    truth = dataset.semantic_of(image_id)
    assert truth is not None
    assert (truth == np.array(ROWS[name])[:, None]).all()
    assert (dataset.num_classes, len(dataset.classes), dataset.has_background) == (27, 28, False)


@pytest.mark.parametrize(("size", "protocol", "expected", "first"), [
    pytest.param((48, 64), "diffseg", (512, 512), (0, 8), id="the middle square, enlarged"),
    pytest.param((1024, 2048), "diffseg", (512, 512), (0, 512), id="the middle square, reduced"),
    pytest.param((48, 64), "picie", (320, 320), (0, 8), id="the shorter side to 320"),
    pytest.param((640, 427), "picie", (320, 320), (106, 0), id="upright"),
])  # fmt: skip
def test_pictures_are_the_protocols(
    size: tuple[int, int], protocol: str, expected: tuple[int, int], first: tuple[int, int]
) -> None:
    """An image of its own coordinates shows where the top left pixel of the picture comes from."""
    rows, columns = np.indices(size)
    square = plan_square(size, protocol)  # type: ignore[arg-type]
    pictures = [cut_picture(a.astype(np.int32), square, is_label_map=True) for a in (rows, columns)]
    assert {p.shape for p in pictures} == {square.size} == {expected}
    assert [abs(int(p[0, 0]) - at) <= 1 for p, at in zip(pictures, first, strict=True)] == [True, True]
    # Nearest neighbours: no value is mixed, and both axes are stretched alike.
    spans = [int(p[-1, -1]) - int(p[0, 0]) for p in pictures]
    assert abs(spans[0] - spans[1]) <= 2


def test_images_are_smooth_and_labels_are_not(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 255
    for protocol, is_smooth in (("diffseg", True), ("picie", False)):
        square = plan_square((40, 60), protocol)  # type: ignore[arg-type]
        mixed = set(np.unique(cut_picture(image, square, is_label_map=False))) - {0, 255}
        assert bool(mixed) == is_smooth
        assert set(np.unique(cut_picture(image[..., 0], square, is_label_map=True))) == {0, 255}


@pytest.mark.parametrize("pictures", ["whole", "diffseg", "picie"])
@pytest.mark.parametrize(("name", "write"), SETS)
def test_from_raw_files_to_scores(name: str, write: Write, pictures: str, tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    arguments = [f"dataset={name}", f"dataset.root={root}", f"dataset.picture={pictures}", "backbone=miniature_random"]
    arguments += [f"runtime.outputs={tmp_path / 'out'}", "runtime.device=cpu", "evaluation.panels=1"]
    cfg = compose([*arguments, "discoverer.num_clusters=3", "discoverer=kmeans"])
    assert prepare_data.run(cfg) == {}
    assert not check_data.run(cfg).is_broken
    dataset = open_set(name, root, f"dataset.picture={pictures}")
    side = {"whole": (H, W), "diffseg": (512, 512), "picie": (320, 320)}[pictures]
    sample = dataset.load(dataset.ids[0], truth=True)
    assert sample.semantic is not None
    assert (sample.size, sample.semantic.shape, dataset.image_size(sample.id)) == (side, side, side)
    record = json.loads((Discover.run(cfg) / "results.json").read_text())
    assert (record["images"], record["picture"], record["clusters"]) == (1, pictures, 27)
    assert 0 < record["matched_by_image"]["miou_matched_by_image"] < 100
    # One image: the set is the image, and its three segments are three clusters.
    figures = [list(record[f"matched_by_{protocol}"]["iou"].values()) for protocol in ("image", "set")]
    assert figures[0] == figures[1]


def test_pictures_are_part_of_what_is_evaluated(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    prints = [
        open_set("cityscapes27", root, f"dataset.picture={p}").fingerprint() for p in ("whole", "diffseg", "picie")
    ]
    assert len(set(prints)) == 3
    assert open_set("cityscapes", root).fingerprint() not in prints


def test_broken_files_are_named(tmp_path: Path) -> None:
    root = write_coco_stuff(tmp_path / "coco")
    with pytest.raises(MissingError, match=r"dataset\.list_dir: no such list .*curated.val2017\.txt"):
        _ = open_set("coco_stuff27", root).ids
    grey(root / "stuffthingmaps" / "val2017" / f"{139:012d}.png", np.full((H, H), 182))
    with pytest.raises(LabelIdError, match=r"000000000139\.png: image .*: label map: got id 182"):
        open_set("coco_stuff27", root, "dataset.list_dir=null").semantic_of(f"{139:012d}")
    streets = write_cityscapes(tmp_path / "cityscapes")
    path = next((streets / "gtFine" / "val").rglob("*.png"))
    Image.fromarray(np.full((H, W), 99, np.uint8)).save(path)
    dataset = open_set("cityscapes27", streets)
    with pytest.raises(LabelIdError, match=r"labelIds\.png: image .*: label map: got id 99"):
        dataset.semantic_of(dataset.ids[0])
