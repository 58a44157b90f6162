"""What the nodes of a region tree look like, in numbers that a small network ranks them by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moduseg.errors import ArtefactError
from moduseg.masks.region_tree import RegionGraph, RegionTree
from moduseg.weights.tensors import load_state

NAMES = (
    "area", "length", "roundness", "fill", "width", "height", "shape", "frame", "top", "bottom", "middle",
    "side1", "side2", "side3", "side4", "side5", "fused", "gradient", "weak", "strong",
    "inside_fused", "inside_gradient", "inside_strong", "level", "kept", "spread", "leaves",
    "sibling_size", "sibling_colour", "image_colour", "chroma", "lightness", "agreement",
)  # fmt: skip
"""The features, in the order of the columns of `describe_nodes`."""
MAPS = ("side1", "side2", "side3", "side4", "side5", "fused", "gradient", "weak", "strong")
"""The maps that a graph's strengths are sums of."""
_MAX_DEVIATION = 5.0
"""Features are taken for no further from their mean, in standard deviations."""


@dataclass(frozen=True)
class LeafTable:
    """What the features of every tree over the same leaves are made of.

    Attributes:
        graph: the leaves, with strengths in the order of `MAPS`.
        colour_squares: `[n]` float64, mean squared length of the pixels' colours.
        boxes: `[n, 4]` int64 top, left, bottom, right, the last two being one past the last pixel.
        frame: `[n]` int64, sides of pixels on the image's frame.
        codes: `[n]` uint64, random numbers whose sums tell sets of leaves apart.
    """

    graph: RegionGraph
    colour_squares: np.ndarray
    boxes: np.ndarray
    frame: np.ndarray
    codes: np.ndarray


def make_leaf_table(graph: RegionGraph, colours: np.ndarray) -> LeafTable:
    """Measure the leaves of a graph; `colours` is `[h, w, D]`, what its mean colours are the means of."""
    labels = graph.labels
    count = len(graph.sizes)
    height, width = labels.shape
    squares = np.bincount(labels.ravel(), weights=(colours.astype(np.float64) ** 2).sum(-1).ravel(), minlength=count)
    boxes = np.empty((count, 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(height, width), 0
    for axis, length in enumerate((height, width)):
        # Leaves present in a row or column: far fewer entries than pixels, and each only once.
        line = np.arange(length)[:, None] if axis == 0 else np.arange(length)[None]
        present = np.unique(labels.astype(np.int64) * length + line)
        leaf, position = np.divmod(present, length)
        np.minimum.at(boxes[:, axis], leaf, position)
        np.maximum.at(boxes[:, axis + 2], leaf, position + 1)
    frame = sum(np.bincount(line, minlength=count) for line in (labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    codes = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    return LeafTable(graph, squares / graph.sizes, boxes, np.asarray(frame), codes)


def describe_nodes(table: LeafTable, tree: RegionTree) -> np.ndarray:
    """Return the features of every node but how many trees agree on it, `[N, F]` float64, columns as `NAMES`.

    Lengths are relative to the root of the image's area, so that a photograph and its half look alike.
    """
    graph = table.graph
    height, width = graph.labels.shape
    unit = float(np.sqrt(height * width))
    # Sums over leaves, and over the borders inside and around.
    area = tree.sum_leaves(graph.sizes).astype(np.float64)
    frame = tree.sum_leaves(table.frame)
    num_leaves = tree.stop - tree.start
    colour = tree.sum_leaves(graph.colours * graph.sizes[:, None]) / area[:, None]
    squares = tree.sum_leaves(table.colour_squares * graph.sizes) / area
    border = np.concatenate([graph.lengths[:, None], graph.strengths], axis=1)
    at_leaf = np.zeros((len(graph.sizes), border.shape[1]))
    for side in range(2):
        np.add.at(at_leaf, graph.pairs[:, side], border)
    inside = tree.sum_inside(graph.pairs, border)
    around = tree.sum_leaves(at_leaf) - 2 * inside
    length = np.maximum(around[:, 0], 0)
    mean_around = around[:, 1:] / np.maximum(length, 1)[:, None]
    mean_inside = inside[:, 1:] / np.maximum(inside[:, :1], 1)
    top, left, bottom, right = join_boxes(tree, table.boxes).T
    # A root has no sibling: it is compared with itself.
    above = np.where(tree.parent < 0, np.arange(len(tree)), tree.parent)
    sibling_area = area[above] - area
    sibling = (colour[above] * area[above, None] - colour * area[:, None]) / np.maximum(sibling_area, 1)[:, None]
    image_colour = graph.colours.T @ graph.sizes / graph.sizes.sum()
    outline = length + frame
    columns = {
        "area": np.log(area / unit**2),
        "length": np.log(np.maximum(length, 1) / unit),
        "roundness": np.log(outline**2 / area),
        "fill": area / ((bottom - top) * (right - left)),
        "width": (right - left) / width,
        "height": (bottom - top) / height,
        "shape": np.log((right - left) / (bottom - top)),
        "frame": frame / outline,
        "top": top / height,
        "bottom": bottom / height,
        "middle": np.abs((left + right) / (2 * width) - 0.5),
        **{name: mean_around[:, i] for i, name in enumerate(MAPS)},
        "inside_fused": mean_inside[:, MAPS.index("fused")],
        "inside_gradient": mean_inside[:, MAPS.index("gradient")],
        "inside_strong": mean_inside[:, MAPS.index("strong")],
        "level": np.log(tree.level[above] + 1e-3),
        "kept": np.log((tree.level + 1e-3) / (tree.level[above] + 1e-3)),
        "spread": np.sqrt(np.maximum(squares - (colour**2).sum(1), 0)),
        "leaves": np.log(num_leaves),
        "sibling_size": np.log(np.maximum(sibling_area, 1) / area),
        "sibling_colour": np.sqrt(((sibling - colour) ** 2).sum(1)) * (sibling_area > 0),
        "image_colour": np.sqrt(((colour - image_colour) ** 2).sum(1)),
        "chroma": np.hypot(colour[:, 1], colour[:, 2]),
        "lightness": colour[:, 0],
        "agreement": np.zeros(len(tree)),
    }
    return np.stack([columns[name] for name in NAMES], axis=1)


def join_boxes(tree: RegionTree, boxes: np.ndarray) -> np.ndarray:
    """Return top, left, bottom and right of each node, `[N, 4]` int64."""
    ends = [tree.extremes(column) for column in boxes.T]
    return np.stack([ends[0][0], ends[1][0], ends[2][1], ends[3][1]], axis=1)


class RegionRanker:
    """A small network that says how well a region fits an object, fitted to photographs with annotated objects.

    Args:
        path: a file with the tensors `mean` and `scale` `[F]` of the features, and `weight_<i>` `[out, in]` and
            `bias_<i>` `[out]` of layer `i` from 0.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> RegionRanker:
        """Return a ranker with these tensors, float64, in place of a file's."""
        ranker = cls(Path())
        ranker.__dict__["_tensors"] = tensors
        return ranker

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        """The tensors, float64.

        Raises:
            ArtefactError: the file is damaged, or made for other features.
        """
        tensors = {name: tensor.double().numpy() for name, tensor in load_state(self._path).items()}
        num_features = tensors.get("mean", np.zeros(0)).size
        if num_features != len(NAMES):
            raise ArtefactError(
                f"{self._path}: got a ranking by {num_features} features, expected {len(NAMES)}; install the package "
                "again, or fit it again"
            )
        return tensors

    def score(self, features: np.ndarray) -> np.ndarray:
        """Return for each region how well it fits an object, `[N]` float64 in (0, 1).

        It is the expectation of what rises from 0 for an IoU of 0.3 to 1 for an IoU of 0.8 with the best object.

        Args:
            features: `[N, F]`, columns as `NAMES`.
        """
        tensors = self._tensors
        values = np.clip((features - tensors["mean"]) / tensors["scale"], -_MAX_DEVIATION, _MAX_DEVIATION)
        num_layers = sum(name.startswith("weight_") for name in tensors)
        for i in range(num_layers):
            values = values @ tensors[f"weight_{i}"].T + tensors[f"bias_{i}"]
            if i < num_layers - 1:
                values = np.maximum(values, 0)
        return 1 / (1 + np.exp(-values[:, 0]))
