"""Fits the network by which `proposer=contours` ranks regions, on the training photographs of coco150.

    MODUSEG_COCO150=<folder> python -m benchmarks.rank_regions

First three folds, each ranked by a network that has not seen it: recall of objects and mean best IoU. Then one network
on all photographs, written to `moduseg/proposers/region_ranking.safetensors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from moduseg import datasets
from moduseg.config import compose
from moduseg.devices import resolve_device, seed_weights
from moduseg.evaluation.proposals import find_objects
from moduseg.proposers.contours import RANKING, Candidates, ContourOptions, ContourProposer, rank_candidates
from moduseg.proposers.region_features import NAMES, RegionRanker
from moduseg.structures import IGNORE_INDEX, Sample

NUM_FOLDS = 3
WIDTHS = (32, 16)
EPOCHS, BATCH, RATE, DECAY = 12, 1024, 6e-3, 1e-2
LOW, HIGH = 0.3, 0.8
"""The target rises from 0 at the first IoU to 1 at the second."""
NEGATIVES, NEGATIVE_IOU, NEGATIVE_WEIGHT = 600, 0.25, 0.3
"""Of the regions with a smaller IoU than this, so many of a photograph stand for all, each with this weight."""
FITTING, MAX_WEIGHT = 20, 4.0
"""An object weighs as much as this number of fitting regions, each of them not more than the second number."""
COUNTS = (100, 300, 400)


@dataclass(frozen=True)
class Example:
    """One photograph.

    Attributes:
        candidates: its regions.
        ious: `[N, M]` float32, of each region with each object.
    """

    candidates: Candidates
    ious: np.ndarray


def make_example(proposer: ContourProposer, sample: Sample) -> Example:
    """Find the regions of a photograph and compare them with its objects, of 100 pixels or more."""
    check_truth(sample)
    candidates = proposer.find_candidates(sample)
    labels, count = candidates.table.graph.labels, len(candidates.table.graph.sizes)
    semantic = np.asarray(sample.semantic)
    objects = find_objects(semantic)[1]
    is_counted = semantic != IGNORE_INDEX
    num_counted = np.bincount(labels[is_counted], minlength=count)
    inside = np.zeros((count, len(objects)), np.int64)
    for column, mask in enumerate(objects):
        inside[:, column] = np.bincount(labels[mask], minlength=count)
    shared = np.empty((len(candidates.node), len(objects)), np.int64)
    areas = np.empty(len(candidates.node), np.int64)
    for index, tree in enumerate(candidates.trees):
        rows = candidates.tree == index
        shared[rows] = tree.sum_leaves(inside)[candidates.node[rows]]
        areas[rows] = tree.sum_leaves(num_counted)[candidates.node[rows]]
    unions = areas[:, None] + objects.sum((1, 2))[None] - shared
    return Example(candidates, (shared / np.maximum(unions, 1)).astype(np.float32))


def check_truth(sample: Sample) -> None:
    """Raise ValueError if a photograph has no masks, or is too large to be worked on at its size."""
    if sample.semantic is None or max(sample.size) > ContourOptions().max_side:
        raise ValueError(
            f"{sample.id}: got no masks or a side above {ContourOptions().max_side} pixels, expected coco150's "
            "photographs; set MODUSEG_COCO150"
        )


class Lesson(NamedTuple):
    """Regions that are learned from: features `[K, F]`, IoUs with the object that fits best `[K]`, weights `[K]`."""

    features: np.ndarray
    ious: np.ndarray
    weights: np.ndarray


def sample_regions(example: Example, rng: np.random.Generator) -> Lesson:
    """Return all regions of a photograph that lie on an object, and some of the others."""
    best = example.ious.max(axis=1, initial=0)
    positives, negatives = np.flatnonzero(best > NEGATIVE_IOU), np.flatnonzero(best <= NEGATIVE_IOU)
    weights = np.ones(len(positives))
    if len(positives):
        # Large objects are fitted by many regions, small ones by few: each object counts about alike.
        nearest = example.ious[positives].argmax(axis=1)
        num_fitting = np.bincount(nearest, weights=best[positives] > 0.5, minlength=example.ious.shape[1])
        weights = np.minimum(MAX_WEIGHT, FITTING / np.maximum(num_fitting[nearest], 1))
    chosen = rng.choice(negatives, min(NEGATIVES, len(negatives)), replace=False)
    share = NEGATIVE_WEIGHT * len(negatives) / max(len(chosen), 1)
    rows = np.concatenate([positives, chosen])
    return Lesson(example.candidates.features[rows], best[rows], np.concatenate([weights, np.full(len(chosen), share)]))


def fit(examples: Sequence[Example], seed: int = 0) -> dict[str, Tensor]:
    """Fit a network and return its tensors, as `RegionRanker` reads them."""
    rng = np.random.default_rng(seed)
    columns = zip(*(sample_regions(example, rng) for example in examples), strict=True)
    features, ious, weights = (torch.from_numpy(np.concatenate(column)).float() for column in columns)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    inputs = ((features - mean) / scale).clamp(-5, 5)
    targets = ((ious - LOW) / (HIGH - LOW)).clamp(0, 1)
    with seed_weights(seed):
        sizes = (len(NAMES), *WIDTHS, 1)
        layers = [nn.Linear(before, after) for before, after in pairwise(sizes)]
    network = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    num_batches = len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=EPOCHS * num_batches + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH)[:num_batches]:
            losses = F.binary_cross_entropy_with_logits(network(inputs[rows])[:, 0], targets[rows], reduction="none")
            optimiser.zero_grad()
            (losses * weights[rows]).mean().backward()
            optimiser.step()
            schedule.step()
    tensors = {"mean": mean, "scale": scale}
    for index, layer in enumerate(layers):
        tensors |= {f"weight_{index}": layer.weight.detach(), f"bias_{index}": layer.bias.detach()}
    return tensors


def measure_recall(examples: Sequence[Example], tensors: dict[str, Tensor]) -> np.ndarray:
    """Return the IoU of the best of the first proposals with each object, `[M, len(COUNTS)]`."""
    ranker = RegionRanker.of({name: tensor.double().numpy() for name, tensor in tensors.items()})
    options = dataclasses.replace(ContourOptions(), max_proposals=max(COUNTS))
    best = []
    for example in examples:
        scores = ranker.score(example.candidates.features)
        rows = rank_candidates(example.candidates, scores, options)
        best.append(np.stack([example.ious[rows[:count]].max(axis=0, initial=0) for count in COUNTS], axis=1))
    return np.concatenate(best)


def main() -> None:
    """Fit the ranking on folds, print what it finds on the others, and write the ranking of all photographs."""
    # One thread adds up in the same order on every machine, and is the faster for so small a network.
    torch.set_num_threads(1)
    cfg = compose(["dataset=coco150", "proposer=contours"])
    dataset = datasets.build(cfg.dataset, "train2017")
    options = {key: value for key, value in cfg.proposer.items() if key != "name"}
    proposer = ContourProposer(ContourOptions(**options), resolve_device(cfg.runtime.device, "float32"))
    examples = [make_example(proposer, dataset.load(image_id, truth=True)) for image_id in dataset.ids]
    print(f"{len(examples)} photographs, {np.mean([len(e.ious) for e in examples]):.0f} regions in each")
    best = []
    for fold in range(NUM_FOLDS):
        tensors = fit([example for i, example in enumerate(examples) if i % NUM_FOLDS != fold])
        best.append(measure_recall(examples[fold::NUM_FOLDS], tensors))
    for count, column in zip(COUNTS, np.concatenate(best).T, strict=True):
        recall, mean = 100 * (column >= 0.5).mean(), 100 * column.mean()
        print(f"held out, {count} masks: recall {recall:.1f}, mean best IoU {mean:.1f}")
    RANKING.write_bytes(save({name: tensor.contiguous() for name, tensor in fit(examples).items()}))
    print(f"written: {RANKING}")


if __name__ == "__main__":
    main()
