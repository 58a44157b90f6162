"""The table of what proposals find, and the network that ranks regions, on pictures of a few pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import proposals, rank_regions
from moduseg.errors import ConfigError
from moduseg.evaluation.proposals import find_objects, measure_ious
from moduseg.proposers.contours import ContourOptions, ContourProposer
from moduseg.proposers.region_features import NAMES, RegionRanker
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU, sample


def test_recall_counts_the_first_masks_and_sizes() -> None:
    """An object of 10 x 20 pixels that the second mask finds, and one of 20 x 60 that none finds."""
    semantic = np.zeros((60, 80), np.uint8)
    semantic[5:15, 5:25], semantic[30:50, 10:70] = 1, 2
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 30:50, 10:30], masks[1, 5:15, 5:20] = True, True
    recall = proposals.ProposalRecall()
    picture = Sample("a", np.zeros((60, 80, 3), np.uint8), semantic=semantic)
    recall.add(picture, Proposals(masks), 1.5)
    assert [column.tolist() for column in recall.best[0].T] == [pytest.approx([0.75, 1 / 3])] * 3
    assert recall.make_rows("x") == [
        "| x | first 100 | 50.0 | 54.2 | 100.0 | - | 0.0 | - | - |  |",
        "| x | first 300 | 50.0 | 54.2 | 100.0 | - | 0.0 | - | - |  |",
        "| x | 2 | 50.0 | 54.2 | 100.0 | - | 0.0 | - | - | 1.50 |",
    ]
    assert all(row.count("|") == proposals.make_head()[0].count("|") for row in recall.make_rows("x"))


def test_presets_take_overrides() -> None:
    pictures = [sample(40, 60)]
    assert proposals.measure("superpixels,proposer.max_proposals=3", pictures, CPU).num_masks == [3]
    with pytest.raises(ConfigError, match=r"proposer\.nothing"):
        proposals.measure("superpixels,proposer.nothing=3", pictures, CPU)


def test_ious_of_regions_are_those_of_their_masks() -> None:
    picture = sample(40, 60)
    semantic = np.array(picture.semantic)
    semantic[:3] = 255
    picture = Sample("a", picture.image, semantic=semantic)
    example = rank_regions.make_example(ContourProposer(ContourOptions(), CPU), picture)
    objects = torch.from_numpy(find_objects(semantic)[1])
    expected = measure_ious(objects, example.candidates.draw((40, 60)), torch.from_numpy(semantic == 255))
    assert example.ious.shape[1] == len(objects) == 2
    np.testing.assert_allclose(example.ious, expected.T, atol=1e-6)


def test_fit_learns_which_regions_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions whose first feature is their IoU with the only object; the others are noise."""
    monkeypatch.setattr(rank_regions, "BATCH", 64)
    example = rank_regions.make_example(ContourProposer(ContourOptions(), CPU), sample(40, 60))
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(8):
        rows = rng.integers(0, len(example.ious), 400)
        features = rng.normal(size=(400, len(NAMES)))
        ious = rng.random((400, 1)).astype(np.float32)
        features[:, 0] = ious[:, 0]
        candidates = example.candidates.select(rows)
        candidates.features[:] = features
        examples.append(rank_regions.Example(candidates, ious))
    tensors = rank_regions.fit(examples)
    ranker = RegionRanker.of({name: tensor.double().numpy() for name, tensor in tensors.items()})
    scores = ranker.score(examples[0].candidates.features)
    is_good = examples[0].ious[:, 0] > 0.7
    assert scores[is_good].mean() > scores[~is_good].mean() + 0.3
    again = rank_regions.fit(examples)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
