"""Segments without names, as a stage: what is stored, how it is scored, resume, shards, reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg.config import compose
from moduseg.errors import ConfigError, IncompleteError
from moduseg.evaluation.matching import SegmentMatcher
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace
from moduseg.report.finished_run import open_run, read_run_config
from moduseg.stages.discover import Discover, sample_vectors
from moduseg.stages.segments import Segments, pool_segments, sort_segments
from moduseg.structures import TokenMap
from tests.stages.test_shards import shard
from tests.support.runs import overrides, read_labels, result_bytes

KMEANS = ("discoverer=kmeans", "discoverer.num_clusters=5", "evaluation.panels=1")


@pytest.fixture(scope="module")
def discovered(world: Path) -> Path:
    """The folder of a run."""
    return Discover.run(compose(overrides(world, *KMEANS)))


def test_figures_are_those_of_the_stored_maps(discovered: Path, world: Path) -> None:
    work = Workspace(compose(overrides(world, *KMEANS)))
    dataset, segments = work.dataset("val"), StageFolder(discovered).inputs["segments"]
    matchers = {"image": SegmentMatcher(13, "image"), "set": SegmentMatcher(13, "set")}
    for image_id, clusters in read_labels(discovered).items():
        truth, found = dataset.semantic_of(image_id), segments.label_map(image_id)
        assert truth is not None
        assert set(np.unique(found)) == set(range(5))
        # A cluster is one or more whole segments.
        assert all(len(np.unique(clusters[found == i])) == 1 for i in range(5))
        matchers["image"].update(truth, found)
        matchers["set"].update(truth, clusters - 1)
    record = json.loads((discovered / "results.json").read_text())
    for protocol, matcher in matchers.items():
        scores = matcher.compute()
        part = record[f"matched_by_{protocol}"]
        assert part[f"miou_matched_by_{protocol}"] == scores.miou
        assert part[f"pixel_accuracy_matched_by_{protocol}"] == scores.pixel_accuracy
        assert list(part["iou"]) == list(dataset.classes)
    names = [name for name in record["class_of_cluster"] if name is not None]
    assert len(names) == len(set(names)) > 1
    assert (record["segments_per_image"], record["clusters"], record["images"]) == (5, 13, 4)
    assert not any(key in record for key in ("miou", "pixel_accuracy"))
    text = (discovered / "results.md").read_text()
    assert "matched by image" in text
    assert "matched by set" in text
    assert len(list((discovered / "panels").iterdir())) == 1


def test_segments_come_with_their_vectors(discovered: Path, world: Path) -> None:
    work = Workspace(compose(overrides(world, *KMEANS)))
    segments = StageFolder(discovered).inputs["segments"]
    for image_id in work.dataset("val").ids:
        pooled, label_map = segments.vectors(image_id)["pooled"], segments.label_map(image_id)
        areas = np.bincount(label_map.ravel()).tolist()
        assert areas == sorted(areas, reverse=True)
        tokens = work.backbone.tokens([work.dataset("val").load(image_id).image])[0]
        masks = torch.from_numpy(label_map) == torch.arange(5)[:, None, None]
        cells = masks.unflatten(1, (-1, tokens.stride)).unflatten(3, (-1, tokens.stride)).float().mean((2, 4))
        expected = torch.einsum("nhw,hwc->nc", cells, tokens.tokens) / cells.sum((1, 2))[:, None]
        torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


def test_a_run_that_is_done_stays(discovered: Path, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in discovered.rglob("*") if path.is_file()}
    assert Discover.run(compose(overrides(world, *KMEANS))) == discovered
    assert {path: path.stat().st_mtime_ns for path in discovered.rglob("*") if path.is_file()} == before
    more = Discover.run(compose(overrides(world, *KMEANS, "evaluation.panels=3")))
    assert (more, len(list((more / "panels").iterdir()))) == (discovered, 3)


def test_shards_give_the_same_bytes(discovered: Path, world: Path, tmp_path: Path) -> None:
    arguments = overrides(tmp_path, *KMEANS, world=world)
    for _ in range(3):
        for index in (0, 1):
            try:
                Discover.run(compose([*arguments, *shard(index, 2)]))
            except IncompleteError:
                continue
    stages = ("/segments/", "/discover/")
    expected, found = (
        {k: v for k, v in result_bytes(path).items() if any(s in k for s in stages) and "panels" not in k}
        for path in (world, tmp_path)
    )
    assert len(expected) >= 3 * 4
    assert found == expected
    name = discovered.name
    files = [next(path.glob(f"*/discover/{name}/centres.safetensors")).read_bytes() for path in (world, tmp_path)]
    assert files[0] == files[1]


def test_a_broken_image_costs_itself_and_is_tried_again(world: Path, tmp_path: Path) -> None:
    """The clusters are made anew with it, under another key, as they are of all images together."""
    shutil.copytree(world / "world-6-4", tmp_path / "world-6-4")
    arguments = overrides(tmp_path, *KMEANS)
    image = tmp_path / "world-6-4" / "JPEGImages" / "val_00001.png"
    content = image.read_bytes()
    image.write_bytes(content[:99])
    folder = Discover.run(compose(arguments))
    record = json.loads((folder / "results.json").read_text())
    assert (count_failures(folder), record["images"], record["left_out"]) == (2, 3, ["val_00001"])
    image.write_bytes(content)
    mended = Discover.run(compose(arguments))
    assert mended != folder
    assert (count_failures(mended), len(read_labels(mended))) == (0, 4)


def test_without_truth_there_are_clusters_and_no_figures(world: Path, tmp_path: Path) -> None:
    """A folder with images and nothing else."""
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for image_id in ("val_00000", "val_00001"):
        shutil.copy(world / "world-6-4" / "JPEGImages" / f"{image_id}.png", tmp_path / "mine" / "images")
    arguments = ["dataset=folder", f"dataset.root={tmp_path / 'mine'}", f"runtime.outputs={tmp_path / 'out'}"]
    arguments += ["backbone=miniature_random", "runtime.device=cpu", *KMEANS]
    with pytest.raises(ConfigError, match=r"^num_clusters: got null on folder, which has no class list, expected 1"):
        Discover.run(compose(arguments))
    folder = Discover.run(compose([*arguments, "num_clusters=3"]))
    labels = read_labels(folder)
    assert sorted(labels) == ["val_00000", "val_00001"]
    assert {int(i) for label_map in labels.values() for i in np.unique(label_map)} <= {1, 2, 3}
    assert not (folder / "results.json").exists()
    assert (folder / "report" / "index.html").is_file()
    assert len(list((folder / "panels").iterdir())) == 1
    assert Discover.run(compose([*arguments, "num_clusters=3", "evaluation.panels=2"])) == folder
    assert len(list((folder / "panels").iterdir())) == 2


def test_the_report_shows_clusters_by_name(world: Path) -> None:
    folder = Discover.run(compose(overrides(world, *KMEANS, "evaluation.report=true")))
    assert (folder / "report" / "index.html").is_file()
    run = open_run(folder, Workspace(read_run_config(folder)))
    record = json.loads((folder / "results.json").read_text())
    assert (run.what, len(run.dataset.classes), run.record) == ("clusters", 14, None)
    for name, matched in zip(run.dataset.classes[1:], record["class_of_cluster"], strict=True):
        assert ("(" in name) == (matched is not None)
        assert matched is None or name.endswith(f"({matched})")


def test_segments_are_numbered_by_area() -> None:
    found = torch.tensor([[7, 7, 2], [7, 9, 2], [4, 9, 7]])
    segments, areas = sort_segments(found)
    assert segments.tolist() == [[0, 0, 1], [0, 2, 1], [3, 2, 0]]
    assert areas.tolist() == [4, 2, 2, 1]


def test_vectors_of_a_resized_input_and_of_its_own_size_agree() -> None:
    """An input twice as large has the same tokens at twice the stride."""
    generator = torch.Generator().manual_seed(0)
    tokens, segments = torch.rand(4, 5, 3, generator=generator), torch.randint(0, 3, (32, 40), generator=generator)
    native = pool_segments(segments, 3, TokenMap(tokens, 8, (32, 40), (32, 40)))
    resized = pool_segments(segments, 3, TokenMap(tokens, 16, (32, 40), (64, 80)))
    torch.testing.assert_close(native, resized)


@pytest.mark.parametrize("max_count", [3, 10, 37, 1000])
def test_samples_are_evenly_spaced_and_bounded(max_count: int) -> None:
    sizes = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.arange(float(sum(sizes)))

    def images() -> Iterator[Tensor]:
        for part in rows.split(sizes):
            yield part[:, None]

    vectors = sample_vectors(images(), max_count)
    step = next(2**power for power in range(12) if len(rows[:: 2**power]) <= max_count)
    assert vectors[:, 0].tolist() == rows[::step].tolist()


def test_the_key_holds_backbone_and_discoverer(world: Path) -> None:
    def folder_of(*more: str) -> str:
        return Segments(Workspace(compose(overrides(world, *KMEANS, *more)))).locate()[1]

    keys = [
        folder_of(*m) for m in ((), ("discoverer.num_clusters=4",), ("backbone=miniature",), ("discoverer=spectral",))
    ]
    assert len(set(keys)) == 4
    assert folder_of("pseudo_masks=cam", "evaluation.panels=3") == keys[0]
