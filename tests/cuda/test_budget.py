"""How often the host may wait for a GPU and copy to it, an image, by place; each entry says why it has to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from moduseg import datasets
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.proposers.sam import SamOptions, SamProposer
from moduseg.structures import Sample
from tests.support.pretend_cuda import CUDA, DeviceLog, pretend_cuda

NUM_BATCHES = 16
"""Batches of points an image, as 32 x 32 points in batches of 64 are."""
MAX_GENERATION_WAITS = 20


class Limit(NamedTuple):
    """What one function may ask of the device, an image."""

    waits: float
    copies: float
    reason: str


GENERATION = {
    "proposers/sam_decoder.py:embed_batch": Limit(0, 1, "the image"),
    "proposers/mask_generation.py:generate_batch": Limit(0, 1, "the points"),
    "proposers/sam_decoder.py:_decode": Limit(
        NUM_BATCHES, 0, "how many masks pass by predicted IoU decides what is decoded, once a batch of points"
    ),
    "proposers/mask_upsampling.py:find_possibly_stable": Limit(1, 0, "how many masks are enlarged"),
    "proposers/mask_generation.py:prefilter": Limit(1, 1, "boxes and stability to NMS, and the masks to keep back"),
    "proposers/mask_generation.py:select": Limit(0, 1, "the masks that NMS keeps"),
    "proposers/mask_generation.py:assemble": Limit(1, 0, "the result"),
}


def find_excess(log: DeviceLog, limits: Mapping[str, Limit], num_images: int) -> dict[str, tuple[float, float]]:
    """Return waits and copies an image of each function that exceeds its limit, or has none."""
    waits, copies = log.waits_by_function(), log.copies_by_function()
    excess = {}
    for function in waits.keys() | copies.keys():
        limit = limits.get(function, Limit(0, 0, ""))
        counts = waits.get(function, 0) / num_images, copies.get(function, 0) / num_images
        if counts[0] > limit.waits or counts[1] > limit.copies:
            excess[function] = counts
    return excess


@lru_cache
def make_scene() -> Sample:
    dataset = datasets.build(compose(["dataset.val=1", "dataset.train=1"]).dataset, "val")
    return dataset.load(dataset.ids[0])


def make_generation(**more: Any) -> SamProposer:
    options = {key: value for key, value in compose(["proposer=sam_miniature"]).proposer.items() if key != "name"}
    points = {"points_per_side": 12, "points_per_batch": 12**2 // NUM_BATCHES}
    return SamProposer(SamOptions(**{**options, **points, **more}), Device(CUDA))


def test_waits_and_copies_of_mask_generation() -> None:
    """The first image also copies the weights."""
    with pretend_cuda():
        proposer = make_generation()
        proposer.propose(make_scene())
        with pretend_cuda() as log:
            assert len(proposer.propose(make_scene())) > 5
    assert find_excess(log, GENERATION, 1) == {}
    assert log.waits.total() <= MAX_GENERATION_WAITS
    assert log.copies.total() <= 4


def test_masks_are_filtered_in_parts_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of filtering all together."""
    with pretend_cuda():
        proposer = make_generation()
        expected = proposer.propose(make_scene())
        monkeypatch.setattr("moduseg.proposers.mask_generation._MAX_PENDING_LOGITS", 1 << 16)
        with pretend_cuda() as log:
            proposals = proposer.propose(make_scene())
    parts = Counter(log.waits_by_function())["proposers/mask_upsampling.py:find_possibly_stable"]
    assert 1 < parts < NUM_BATCHES
    assert torch.equal(proposals.masks, expected.masks)
    assert torch.equal(proposals.predicted_iou, expected.predicted_iou)
