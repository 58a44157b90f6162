"""How well a backbone tells true regions apart: the class of the nearest region of another photograph.

    python -m benchmarks.regions dataset=coco150 backbone=efficientnet_lite2

Arguments are those of every command. A region is what one class covers in an image, by the ground truth, if that is at
least `bank.min_area` pixels (100 if omitted); the background is none. Vectors are pooled and centred as the bank's are.
Of the training images each region looks for its neighbour in the other images, of the evaluated ones in the training
images. Seconds are CPU seconds of the backbone's passes on a CPU, which other programs hardly disturb.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.bank.aggregation import aggregate, coverage
from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from moduseg.structures import IGNORE_INDEX

BASE = ("bank=paper", "bank.min_area=100")
"""What holds if the arguments do not say otherwise."""


@dataclass(frozen=True)
class RegionVectors:
    """The regions of a split.

    Attributes:
        vectors: `[N, C]` float32, pooled, neither centred nor normalised.
        labels: `[N]` int64 class ids.
        image_index: `[N]` int64, number of each region's image.
        seconds: CPU seconds of the backbone for an image, the first left out, because it builds the model.
    """

    vectors: Tensor
    labels: Tensor
    image_index: Tensor
    seconds: float


def pool_regions(work: Workspace, split: str) -> RegionVectors:
    """Return the vectors of the regions of a split.

    Raises:
        DataError: an image without ground truth.
    """
    dataset, vectors, labels, image_index, seconds = work.dataset(split), [], [], [], []
    for number, image_id in enumerate(dataset.ids):
        sample = dataset.load(image_id, truth=True, labels=False)
        truth = np.asarray(sample.semantic)
        started = time.process_time()
        (token_map,) = work.backbone.tokens([sample.image])
        seconds.append(time.process_time() - started)
        ids, areas = np.unique(truth, return_counts=True)
        is_region = (ids != 0) & (ids != IGNORE_INDEX) & (areas >= work.cfg.bank.min_area)
        if not is_region.any():
            continue
        masks = torch.from_numpy(truth == ids[is_region][:, None, None]).to(work.device.torch_device)
        vectors.append(aggregate(token_map.tokens, coverage(masks, token_map), normalize=False))
        labels += ids[is_region].tolist()
        image_index += [number] * len(masks)
    return RegionVectors(
        torch.cat(vectors), torch.tensor(labels), torch.tensor(image_index), float(np.mean(seconds[1:]))
    )


def measure_accuracy(bank: RegionVectors, queries: RegionVectors | None = None) -> float:
    """Return the percentage of regions whose nearest neighbour in the bank has their class.

    Args:
        bank: the labelled regions, whose mean is subtracted.
        queries: regions of other images; if omitted those of the bank, each of which sees other images alone.
    """
    mean = bank.vectors.mean(0)
    stored = F.normalize(bank.vectors - mean, dim=1)
    asked = stored if queries is None else F.normalize(queries.vectors - mean, dim=1)
    similarities = asked @ stored.T
    if queries is None:
        similarities[bank.image_index[:, None] == bank.image_index] = -torch.inf
    truth = bank.labels if queries is None else queries.labels
    return 100.0 * float((bank.labels[similarities.argmax(1).cpu()] == truth).float().mean())


@torch.inference_mode()
def main(arguments: Sequence[str]) -> None:
    """Print one row of a table: accuracy on both splits, channels, seconds."""
    work = Workspace(compose([*BASE, *arguments]))
    train, val = (pool_regions(work, split) for split in (work.train_split, work.eval_split))
    print("| settings | train, % | val, % | regions | channels | CPU seconds a photograph |")
    print("|---|---:|---:|---:|---:|---:|")
    print(
        f"| `{' '.join(arguments)}` | {measure_accuracy(train):.1f} | {measure_accuracy(train, val):.1f} "
        f"| {len(train.labels)}, {len(val.labels)} | {train.vectors.shape[1]} | {train.seconds:.2f} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
