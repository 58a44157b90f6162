"""The data sets of the open-vocabulary protocols: ids and ignored values to the pixel, from raw files to scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moduseg import datasets
from moduseg.config import compose
from moduseg.datasets.classes import COCO_CLASSES, COCO_STUFF_CLASSES, CONTEXT_CLASSES, VOC_CLASSES
from moduseg.datasets.io import read_label_png
from moduseg.errors import DataError, LabelIdError
from moduseg.stages.segment import Segment
from moduseg.tools import check_data, prepare_data
from tests.support.skeletons import (
    H,
    grey,
    write_ade20k,
    write_cityscapes,
    write_coco_stuff,
    write_coco_stuff27,
    write_context,
    write_voc,
)

Write = Callable[[Path], Path]
SETS = [
    pytest.param("voc", write_voc, True, 20, id="voc21"),
    pytest.param("voc20", write_voc, False, 20, id="voc20"),
    pytest.param("context", write_context, True, 59, id="context60"),
    pytest.param("context59", write_context, False, 59, id="context59"),
    pytest.param("coco_object", write_coco_stuff, True, 80, id="coco_object"),
    pytest.param("coco_stuff", write_coco_stuff, False, 171, id="coco_stuff"),
    pytest.param("cityscapes", write_cityscapes, False, 19, id="cityscapes"),
    pytest.param("ade20k", write_ade20k, False, 150, id="ade20k"),
    pytest.param("cityscapes27", write_cityscapes, False, 27, id="cityscapes27"),
    pytest.param("coco_stuff27", write_coco_stuff27, False, 27, id="coco_stuff27"),
]
ROWS = {
    "context": [1] * 12 + [59] * 12 + [0] * 24,
    "context59": [1] * 12 + [59] * 12 + [255] * 24,
    # Stored 0 and 89 are the first and the last of 80 things, 91 and 181 of 91 classes of stuff; 11 is no category.
    "coco_stuff": [1] * 8 + [80] * 8 + [81] * 8 + [171] * 8 + [255] * 16,
    "coco_object": [1] * 8 + [80] * 8 + [0] * 16 + [255] * 16,
}
"""The first column of the drawn label maps, by data set."""


def open_set(name: str, root: Path, split: str = "val") -> datasets.Dataset:
    return datasets.build(compose([f"dataset={name}", f"dataset.root={root}"]).dataset, split)


@pytest.mark.parametrize(("name", "write", "has_background", "num_classes"), SETS)
def test_from_raw_files_to_scores(
    name: str, write: Write, has_background: bool, num_classes: int, tmp_path: Path
) -> None:
    """Masks as pseudo masks of all classes: every label map is the truth, and every class in it scores 100."""
    root, outputs = write(tmp_path / "data"), tmp_path / "out"
    arguments = [f"dataset={name}", f"dataset.root={root}", f"runtime.outputs={outputs}", "runtime.device=cpu"]
    cfg = compose([*arguments, "pseudo_masks=ground_truth", "evaluation.panels=0", "evaluation.bootstrap=0"])
    assert prepare_data.run(cfg) == {}
    assert not check_data.run(cfg).is_broken
    folder = Segment.run(cfg)
    dataset = open_set(name, root)
    assert (dataset.has_background, dataset.num_classes) == (has_background, num_classes)
    for image_id in dataset.ids:
        truth = dataset.semantic_of(image_id)
        assert truth is not None
        labels = read_label_png(folder / "labels" / f"{image_id}.png")
        assert np.array_equal(labels[truth != 255], truth[truth != 255])
        assert has_background or not (truth == 0).any()
    assert json.loads((folder / "results.json").read_text())["miou"] == 100


@pytest.mark.parametrize(("name", "write"), [
    pytest.param("context", write_context, id="context60"),
    pytest.param("context59", write_context, id="context59"),
    pytest.param("coco_stuff", write_coco_stuff, id="coco_stuff"),
    pytest.param("coco_object", write_coco_stuff, id="coco_object"),
])  # fmt: skip
def test_ids_to_the_pixel(name: str, write: Write, tmp_path: Path) -> None:
    dataset = open_set(name, write(tmp_path / "data"))
    truth = dataset.semantic_of(dataset.ids[0])
    assert truth is not None
    assert (truth == np.array(ROWS[name])[:, None]).all()
    assert dataset.labels_of(dataset.ids[0]) == tuple(sorted(set(ROWS[name]) - {0, 255}))


def test_masks_without_their_background_are_the_same_masks(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    with_background, without = open_set("voc", root), open_set("voc20", root)
    assert (with_background.name, without.name, without.classes) == ("voc", "voc20", VOC_CLASSES)
    for image_id in with_background.ids:
        truth, view = with_background.semantic_of(image_id), without.semantic_of(image_id)
        assert truth is not None
        assert view is not None
        assert np.array_equal(view, np.where(truth == 0, 255, truth))
    assert with_background.fingerprint() != without.fingerprint()


@pytest.mark.parametrize("name", ["context", "context59"])
def test_label_maps_of_the_release_and_converted_ones_agree(name: str, tmp_path: Path) -> None:
    root = write_context(tmp_path / "data")
    arguments = [f"dataset={name}", f"dataset.root={root}", f"runtime.outputs={tmp_path / 'out'}"]
    before = open_set(name, root).semantic_of("2008_000019")
    assert prepare_data.run(compose(arguments)) == {}
    stored = read_label_png(root / "SegmentationClassContext" / "2008_000019.png")
    # What is written has its 0, whichever view wrote it.
    assert stored[:, 0].tolist() == ROWS["context"]
    after = open_set(name, root).semantic_of("2008_000019")
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)


@pytest.mark.parametrize(("name", "suffix", "stored", "expected"), [
    pytest.param("coco_stuff", "_labelTrainIds", [0, 170, 255], [1, 171, 255], id="stuff"),
    pytest.param("coco_object", "_instanceTrainIds", [0, 80, 255], [0, 80, 255], id="things"),
])  # fmt: skip
def test_converted_maps_are_read(
    name: str, suffix: str, stored: list[int], expected: list[int], tmp_path: Path
) -> None:
    root = write_coco_stuff(tmp_path / "data")
    (root / "stuffthingmaps" / "val2017" / f"{139:012d}.png").unlink()
    grey(root / "stuffthingmaps" / "val2017" / f"{139:012d}{suffix}.png", np.repeat([stored], H, 0))
    truth = open_set(name, root).semantic_of(f"{139:012d}")
    assert truth is not None
    assert truth[0].tolist() == expected


def test_broken_files_are_named(tmp_path: Path) -> None:
    root = write_coco_stuff(tmp_path / "coco")
    grey(root / "stuffthingmaps" / "val2017" / f"{139:012d}.png", np.full((H, H), 182))
    with pytest.raises(LabelIdError, match=r"000000000139\.png: image .* has label id 182, expected 0\.\.181 or 255"):
        open_set("coco_stuff", root).semantic_of(f"{139:012d}")
    context = write_context(tmp_path / "context")
    (context / "trainval" / "2008_000019.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match=r"2008_000019\.mat: no label map of PASCAL Context"):
        open_set("context", context).semantic_of("2008_000019")


def test_names_are_as_many_as_ids() -> None:
    assert (len(COCO_CLASSES), len(COCO_STUFF_CLASSES), len(CONTEXT_CLASSES)) == (81, 172, 60)
    assert COCO_STUFF_CLASSES[:81] == COCO_CLASSES
    assert (COCO_STUFF_CLASSES[81], COCO_STUFF_CLASSES[171]) == ("banner", "wood")
    assert list(CONTEXT_CLASSES[1:]) == sorted(CONTEXT_CLASSES[1:])
