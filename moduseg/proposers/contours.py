"""Proposals from trees of regions: a watershed of HED's contours and of the photograph's own gradient, merged.

Neighbours are merged by the strength of the contour between them and by their colours, in several ways; every node of a
tree is a region, and a small network that was fitted to photographs ranks them by what they look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.files import file_digest
from moduseg.masks.region_tree import MergeRule, RegionTree, build_graph, merge_regions
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.drawn import choose_fitting, is_point
from moduseg.proposers.hed import ContourDetector
from moduseg.proposers.region_features import (
    MAPS,
    NAMES,
    LeafTable,
    RegionRanker,
    describe_nodes,
    join_boxes,
    make_leaf_table,
)
from moduseg.structures import Proposals, Sample

RANKING = Path(__file__).parent / "region_ranking.safetensors"
"""The network that ranks regions, as `python -m benchmarks.rank_regions` writes it."""
_GRADIENT_SIGMA = 0.8
_FLOOD_SIGMA = 0.8
_GRADIENT_GAIN = 3.0
"""Weight of the colour gradient beside the probability of a contour: HED at half size sees no fine detail."""
_BASIN_SIDE = 7
"""Each basin begins at the lowest pixel of a square of this side."""
_WEAK, _STRONG = 0.15, 0.4
"""Probabilities from which a pixel is a weak and a strong contour."""
_POOL = 1200
"""So many of the best regions are compared with each other."""


def _weigh(**weights: float) -> tuple[float, ...]:
    """Return weights of the maps, in the order of `MAPS`; 0 for those that are not named."""
    return tuple(weights.get(name, 0.0) for name in MAPS)


RULES = (
    MergeRule(_weigh(side3=1.0, side4=1.0), colour=2.0, balance=0.25),
    MergeRule(_weigh(fused=1.0), colour=0.0, balance=0.5),
    MergeRule(_weigh(strong=1.0, weak=0.3, fused=0.3), colour=1.0, balance=0.2),
)
"""How the trees of an image are merged, the one that finds most objects first."""


@dataclass(frozen=True, kw_only=True)
class ContourOptions:
    """How contours are found, how many trees are grown, and which of their regions become proposals.

    Attributes:
        weights: of HED: a path, an address (`moduseg.weights.sources.find_weights`), or `random`.
        seed: of `random` weights.
        edge_scale: HED sees the worked-on image at this fraction of its size, above 0, at most 1.
        max_side: an image with a longer side is worked on at this size, and the masks are scaled up.
        num_trees: trees, of the first so many rules of `RULES`. With one, no masks cross.
        min_area: smallest proposal, in pixels of the image.
        max_area: largest proposal, as a fraction of the image.
        overlap_cost: what a complete overlap with a proposal before it costs a region, in units of the score; 0 orders
            by the score alone.
        max_iou: a region that overlaps a proposal before it by more than this is left out.
        max_proposals: proposals left for an image.

    Raises:
        ValueError: a value out of range.
    """

    weights: str = "random"
    seed: int = 0
    edge_scale: float = 0.5
    max_side: int = 640
    num_trees: int = len(RULES)
    min_area: int = 60
    max_area: float = 0.9
    overlap_cost: float = 0.3
    max_iou: float = 0.9
    max_proposals: int = 400

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: got an empty text, expected a path, an address or random; leave it out")
        if not 0 < self.edge_scale <= 1:
            raise ValueError(f"edge_scale: got {self.edge_scale}, expected above 0 and at most 1; try 0.5")
        for name, low, high in (
            ("max_side", 16, 100_000),
            ("num_trees", 1, len(RULES)),
            ("min_area", 1, 1_000_000_000),
            ("max_area", 0, 1),
            ("overlap_cost", 0, 10),
            ("max_iou", 0, 1),
            ("max_proposals", 1, 100_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: got {value}, expected {low} to {high}; leave it at the default")


@dataclass(frozen=True)
class Candidates:
    """The regions of all trees of an image, each set of leaves once.

    Attributes:
        table: the leaves.
        trees: the trees over them.
        tree: `[N]` int64, the tree of each region, the first one that has it.
        node: `[N]` int64, its node there.
        areas: `[N]` int64, pixels of the worked-on image.
        features: `[N, F]` float64, as `region_features.NAMES`; `agreement` is the share of the trees that have it.
    """

    table: LeafTable
    trees: Sequence[RegionTree]
    tree: np.ndarray
    node: np.ndarray
    areas: np.ndarray
    features: np.ndarray

    def select(self, rows: np.ndarray) -> Candidates:
        """Return the regions that `rows` (indices, or `[N]` bool) names, in its order."""
        return Candidates(
            self.table, self.trees, self.tree[rows], self.node[rows], self.areas[rows], self.features[rows]
        )

    def list_leaves(self) -> np.ndarray:
        """Return the leaves of each region, `[N, n]` bool."""
        members = np.zeros((len(self.node), len(self.table.graph.sizes)), dtype=bool)
        for index, tree in enumerate(self.trees):
            rows = np.flatnonzero(self.tree == index)
            members[rows] = tree.list_leaves(self.node[rows])
        return members

    def measure_overlaps(self) -> np.ndarray:
        """Return the IoU of each pair of regions, `[N, N]` float32."""
        # float32 counts pixels exactly up to 2^24, far above the worked-on image.
        members = self.list_leaves().astype(np.float32)
        areas = self.areas.astype(np.float32)
        shared = members @ (members * self.table.graph.sizes.astype(np.float32)).T
        return shared / (areas[:, None] + areas[None] - shared)

    def find_parents(self) -> np.ndarray:
        """Return for each region the row of its nearest ancestor among them, in its own tree; -1 if there is none."""
        row_of = [np.full(len(tree), -1, np.int64) for tree in self.trees]
        for row, (tree, node) in enumerate(zip(self.tree, self.node, strict=True)):
            row_of[tree][node] = row
        parents = np.full(len(self.node), -1, np.int64)
        for row, (index, node) in enumerate(zip(self.tree, self.node, strict=True)):
            above = self.trees[index].parent[node]
            while above >= 0 and row_of[index][above] < 0:
                above = self.trees[index].parent[above]
            parents[row] = row_of[index][above] if above >= 0 else -1
        return parents

    def find_boxes(self) -> np.ndarray:
        """Return the bounding box of each region, `[N, 4]` int64: x0, y0, x1, y1, the last two past the end."""
        boxes = np.empty((len(self.node), 4), np.int64)
        for index, tree in enumerate(self.trees):
            rows = np.flatnonzero(self.tree == index)
            boxes[rows] = join_boxes(tree, self.table.boxes)[self.node[rows]][:, [1, 0, 3, 2]]
        return boxes

    def draw(self, size: tuple[int, int]) -> Tensor:
        """Return the masks at the size `(H, W)` of the image, `[N, H, W]` bool."""
        labels = self.table.graph.labels
        if labels.shape != size:
            labels = cv2.resize(labels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
        masks = np.empty((len(self.node), *size), dtype=bool)
        for index, tree in enumerate(self.trees):
            place = np.empty(tree.num_leaves, np.int32)
            place[tree.order] = np.arange(tree.num_leaves, dtype=np.int32)
            pixels = place[labels].astype(np.uint32)
            for row in np.flatnonzero(self.tree == index):
                # A node is a run of leaves: below its start, the difference wraps around to a large number.
                start, stop = (np.uint32(ends[self.node[row]]) for ends in (tree.start, tree.stop))
                np.less(pixels - start, stop - start, out=masks[row])
        return torch.from_numpy(masks)


class ContourProposer(Proposer):
    """Masks of a forest of regions, the best first; `predicted_iou` is the estimate that orders them.

    Args:
        options: contours, trees and limits.
        device: where HED runs, and in which precision; trees are grown on the CPU.
    """

    def __init__(self, options: ContourOptions, device: Device) -> None:
        self.options = options
        self._detector = ContourDetector(options.weights, options.seed, device)

    @property
    def digest(self) -> str:
        """The digests of HED's weights and of the ranking.

        Raises:
            MissingError: there is no such weight file, and none can be fetched.
        """
        return f"{self._detector.digest}+{file_digest(RANKING)}"

    @cached_property
    def _ranker(self) -> RegionRanker:
        return RegionRanker(RANKING)

    def propose(self, sample: Sample) -> Proposals:
        """Return at most `max_proposals` masks, the best first; their parents are those of their trees.

        Raises:
            MissingError: there is no such weight file, and none can be fetched.
            ArtefactError: the weight file does not fit.
        """
        options = self.options
        candidates = self.find_candidates(sample)
        scores = self._ranker.score(candidates.features)
        rows = rank_candidates(candidates, scores, options)
        candidates, scores = candidates.select(rows), scores[rows]
        proposals = Proposals(
            candidates.draw(sample.size),
            torch.from_numpy(scores.astype(np.float32)),
            parents=torch.from_numpy(candidates.find_parents()),
        )
        # Scaling up by the nearest pixel may bring a mask below the limit that its estimated area met.
        return proposals.select(proposals.areas >= options.min_area)

    def find_region(self, sample: Sample, box: PromptBox) -> np.ndarray | None:
        """Return the region of all trees that fits a box, or the best one at a point, `[H, W]` bool.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        candidates = self.find_candidates(sample)
        scores = self._ranker.score(candidates.features)
        height, width = candidates.table.graph.labels.shape
        x0, y0, x1, y1 = np.array(box) * np.tile([width / sample.size[1], height / sample.size[0]], 2)
        row: int | None
        if is_point(box):
            leaf = candidates.table.graph.labels[min(int(y0), height - 1), min(int(x0), width - 1)]
            covers = candidates.list_leaves()[:, leaf]
            row = int(np.where(covers, scores, -np.inf).argmax()) if covers.any() else None
        else:
            row = choose_fitting(candidates.find_boxes(), scores, (x0, y0, x1, y1))
        return None if row is None else candidates.select(np.array([row])).draw(sample.size)[0].numpy()

    def find_candidates(self, sample: Sample) -> Candidates:
        """Return every region of every tree that fits the limits of area."""
        options = self.options
        # Large images are worked on at a smaller size.
        height, width = sample.size
        shrink = min(1.0, options.max_side / max(height, width))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        image = sample.image
        if size != sample.size:
            image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        edge_size = max(1, round(size[0] * options.edge_scale)), max(1, round(size[1] * options.edge_scale))
        contours = self._detector.detect(image, edge_size).cpu().numpy()
        candidates = grow_candidates(image, contours, options.num_trees)
        areas = candidates.areas * (height * width / (size[0] * size[1]))
        return candidates.select((areas >= options.min_area) & (areas <= options.max_area * height * width))


def grow_candidates(image: np.ndarray, contours: np.ndarray, num_trees: int) -> Candidates:
    """Divide an image into regions and merge them.

    Args:
        image: `[h, w, 3]` uint8 RGB.
        contours: `[6, h', w']` float32 in [0, 1], as `ContourDetector.detect` gives them, of any size.
        num_trees: trees, of the first so many rules of `RULES`.
    """
    # Contours and gradient at the image's size, and the basins between them.
    colours = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) / 100
    gradient = measure_gradient(colours)
    height, width = image.shape[:2]
    edges = np.stack([cv2.resize(side, (width, height), interpolation=cv2.INTER_LINEAR) for side in contours], axis=-1)
    fused = edges[..., -1:]
    labels = flood(edges[..., -1] + _GRADIENT_GAIN * gradient)
    maps = np.concatenate([edges, gradient[..., None], fused > _WEAK, fused > _STRONG], axis=-1, dtype=np.float32)
    table = make_leaf_table(build_graph(labels, colours, maps), colours)
    # Every rule grows a tree; the same leaves in several trees are one region.
    trees = [merge_regions(table.graph, rule) for rule in RULES[:num_trees]]
    codes = np.concatenate([tree.sum_leaves(table.codes) for tree in trees])
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    order = np.argsort(first)
    first, counts = first[order], counts[order]
    features = np.concatenate([describe_nodes(table, tree) for tree in trees])[first]
    features[:, NAMES.index("agreement")] = counts / num_trees
    return Candidates(
        table,
        trees,
        np.concatenate([np.full(len(tree), index) for index, tree in enumerate(trees)])[first],
        np.concatenate([np.arange(len(tree)) for tree in trees])[first],
        np.concatenate([tree.sum_leaves(table.graph.sizes) for tree in trees])[first],
        features,
    )


def measure_gradient(colours: np.ndarray) -> np.ndarray:
    """Return the step of colour a pixel, `[h, w]` float32, of `colours` `[h, w, 3]` float32."""
    smooth = cv2.GaussianBlur(colours, (0, 0), _GRADIENT_SIGMA)
    # Divided by 4, Sobel's difference is that between two pixels two apart.
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *axis, ksize=3) / 4 for axis in ((1, 0), (0, 1)))
    return np.sqrt((across**2 + down**2).sum(axis=-1))


def flood(heights: np.ndarray) -> np.ndarray:
    """Return the basins of a map of heights, `[h, w]` int32 from 0, each of them connected; no pixel is left out."""
    from skimage.segmentation import watershed

    heights = cv2.GaussianBlur(heights, (0, 0), _FLOOD_SIGMA)
    square = np.ones((_BASIN_SIDE, _BASIN_SIDE), np.uint8)
    is_lowest = (heights <= cv2.erode(heights, square)).astype(np.uint8)
    _, markers = cv2.connectedComponents(is_lowest, connectivity=4)
    return watershed(heights, markers) - 1


def rank_candidates(candidates: Candidates, scores: np.ndarray, options: ContourOptions) -> np.ndarray:
    """Return the rows of the best regions, at most `max_proposals`, as `order_diversely` orders them.

    Args:
        candidates: `N` regions.
        scores: `[N]` float64, larger is better; of equals, the first row.
        options: `overlap_cost`, `max_iou` and `max_proposals`.
    """
    pool = np.argsort(-scores, kind="stable")[: max(_POOL, options.max_proposals)]
    return pool[order_diversely(scores[pool], candidates.select(pool).measure_overlaps(), options)]


def order_diversely(scores: np.ndarray, overlaps: np.ndarray, options: ContourOptions) -> np.ndarray:
    """Choose regions one after the other: the best score less the cost of its largest overlap with those before it.

    That is maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): the regions that come first are good and
    differ from each other.

    Args:
        scores: `[N]` float64, in descending order.
        overlaps: `[N, N]` float32, the IoU of each pair.
        options: `overlap_cost`, `max_iou` and `max_proposals`.

    Returns:
        `[K]` int64, rows in the order in which they were chosen; of equals, the first row.
    """
    rows: list[int] = []
    largest = np.zeros(len(scores), dtype=np.float32)
    worths = scores.copy()
    while len(rows) < min(options.max_proposals, len(scores)):
        row = int(worths.argmax())
        if worths[row] == -np.inf:
            break
        rows.append(row)
        np.maximum(largest, overlaps[row], out=largest)
        worths = np.where(largest > options.max_iou, -np.inf, scores - options.overlap_cost * largest)
        worths[rows] = -np.inf
    return np.array(rows, dtype=np.int64)
