"""The accuracy of nearest regions, on vectors made by hand and on the embedded world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.regions import BASE, RegionVectors, main, measure_accuracy, pool_regions
from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from tests.support.runs import overrides


def make_regions(points: list[tuple[float, float]], labels: list[int], images: list[int]) -> RegionVectors:
    return RegionVectors(torch.tensor(points), torch.tensor(labels), torch.tensor(images), 0.0)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param([0, 1, 2, 3], 100.0, id="each class in two images"),
        pytest.param([0, 0, 2, 3], 50.0, id="an image is no neighbour of its own"),
    ],
)
def test_one_image_is_left_out(images: list[int], expected: float) -> None:
    points = [(11.0, 10.0), (11.0, 10.2), (9.0, 10.0), (9.0, 9.8)]
    assert measure_accuracy(make_regions(points, [1, 1, 2, 2], images)) == expected


def test_queries_are_centred_by_the_bank() -> None:
    """Seen from the origin, the query is nearest to class 2."""
    bank = make_regions([(10.0, 1.0), (10.0, 3.0)], [1, 2], [0, 1])
    queries = make_regions([(20.0, 1.9), (20.0, 7.0)], [1, 2], [0, 0])
    assert measure_accuracy(bank, queries) == 100.0


def test_regions_are_those_of_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*overrides(tmp_path), "bank.min_area=100"]
    work = Workspace(compose([*BASE, *arguments]))
    regions = pool_regions(work, "train")
    dataset = work.dataset("train")
    areas = [
        (number, class_id, int((truth == class_id).sum()))
        for number, truth in enumerate(dataset.load(image_id, truth=True).semantic for image_id in dataset.ids)
        for class_id in range(1, len(dataset.classes))
    ]
    kept = [(number, class_id) for number, class_id, area in areas if area >= 100]
    assert list(zip(regions.image_index.tolist(), regions.labels.tolist(), strict=True)) == kept
    assert regions.vectors.shape == (len(kept), work.backbone.dim)
    main(arguments)
    assert f"| {len(kept)}, " in capsys.readouterr().out.splitlines()[-1]
