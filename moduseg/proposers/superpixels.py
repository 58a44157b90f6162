"""Proposals without a model: graph superpixels at several scales, merged step by step as selective search does.

Felzenszwalb and Huttenlocher's segmentation (IJCV 2004) gives regions; the two most similar neighbours are merged,
again and again (Uijlings et al., Selective Search, IJCV 2013), and every region on the way is a proposal. All of it
works on region tables; masks are made once, at the end, by one look-up in the label map.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from moduseg.proposers.base import Proposer
from moduseg.structures import Proposals, Sample

SPACES = ("rgb", "lab", "hue")
_COLOUR_BINS = 20
_ORIENTATIONS = 8
_MAGNITUDES = np.array([0.05, 0.15, 0.4])
_TEXTURES = _ORIENTATIONS * (len(_MAGNITUDES) + 1)
_EDGE_GAIN = 6.0
"""Brings the mean colour step across a border, about 0.02 to 0.2, to the range of the similarities."""


class SuperpixelProposer(Proposer):
    """Masks, the most salient first: nested where merged, else disjoint; every score is 1, for want of an estimate.

    Salience is how unlike its surroundings a region still was when it was merged away, times the root of the colour
    step along its border, times a small power of its area; it decides the order and what `max_proposals` leaves.

    Args:
        scales: Felzenszwalb scales, each larger than 0, as in scikit-image on colours in [0, 1]; larger gives larger
            regions.
        spaces: colour spaces to segment in, of `rgb`, `lab` and `hue` (CIELAB with little lightness and even
            saturation, so that shading and stripes divide objects less). Each is combined with each scale.
        merge_space: colour space in which regions are compared.
        sigma: blur before the segmentation, in pixels of the worked-on image.
        min_size: smallest superpixel, in pixels of the worked-on image.
        min_area: smallest proposal, in pixels of the image.
        max_area: largest proposal, as a fraction of the image.
        max_iou: of two proposals that overlap more than this, the less salient one is left out.
        max_proposals: proposals left for an image.
        weights: what counts in a merge: likeness of colours, of textures, small size, a well-filled box, and (against
            it) the colour step along the common border.
        max_side: an image with a longer side is segmented at this size, and the masks are scaled up.
        merge: `False` leaves the superpixels as they are, the largest first; with one scale and space the proposals are
            then disjoint, and the merging options count for nothing.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        scales: tuple[float, ...] = (15.0, 50.0),
        spaces: tuple[str, ...] = ("lab",),
        merge_space: str = "hue",
        sigma: float = 0.6,
        min_size: int = 20,
        min_area: int = 60,
        max_area: float = 0.9,
        max_iou: float = 0.85,
        max_proposals: int = 120,
        weights: tuple[float, float, float, float, float] = (2.0, 1.0, 1.0, 1.0, 1.0),
        max_side: int = 400,
        merge: bool = True,
    ) -> None:
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales: got {list(scales)}, expected numbers above 0; try [15, 50]")
        for name in (*spaces, merge_space):
            if name not in SPACES:
                raise ValueError(f"spaces, merge_space: got {name!r}, expected one of {', '.join(SPACES)}; try 'lab'")
        if not spaces:
            raise ValueError(f"spaces: got none, expected some of {', '.join(SPACES)}; try [lab]")
        for name, value, low, high in (
            ("sigma", sigma, 0, 20),
            ("min_size", min_size, 1, 1_000_000),
            ("min_area", min_area, 1, 1_000_000_000),
            ("max_area", max_area, 0, 1),
            ("max_iou", max_iou, 0, 1),
            ("max_proposals", max_proposals, 1, 100_000),
            ("max_side", max_side, 16, 100_000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}: got {value}, expected {low} to {high}; leave it at the default")
        if min(weights) < 0 or sum(weights[:4]) == 0:
            raise ValueError(
                f"weights: got {list(weights)}, expected five numbers from 0, not all 0; try 2, 1, 1, 1, 1"
            )
        self.scales = scales
        self.spaces = spaces
        self.merge_space = merge_space
        self.sigma = sigma
        self.min_size = min_size
        self.min_area = min_area
        self.max_area = max_area
        self.max_iou = max_iou
        self.max_proposals = max_proposals
        self.weights = weights
        self.max_side = max_side
        self.merge = merge

    def propose(self, sample: Sample) -> Proposals:
        """At most `max_proposals` masks, in descending salience."""
        from skimage.segmentation import felzenszwalb

        height, width = sample.size
        shrink = min(1.0, self.max_side / max(height, width))
        image = sample.image
        if shrink < 1:
            small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        view = _view(image, self.merge_space)
        texture = _texture(image, self.sigma)
        maps, trees = [], []
        for space in self.spaces:
            colours = _view(image, space)
            for scale in self.scales:
                labels = felzenszwalb(colours, scale=scale, sigma=self.sigma, min_size=self.min_size, channel_axis=-1)
                maps.append(labels)
                trees.append(_merge(labels, view, texture, self.weights) if self.merge else _leaves(labels))
        pieces, members = self._select(maps, trees, height * width)
        if shrink < 1:
            pieces = cv2.resize(pieces, (width, height), interpolation=cv2.INTER_NEAREST)
        masks = torch.from_numpy(members)[:, torch.from_numpy(pieces).long()]
        # Scaling up by the nearest pixel may bring a mask below the limit that its estimated area met.
        proposals = Proposals(masks)
        return proposals.select(proposals.areas >= self.min_area) if shrink < 1 else proposals

    def _select(self, maps: Sequence[np.ndarray], trees: Sequence[_Tree], pixels: int) -> tuple[np.ndarray, np.ndarray]:
        """A map of the pieces that all segmentations agree on (`[h, w]` int32), and which each kept region has."""
        joint = maps[0].astype(np.int64)
        for labels in maps[1:]:
            # Numbered anew each time, so that the product of many label counts cannot overflow.
            joint = np.unique(joint * (int(labels.max()) + 1) + labels, return_inverse=True)[1].reshape(joint.shape)
        _, first, inverse = np.unique(joint, return_index=True, return_inverse=True)
        pieces = inverse.reshape(joint.shape).astype(np.int32)
        area = np.bincount(pieces.ravel()).astype(np.float32)

        salience = np.concatenate([tree.salience for tree in trees])
        size = np.concatenate([tree.size for tree in trees])
        owner = np.concatenate([np.full(len(tree.size), i) for i, tree in enumerate(trees)])
        row = np.concatenate([np.arange(len(tree.size)) for tree in trees])
        fits = (size * (pixels / joint.size) >= self.min_area) & (size <= self.max_area * joint.size)
        order = np.flatnonzero(fits)
        order = order[np.argsort(-salience[order], kind="stable")]
        kept = np.zeros((0, len(area)), dtype=np.float32)
        kept_size = np.zeros(0, dtype=np.float32)
        # Overlaps are counted a block at a time: most often the first block fills the list.
        for start in range(0, len(order), 2 * self.max_proposals):
            block = order[start : start + 2 * self.max_proposals]
            members = np.zeros((len(block), len(area)), dtype=np.float32)
            for index, (labels, tree) in enumerate(zip(maps, trees, strict=True)):
                mine = owner[block] == index
                members[mine] = tree.leaves[row[block[mine]]][:, labels.ravel()[first]]
            everything = np.concatenate([kept, members])
            sizes = np.concatenate([kept_size, size[block].astype(np.float32)])
            shared = everything @ (members * area).T
            iou = shared / (sizes[:, None] + sizes[None, len(kept) :] - shared)
            chosen = list(range(len(kept)))
            for i in range(len(block)):
                if len(chosen) < self.max_proposals and not (iou[chosen, i] > self.max_iou).any():
                    chosen.append(len(kept) + i)
            kept, kept_size = everything[chosen], sizes[chosen]
            if len(kept) == self.max_proposals:
                break
        return pieces, kept > 0


@dataclass
class _Tree:
    """Regions of one merge hierarchy: `leaves` `[M, n]` bool (superpixels of each), `size` and `salience` `[M]`."""

    leaves: np.ndarray
    size: np.ndarray
    salience: np.ndarray


def _view(image: np.ndarray, space: str) -> np.ndarray:
    """`[H, W, 3]` uint8 RGB in a colour space, as float32 about in [0, 1]."""
    rgb = image.astype(np.float32) / 255
    if space == "rgb":
        return rgb
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB) / 100
    if space == "hue":
        chroma = np.hypot(lab[..., 1], lab[..., 2])[..., None]
        lab[..., 1:] *= 0.35 / np.sqrt(0.5 * chroma + 0.02)
        lab[..., 0] *= 0.2
    lab[..., 1:] += 0.5
    return lab


def _texture(image: np.ndarray, sigma: float) -> np.ndarray:
    """`[H, W]` int, the bin of each pixel's lightness gradient by direction and strength."""
    lightness = _view(image, "lab")[..., 0]
    if sigma > 0:
        lightness = cv2.GaussianBlur(lightness, (0, 0), sigma)
    across = cv2.Sobel(lightness, cv2.CV_32F, 1, 0, ksize=3)
    down = cv2.Sobel(lightness, cv2.CV_32F, 0, 1, ksize=3)
    direction = (np.arctan2(down, across) / (2 * np.pi) + 0.5) * _ORIENTATIONS
    strength = np.digitize(np.hypot(across, down), _MAGNITUDES)
    return (direction.astype(np.int64) % _ORIENTATIONS) * (len(_MAGNITUDES) + 1) + strength


def _leaves(labels: np.ndarray) -> _Tree:
    """The superpixels `0..n-1` of `labels` `[H, W]` themselves; the larger, the more salient."""
    size = np.bincount(labels.ravel()).astype(np.float64)
    return _Tree(np.eye(len(size), dtype=bool), size, size / labels.size)


def _merge(labels: np.ndarray, view: np.ndarray, texture: np.ndarray, weights: Sequence[float]) -> _Tree:
    """Merge neighbours from the most to the least similar, until none are left.

    Args:
        labels: `[H, W]` int, superpixels `0..n-1`.
        view: `[H, W, 3]` float32, colours to compare.
        texture: `[H, W]` int, texture bins.
        weights: of colour, texture, size, fill and border.
    """
    table = _Table(labels, view, texture, weights)
    count = table.count
    leaves = np.zeros((2 * count, count), dtype=bool)
    leaves[np.arange(count), np.arange(count)] = True
    neighbours, pairs = _borders(labels, cv2.GaussianBlur(view, (0, 0), 1.0), count)
    first, second, length, step = pairs
    heap = list(
        zip((-table.similarity(first, second, step / length)).tolist(), first.tolist(), second.tolist(), strict=True)
    )
    heapq.heapify(heap)
    alive = np.zeros(2 * count, dtype=bool)
    alive[:count] = True
    end = np.zeros(2 * count)
    contrast = np.zeros(2 * count)
    for node in range(count):
        contrast[node] = _mean_step(neighbours[node])
    level, node = np.inf, count
    while heap:
        negative, i, j = heapq.heappop(heap)
        if not (alive[i] and alive[j]):
            continue
        level = min(level, -negative)
        alive[[i, j]], alive[node] = False, True
        end[[i, j]] = level
        table.join(i, j, node)
        leaves[node] = leaves[i] | leaves[j]
        around = neighbours[i]
        for other, (pixels, total) in neighbours[j].items():
            before = around.get(other, (0.0, 0.0))
            around[other] = (before[0] + pixels, before[1] + total)
        del around[i], around[j]
        neighbours[node] = around
        if around:
            for other, border in around.items():
                neighbours[other].pop(i, None)
                neighbours[other].pop(j, None)
                neighbours[other][node] = border
            others = np.fromiter(around, dtype=np.int64, count=len(around))
            borders = np.array(list(around.values()))
            contrast[node] = _mean_step(around)
            values = table.similarity(np.full_like(others, node), others, borders[:, 1] / borders[:, 0])
            for value, other in zip(values.tolist(), others.tolist(), strict=True):
                heapq.heappush(heap, (-value, other, node))
        node += 1
    salience = (sum(weights[:4]) - end) * np.sqrt(contrast + 0.02) * (table.size / labels.size) ** 0.15
    return _Tree(leaves[:node], table.size[:node], salience[:node])


class _Table:
    """What is known of each region; the rows after the first `count` are filled by `join`."""

    def __init__(self, labels: np.ndarray, view: np.ndarray, texture: np.ndarray, weights: Sequence[float]) -> None:
        flat = labels.ravel()
        self.count = count = int(flat.max()) + 1
        self.pixels, self.weights = flat.size, weights
        bins = np.clip((view * _COLOUR_BINS).astype(np.int64), 0, _COLOUR_BINS - 1).reshape(-1, 3)
        rows = 2 * count
        self.size = np.zeros(rows)
        self.size[:count] = np.bincount(flat, minlength=count)
        self.colour = np.zeros((rows, 3 * _COLOUR_BINS), dtype=np.float32)
        for channel in range(3):
            columns = slice(channel * _COLOUR_BINS, (channel + 1) * _COLOUR_BINS)
            self.colour[:count, columns] = _histogram(flat, bins[:, channel], count, _COLOUR_BINS) / 3
        self.texture = np.zeros((rows, _TEXTURES), dtype=np.float32)
        self.texture[:count] = _histogram(flat, texture.ravel(), count, _TEXTURES)
        self.low = np.full((rows, 2), np.iinfo(np.int64).max)
        self.high = np.zeros((rows, 2), dtype=np.int64)
        for axis, position in enumerate(np.divmod(np.arange(flat.size), labels.shape[1])):
            np.minimum.at(self.low[:, axis], flat, position)
            np.maximum.at(self.high[:, axis], flat, position + 1)

    def similarity(self, a: np.ndarray, b: np.ndarray, step: np.ndarray) -> np.ndarray:
        """How like the regions `a` and `b` (`[P]` rows) are, with the mean colour `step` between them."""
        colour, texture, size, fill, border = self.weights
        both = (self.size[a] + self.size[b]) / self.pixels
        extent = np.maximum(self.high[a], self.high[b]) - np.minimum(self.low[a], self.low[b])
        return (
            colour * np.minimum(self.colour[a], self.colour[b]).sum(1)
            + texture * np.minimum(self.texture[a], self.texture[b]).sum(1)
            + size * (1 - both)
            + fill * (1 - extent.prod(1) / self.pixels + both)
            - border * np.minimum(step * _EDGE_GAIN, 1)
        )

    def join(self, i: int, j: int, node: int) -> None:
        """Fill row `node` with the union of `i` and `j`."""
        self.size[node] = self.size[i] + self.size[j]
        share = self.size[i] / self.size[node]
        for values in (self.colour, self.texture):
            values[node] = values[i] * share + values[j] * (1 - share)
        self.low[node] = np.minimum(self.low[i], self.low[j])
        self.high[node] = np.maximum(self.high[i], self.high[j])


def _histogram(labels: np.ndarray, bins: np.ndarray, count: int, width: int) -> np.ndarray:
    """`[count, width]` float, the share of each bin in each region."""
    table = np.bincount(labels * width + bins, minlength=count * width).reshape(count, width)
    return table / table.sum(1, keepdims=True)


_Neighbours = dict[int, tuple[float, float]]
"""For each neighbour the length of the common border in pixels and the sum of the colour steps along it."""


def _borders(
    labels: np.ndarray, colours: np.ndarray, count: int
) -> tuple[list[_Neighbours], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Neighbours of each region (with room for the merged ones), and the pairs: rows, border length, sum of steps."""
    a = np.concatenate([labels[:, :-1].ravel(), labels[:-1].ravel()]).astype(np.int64)
    b = np.concatenate([labels[:, 1:].ravel(), labels[1:].ravel()]).astype(np.int64)
    steps = np.concatenate(
        [np.abs(np.diff(colours, axis=1)).sum(-1).ravel(), np.abs(np.diff(colours, axis=0)).sum(-1).ravel()]
    )
    border = a != b
    keys = np.minimum(a, b)[border] * count + np.maximum(a, b)[border]
    pairs, index = np.unique(keys, return_inverse=True)
    length = np.bincount(index, minlength=len(pairs)).astype(np.float64)
    step = np.bincount(index, weights=steps[border], minlength=len(pairs))
    first, second = np.divmod(pairs, count)
    neighbours: list[_Neighbours] = [{} for _ in range(2 * count)]
    for i, j, pixels, total in zip(first.tolist(), second.tolist(), length.tolist(), step.tolist(), strict=True):
        neighbours[i][j] = neighbours[j][i] = (pixels, total)
    return neighbours, (first, second, length, step)


def _mean_step(around: _Neighbours) -> float:
    """Mean colour step along a region's border; 0 for one without neighbours."""
    pixels = sum(border[0] for border in around.values())
    return sum(border[1] for border in around.values()) / pixels if pixels else 0.0
