"""How often the host may wait for a GPU and copy to it, an image, by place; each entry says why it has to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moduseg import datasets
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.proposers.sam import SamOptions, SamProposer
from moduseg.pseudo_masks.labels import region_vote
from moduseg.retrieval.confidence import paint_confidence
from moduseg.retrieval.rasterize import check_labels
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.structures import Proposals, Sample
from tests.support.pretend_cuda import CUDA, DeviceLog, pretend_cuda, to_pretend
from tests.support.runs import overrides

NUM_BATCHES = 16
"""Batches of points an image, as 32 x 32 points in batches of 64 are."""
MAX_GENERATION_WAITS = 20


class Limit(NamedTuple):
    """What one function may ask of the device, an image."""

    waits: float
    copies: float
    reason: str


GENERATION = {
    "devices.py:copy_arrays": Limit(0, 1, "the images of a batch, at once"),
    "proposers/mask_generation.py:generate_batch": Limit(0, 1, "the points"),
    "proposers/sam_decoder.py:_decode": Limit(
        NUM_BATCHES, 0, "how many masks pass by predicted IoU decides what is decoded, once a batch of points"
    ),
    "proposers/mask_upsampling.py:find_possibly_stable": Limit(1, 0, "how many masks are enlarged"),
    "proposers/mask_generation.py:prefilter": Limit(1, 1, "boxes and stability to NMS, and the masks to keep back"),
    "proposers/mask_generation.py:select": Limit(0, 1, "the masks that NMS keeps"),
    "proposers/mask_generation.py:assemble": Limit(1, 0, "the result"),
}

ONCE_A_RUN = frozenset({
    "backbones/clip_model.py:_text_features",
    "backbones/clip_model.py:model",
    "backbones/clip_model.py:normalisation",
    "backbones/timm_backbone.py:_model",
    "backbones/timm_backbone.py:_normalisation",
    "proposers/sam.py:promptable",
})  # fmt: skip
"""Functions that bring weights and texts to the device."""
BANK = {
    **{place: limit for place, limit in GENERATION.items() if not place.endswith(":_decode")},
    "proposers/sam_decoder.py:_decode": Limit(1, 0, "one batch of points in this test"),
    "devices.py:copy_arrays": Limit(0, 4, "the images of a batch to SAM, CLIP and backbone, and its label maps"),
    "structures.py:to": Limit(0, 5, "the proposals, and the scores that were stored"),
    "pseudo_masks/clip_words.py:generate": Limit(0, 6, "rows of the words of each class, a list each"),
    "pseudo_masks/store.py:_shrink": Limit(2, 0, "the scores and the background, to be stored"),
    "pseudo_masks/labels.py:make_label_map": Limit(0, 1, "the tags"),
    "pseudo_masks/labels.py:region_vote": Limit(3, 0, "which regions there are, and which pixels they fill"),
    "stages/pseudo_masks.py:encode_label_map": Limit(1, 0, "the label map, to be stored"),
    "bank/purification.py:class_regions": Limit(2, 0, "which classes there are, and which are large enough"),
    "bank/store.py:encode_vectors": Limit(3, 0, "vectors, labels and areas, to be stored"),
}
QUERIES = {
    **{place: limit for place, limit in BANK.items() if place.startswith("proposers/")},
    "devices.py:copy_arrays": Limit(0, 2, "the images of a batch to SAM and to the backbone"),
    "bank/aggregation.py:proposal_coverage": Limit(0, 1, "the proposals"),
    "bank/store.py:encode_vectors": Limit(1, 0, "the vectors, to be stored"),
    "structures.py:to": Limit(0, 1, "the bank, once a run"),
    "retrieval/retriever.py:predict": Limit(7, 1, "the vectors, and the seven tensors of a prediction"),
    "retrieval/retriever.py:vote": Limit(1, 0, "which proposals have a vector"),
    "retrieval/vote.py:vote": Limit(2, 0, "the lowest and the highest label"),
    "retrieval/search.py:above": Limit(1, 0, "how many rows may be among the nearest"),
    "retrieval/search.py:select": Limit(3, 0, "these rows"),
    "retrieval/search.py:_k_best": Limit(1, 0, "how many of them each query has"),
    "retrieval/search.py:_fixed": Limit(3, 0, "whether float64 sums are exact, for each block of the bank"),
    "retrieval/search.py:_inverse_lengths": Limit(3, 0, "whether a vector is not finite"),
    "retrieval/suppress.py:_scan": Limit(10, 0, "whether another round of suppression changed anything"),
    "retrieval/rasterize.py:check_labels": Limit(1, 0, "whether labels fit a byte"),
    "retrieval/rasterize.py:rasterize": Limit(1, 0, "which proposals are painted"),
    "stages/infer.py:_warn_of_overlaps": Limit(0, 0.25, "the bank's vectors, once a run"),
    "bank/overlaps.py:count_nearest_classes": Limit(0.5, 0.5, "once a run, for each thousand regions of the bank"),
    "retrieval/assemble.py:assemble_proposals": Limit(0, 1, "the masks of the proposals"),
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


def test_waits_and_copies_of_a_run(tmp_path: Path) -> None:
    """The bank's stages, then those of the labelled images."""
    more = ("proposer=sam_miniature", "proposer.points_per_side=6", "pseudo_masks=clip_dense", "backbone=miniature")
    cfg = compose(overrides(tmp_path, *more, "runtime.device=cuda", "evaluation.panels=0", train=4, val=4))
    for run, limits in ((BuildBank.run, BANK), (Infer.run, QUERIES)):
        with pretend_cuda() as log:
            run(cfg)
        assert log.num_operators > 1000
        excess = find_excess(log, limits, 4)
        assert {place: counts for place, counts in excess.items() if place not in ONCE_A_RUN} == {}


def test_what_exceeds_the_budget_is_found() -> None:
    """A wait that nobody allowed, in a function that has a limit and in one that has none."""
    with pretend_cuda() as log:
        labels = to_pretend(torch.tensor([0, 1]))
        check_labels(labels)
        check_labels(labels)
    assert find_excess(log, QUERIES, 1) == {"retrieval/rasterize.py:check_labels": (2, 0)}
    assert find_excess(log, QUERIES, 2) == {}
    assert find_excess(log, GENERATION, 2) == {"retrieval/rasterize.py:check_labels": (1, 0)}


@pytest.mark.parametrize("purity", [0.0, 0.6])
def test_votes_of_regions_wait_as_often_for_many_as_for_one(purity: float) -> None:
    """Regions that nest and overlap, all of whose pixels are ignored or that hold several labels: the CPU's labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (20, 30), generator=generator).to(torch.uint8)
    labels[:4] = 255
    masks = torch.zeros(24, 20, 30, dtype=torch.bool)
    for mask in masks:
        top, left, height, width = (int(torch.randint(1, 14, (1,), generator=generator)) for _ in range(4))
        mask[top - 1 : top + height, left - 1 : left + width] = True
    expected = region_vote(labels, Proposals(masks), purity)
    with pretend_cuda() as log:
        result = region_vote(to_pretend(labels), Proposals(to_pretend(masks)), purity)
        assert log.waits.total() <= BANK["pseudo_masks/labels.py:region_vote"].waits
    assert torch.equal(result.cpu(), expected)
    assert not torch.equal(expected, labels)


@pytest.mark.parametrize("is_majority", [False, True])
def test_confidence_waits_as_often_for_many_masks_as_for_one(is_majority: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(24, 6, 8, generator=generator) < 0.3
    scores, shares = torch.rand(2, 24, generator=generator)
    labels = torch.arange(24) % 3
    label_map = torch.randint(0, 3, (6, 8), generator=generator).to(torch.uint8)
    values = (masks, labels, scores, shares, label_map)
    expected = paint_confidence(*values, is_majority=is_majority)
    with pretend_cuda() as log:
        confidence = paint_confidence(*map(to_pretend, values), is_majority=is_majority)
    assert log.waits.total() <= 2
    assert confidence.tolist() == expected.tolist()
    assert expected.any()
