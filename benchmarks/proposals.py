"""How many objects the proposals of a preset find, and how long they take.

    MODUSEG_COCO150=<folder> python -m benchmarks.proposals --split train2017 contours superpixels_photo

prints as Markdown, for the first 100, the first 300 and all masks, the recall at an IoU of 0.5, the mean best IoU and
the recall of objects by their size. Seconds are CPU time of all threads. Presets may carry overrides:
`contours,proposer.num_trees=1`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from moduseg import datasets, proposers
from moduseg.config import compose
from moduseg.devices import Device, resolve_device
from moduseg.evaluation.proposals import find_objects, measure_ious
from moduseg.structures import IGNORE_INDEX, Proposals, Sample

COUNTS = (100, 300, None)
"""How many of the first masks are looked at; `None` is all."""
SIZES = (100, 300, 1000, 3000, 10000)
"""Objects are grouped by their pixels: from each number to below the next; smaller ones are left out."""


@dataclass
class ProposalRecall:
    """What one proposer found in many images.

    Attributes:
        best: `[M, len(COUNTS)]` float32 for each image, the IoU of the best of the first masks with each object.
        areas: `[M]` int64 for each image, pixels of each object.
        num_masks: of each image.
        seconds: of each image, CPU time.
    """

    best: list[np.ndarray] = field(default_factory=list)
    areas: list[np.ndarray] = field(default_factory=list)
    num_masks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, sample: Sample, proposals: Proposals, seconds: float) -> None:
        """Add an image with ground truth; pixels of 255 are ignored."""
        semantic = np.asarray(sample.semantic)
        objects = find_objects(semantic, SIZES[0])[1]
        ignore = torch.from_numpy(semantic == IGNORE_INDEX)
        ious = measure_ious(torch.from_numpy(objects), proposals.masks, ignore).numpy()
        self.best.append(np.stack([ious[:, :count].max(axis=1, initial=0) for count in COUNTS], axis=1))
        self.areas.append(objects.sum((1, 2)))
        self.num_masks.append(len(proposals))
        self.seconds.append(seconds)

    def make_rows(self, name: str) -> list[str]:
        """Return the lines of the table, one for each of `COUNTS`."""
        best, areas = np.concatenate(self.best), np.concatenate(self.areas)
        group = np.searchsorted(SIZES, areas, side="right") - 1
        rows = []
        for column, count in zip(best.T, COUNTS, strict=True):
            is_found = column >= 0.5
            by_size = [_percent(is_found[group == i]) for i in range(len(SIZES))]
            masks = f"{np.mean(self.num_masks):.0f}" if count is None else f"first {count}"
            # Seconds are said once: the first masks take as long as all of them.
            seconds = f"{np.mean(self.seconds):.2f}" if count is None else ""
            cells = (name, masks, _percent(is_found), _percent(column), *by_size, seconds)
            rows.append(f"| {' | '.join(cells)} |")
        return rows


def _percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f}" if len(values) else "-"


def make_head() -> list[str]:
    """Return the head of the table."""
    bounds = [f"{low} to {high}" for low, high in pairwise(SIZES)]
    titles = ("`proposer=`", "masks", "recall", "mean best IoU", *bounds, f"{SIZES[-1]} or more", "s a photograph")
    return [f"| {' | '.join(titles)} |", f"|{'---|' * 2}{'---:|' * (len(titles) - 2)}"]


def measure(preset: str, samples: Sequence[Sample], device: Device) -> ProposalRecall:
    """Run a preset, with its overrides after commas, on images with ground truth."""
    name, *overrides = preset.split(",")
    proposer = proposers.build(compose([f"proposer={name}", *overrides]).proposer, device)
    # The first image loads the model, which is no image's time.
    proposer.propose(samples[0])
    recall = ProposalRecall()
    for sample in samples:
        start = time.process_time()
        proposals = proposer.propose(sample)
        recall.add(sample, proposals, time.process_time() - start)
    return recall


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposals", description="Recall of proposals.")
    parser.add_argument("presets", nargs="+", help="of configs/proposer, overrides after commas")
    parser.add_argument("--dataset", default="coco150", help="a preset of configs/dataset with ground truth")
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--images", type=int, default=None, help="only the first so many")
    options = parser.parse_args(arguments)
    cfg = compose([f"dataset={options.dataset}"])
    dataset = datasets.build(cfg.dataset, options.split)
    samples = [dataset.load(image_id, truth=True) for image_id in dataset.ids[: options.images]]
    device = resolve_device(cfg.runtime.device, "float32")
    print("\n".join(make_head()), flush=True)
    for preset in options.presets:
        print("\n".join(measure(preset, samples, device).make_rows(preset)), flush=True)


if __name__ == "__main__":
    main()
