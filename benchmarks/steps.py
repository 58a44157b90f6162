"""The steps after the models, from patch tokens and neighbours to the label map, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row, Setting, interleave, require_faster
from moduseg.bank.aggregation import aggregate, id_map_coverage, patch_coverage
from moduseg.retrieval.assemble import assemble, assemble_id_map
from moduseg.retrieval.vote import vote
from tests import reference

PATCH, NMS_IOU, CLASSES, TOP_K = 14, 0.4, 21, 25


@dataclass(frozen=True)
class Case:
    """The data of one image: results of the proposer, the backbone and the search.

    Attributes:
        masks: `[N, H, W]` bool.
        tokens: `[h, w, C]` float32.
        neighbour_labels: `[N, k]` int64.
        similarities: `[N, k]` float32, descending.
    """

    masks: np.ndarray
    tokens: np.ndarray
    neighbour_labels: np.ndarray
    similarities: np.ndarray


def make_case(masks: np.ndarray, dim: int, seed: int = 0) -> Case:
    """Draw tokens and neighbours for masks of four classes and background; three neighbours in ten are wrong."""
    rng = np.random.default_rng(seed)
    count, height, width = masks.shape
    shape = -(-height // PATCH), -(-width // PATCH), dim
    true_labels = rng.choice(np.append(0, rng.choice(np.arange(1, CLASSES), 4, replace=False)), (count, 1))
    wrong = rng.random((count, TOP_K)) < 0.3
    labels = np.where(wrong, rng.integers(0, CLASSES, (count, TOP_K)), true_labels)
    similarities = -np.sort(-rng.uniform(0.3, 0.9, (count, TOP_K)).astype(np.float32), axis=1)
    return Case(masks, rng.normal(size=shape).astype(np.float32), labels, similarities)


def draw_id_map(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Return `[H, W]` int64, the nearest of `count` centres; one pixel in ten belongs to none (-1), in blocks."""
    centres = rng.uniform([0, 0], [height, width], (count, 2))
    y, x = np.mgrid[:height, :width]
    nearest = ((y[None] - centres[:, :1, None]) ** 2 + (x[None] - centres[:, 1:, None]) ** 2).argmin(0)
    holes = np.kron(rng.random((height // 16 + 1, width // 16 + 1)) < 0.1, np.ones((16, 16), bool))
    nearest[holes[:height, :width]] = -1
    return nearest


def run_plain(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors and label map, computed one mask at a time."""
    vectors = np.stack([reference.pool(case.tokens, reference.patch_coverage(mask, PATCH)) for mask in case.masks])
    pairs = zip(case.neighbour_labels, case.similarities, strict=True)
    votes = [reference.vote(a.tolist(), b.tolist()) for a, b in pairs]
    labels, scores = np.array([label for label, _ in votes]), np.array([score for _, score in votes])
    kept = reference.suppress(case.masks, labels, scores, NMS_IOU)
    return vectors, reference.rasterize(case.masks[kept], labels[kept], scores[kept])


def measure(title: str, min_ratio: float, case: Case, ours: Callable[[], tuple[Any, Any]], setting: Setting) -> Row:
    """Measure both ways on one case, after a check that they agree."""
    vectors, label_map = ours()
    expected = run_plain(case)
    np.testing.assert_allclose(vectors.cpu().numpy(), expected[0], atol=1e-5)
    np.testing.assert_array_equal(label_map.cpu().numpy(), expected[1])
    ways = {"plain": lambda: run_plain(case), "ours": ours}
    times = interleave(ways, setting.repeats, setting.device)
    return require_faster(
        title, min_ratio, times, "plain", "ours", masks=list(case.masks.shape), dim=case.tokens.shape[2]
    )


def _size(setting: Setting) -> tuple[int, int, int]:
    return (40, 60, 8) if setting.is_small else (375, 500, 768)


@torch.inference_mode()
def overlapping(setting: Setting) -> list[Row]:
    """Measure sixty overlapping proposals, as SAM gives them."""
    height, width, dim = _size(setting)
    masks = reference.random_masks(np.random.default_rng(0), 60, height, width)
    case = make_case(masks, dim)
    on_device = [
        torch.from_numpy(array).to(setting.device)
        for array in (case.masks, case.tokens, case.neighbour_labels, case.similarities)
    ]

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        masks, tokens, neighbour_labels, similarities = on_device
        vectors = aggregate(tokens, patch_coverage(masks, PATCH))
        labels, scores = vote(neighbour_labels, similarities)
        return vectors, assemble(masks, labels, scores, NMS_IOU)[0]

    title = f"after features and without the search: 60 overlapping proposals, {height}x{width}"
    return [measure(title, 5, case, ours, setting)]


@torch.inference_mode()
def disjoint(setting: Setting) -> list[Row]:
    """Measure thirty disjoint proposals, as EntitySeg, superpixels and id maps give them."""
    height, width, dim = _size(setting)
    ids = draw_id_map(np.random.default_rng(0), 30, height, width).astype(np.int32)
    case = make_case(ids == np.arange(30)[:, None, None], dim)
    on_device = [
        torch.from_numpy(array).to(setting.device)
        for array in (ids, case.tokens, case.neighbour_labels, case.similarities)
    ]

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        id_map, tokens, neighbour_labels, similarities = on_device
        vectors = aggregate(tokens, id_map_coverage(id_map, 30, PATCH))
        labels, scores = vote(neighbour_labels, similarities)
        return vectors, assemble_id_map(id_map, labels, scores)[0]

    title = f"the same with 30 disjoint proposals as an id map, {height}x{width}"
    return [measure(title, 10, case, ours, setting)]
