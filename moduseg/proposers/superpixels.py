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


@dataclass(frozen=True, kw_only=True)
class SuperpixelOptions:
    """What is segmented, how regions are merged, and which become proposals.

    Attributes:
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

    scales: tuple[float, ...] = (15.0, 50.0)
    spaces: tuple[str, ...] = ("lab",)
    merge_space: str = "hue"
    sigma: float = 0.6
    min_size: int = 20
    min_area: int = 60
    max_area: float = 0.9
    max_iou: float = 0.85
    max_proposals: int = 120
    weights: tuple[float, float, float, float, float] = (2.0, 1.0, 1.0, 1.0, 1.0)
    max_side: int = 400
    merge: bool = True

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales: got {list(self.scales)}, expected numbers above 0; try [15, 50]")
        for name in (*self.spaces, self.merge_space):
            if name not in SPACES:
                raise ValueError(f"spaces, merge_space: got {name!r}, expected one of {', '.join(SPACES)}; try 'lab'")
        if not self.spaces:
            raise ValueError(f"spaces: got none, expected some of {', '.join(SPACES)}; try [lab]")
        for name, low, high in (
            ("sigma", 0, 20),
            ("min_size", 1, 1_000_000),
            ("min_area", 1, 1_000_000_000),
            ("max_area", 0, 1),
            ("max_iou", 0, 1),
            ("max_proposals", 1, 100_000),
            ("max_side", 16, 100_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: got {value}, expected {low} to {high}; leave it at the default")
        if min(self.weights) < 0 or sum(self.weights[:4]) == 0:
            raise ValueError(
                f"weights: got {list(self.weights)}, expected five numbers from 0, not all 0; try 2, 1, 1, 1, 1"
            )


class SuperpixelProposer(Proposer):
    """Masks, the most salient first: nested where merged, else disjoint; every score is 1, for want of an estimate.

    Salience is how unlike its surroundings a region still was when it was merged away, times the root of the colour
    step along its border, times a small power of its area; it decides the order and what `max_proposals` leaves.

    Args:
        options: segmentations, merging and limits.
    """

    def __init__(self, options: SuperpixelOptions) -> None:
        self.options = options

    def propose(self, sample: Sample) -> Proposals:
        """Return at most `max_proposals` masks, in descending salience."""
        from skimage.segmentation import felzenszwalb

        options = self.options
        # Large images are segmented at a smaller size.
        height, width = sample.size
        shrink = min(1.0, options.max_side / max(height, width))
        image = sample.image
        if shrink < 1:
            small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        # Every scale in every colour space is a segmentation of its own.
        view = _convert_colours(image, options.merge_space)
        texture = _bin_texture(image, options.sigma)
        maps, trees = [], []
        for space in options.spaces:
            colours = _convert_colours(image, space)
            for scale in options.scales:
                labels = felzenszwalb(
                    colours, scale=scale, sigma=options.sigma, min_size=options.min_size, channel_axis=-1
                )
                maps.append(labels)
                trees.append(_merge(labels, view, texture, options.weights) if options.merge else _keep_leaves(labels))
        pieces, members = self._select(maps, trees, height * width)
        if shrink < 1:
            pieces = cv2.resize(pieces, (width, height), interpolation=cv2.INTER_NEAREST)
            # Scaling up by the nearest pixel may bring a mask below the limit that its estimated area met.
            pixels = np.bincount(pieces.ravel(), minlength=members.shape[1])
            members = members[members @ pixels >= options.min_area]
        return Proposals(torch.from_numpy(_look_up(members, pieces)))

    def _select(
        self, maps: Sequence[np.ndarray], trees: Sequence[_Tree], num_pixels: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the most salient regions that fit the limits of area and overlap.

        Args:
            maps: `[h, w]` int each, the superpixels of each segmentation.
            trees: the regions of each segmentation.
            num_pixels: pixels of the image, which may be larger than the maps.

        Returns:
            A map of the pieces that all segmentations agree on, `[h, w]` int32, and the pieces of each chosen region,
            `[K, P]` bool, in descending salience (ties: order of the segmentations, then of the regions).
        """
        options = self.options
        pieces, first = _cut_into_pieces(maps)
        piece_area = np.bincount(pieces.ravel()).astype(np.float32)
        salience = np.concatenate([tree.salience for tree in trees])
        size = np.concatenate([tree.size for tree in trees])
        tree_index = np.concatenate([np.full(len(tree.size), i) for i, tree in enumerate(trees)])
        row = np.concatenate([np.arange(len(tree.size)) for tree in trees])
        fits = (size * (num_pixels / pieces.size) >= options.min_area) & (size <= options.max_area * pieces.size)
        order = np.flatnonzero(fits)
        order = order[np.argsort(-salience[order], kind="stable")]
        kept = np.zeros((0, len(piece_area)), dtype=np.float32)
        kept_size = np.zeros(0, dtype=np.float32)
        # Overlaps are counted block by block, because most often the first block fills the list.
        for start in range(0, len(order), 2 * options.max_proposals):
            block = order[start : start + 2 * options.max_proposals]
            members = np.zeros((len(block), len(piece_area)), dtype=np.float32)
            for index, (labels, tree) in enumerate(zip(maps, trees, strict=True)):
                rows = tree_index[block] == index
                members[rows] = tree.leaves[row[block[rows]]][:, labels.ravel()[first]]
            candidates = np.concatenate([kept, members])
            sizes = np.concatenate([kept_size, size[block].astype(np.float32)])
            shared = candidates @ (members * piece_area).T
            iou = shared / (sizes[:, None] + sizes[None, len(kept) :] - shared)
            chosen = list(range(len(kept)))
            for i in range(len(block)):
                if len(chosen) < options.max_proposals and not (iou[chosen, i] > options.max_iou).any():
                    chosen.append(len(kept) + i)
            kept, kept_size = candidates[chosen], sizes[chosen]
            if len(kept) == options.max_proposals:
                break
        return pieces, kept > 0


def _look_up(members: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Return masks `[K, H, W]` bool from their pieces, `[K, P]` bool, and the map of pieces, `[H, W]` int."""
    masks = np.empty((len(members), *pieces.shape), dtype=bool)
    flat = pieces.astype(np.intp)
    for row, mask in zip(members, masks, strict=True):
        # One row of the table at a time stays in the cache; all at once takes six times as long.
        np.take(row, flat, out=mask, mode="clip")
    return masks


def _cut_into_pieces(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cut the image along the borders of all segmentations.

    Returns:
        The pieces, `[h, w]` int32 from 0, and the flat index of the first pixel of each, `[P]`.
    """
    joint = maps[0].astype(np.int64)
    for labels in maps[1:]:
        # Numbered again each time, so that the product of many label counts cannot overflow.
        joint = np.unique(joint * (int(labels.max()) + 1) + labels, return_inverse=True)[1].reshape(joint.shape)
    _, first, inverse = np.unique(joint, return_index=True, return_inverse=True)
    return inverse.reshape(joint.shape).astype(np.int32), first


@dataclass(frozen=True)
class _Tree:
    """Regions of one merge hierarchy.

    Attributes:
        leaves: `[M, n]` bool, the superpixels of each region.
        size: `[M]` float64, their pixels.
        salience: `[M]` float64.
    """

    leaves: np.ndarray
    size: np.ndarray
    salience: np.ndarray


def _convert_colours(image: np.ndarray, space: str) -> np.ndarray:
    """Convert `[H, W, 3]` uint8 RGB to a colour space, as float32 about in [0, 1]."""
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


def _bin_texture(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return the bin of each pixel's lightness gradient by direction and strength, `[H, W]` int."""
    lightness = _convert_colours(image, "lab")[..., 0]
    if sigma > 0:
        lightness = cv2.GaussianBlur(lightness, (0, 0), sigma)
    across = cv2.Sobel(lightness, cv2.CV_32F, 1, 0, ksize=3)
    down = cv2.Sobel(lightness, cv2.CV_32F, 0, 1, ksize=3)
    direction = (np.arctan2(down, across) / (2 * np.pi) + 0.5) * _ORIENTATIONS
    strength = np.digitize(np.hypot(across, down), _MAGNITUDES)
    return (direction.astype(np.int64) % _ORIENTATIONS) * (len(_MAGNITUDES) + 1) + strength


def _keep_leaves(labels: np.ndarray) -> _Tree:
    """Return the superpixels `0..n-1` of `labels` `[H, W]` without merging them; larger ones are more salient."""
    size = np.bincount(labels.ravel()).astype(np.float64)
    return _Tree(np.eye(len(size), dtype=bool), size, size / labels.size)


def _merge(labels: np.ndarray, view: np.ndarray, texture: np.ndarray, weights: Sequence[float]) -> _Tree:
    """Merge neighbours from the most to the least similar, until none are left.

    Args:
        labels: `[H, W]` int, superpixels `0..n-1`.
        view: `[H, W, 3]` float32, colours to compare.
        texture: `[H, W]` int, texture bins.
        weights: weights of colour, texture, size, fill and border.
    """
    table = _RegionTable(labels, view, texture, weights)
    count = table.count
    leaves = np.zeros((2 * count, count), dtype=bool)
    leaves[np.arange(count), np.arange(count)] = True
    borders = _Borders(labels, cv2.GaussianBlur(view, (0, 0), 1.0), count)
    # The heap holds pairs of neighbours, the most similar first.
    similarities = table.compare(borders.first, borders.second, borders.mean_step)
    heap = list(zip((-similarities).tolist(), borders.first.tolist(), borders.second.tolist(), strict=True))
    heapq.heapify(heap)
    is_alive = np.zeros(2 * count, dtype=bool)
    is_alive[:count] = True
    end = np.zeros(2 * count)
    contrast = np.zeros(2 * count)
    for node in range(count):
        contrast[node] = borders.measure_contrast(node)
    level, node = np.inf, count
    while heap:
        negative, i, j = heapq.heappop(heap)
        if not (is_alive[i] and is_alive[j]):
            continue
        level = min(level, -negative)
        is_alive[[i, j]], is_alive[node] = False, True
        end[[i, j]] = level
        table.join(i, j, node)
        leaves[node] = leaves[i] | leaves[j]
        around = borders.join(i, j, node)
        if around:
            others = np.fromiter(around, dtype=np.int64, count=len(around))
            lengths_and_steps = np.array(list(around.values()))
            contrast[node] = borders.measure_contrast(node)
            steps = lengths_and_steps[:, 1] / lengths_and_steps[:, 0]
            values = table.compare(np.full_like(others, node), others, steps)
            for value, other in zip(values.tolist(), others.tolist(), strict=True):
                heapq.heappush(heap, (-value, other, node))
        node += 1
    salience = (sum(weights[:4]) - end) * np.sqrt(contrast + 0.02) * (table.size / labels.size) ** 0.15
    return _Tree(leaves[:node], table.size[:node], salience[:node])


class _RegionTable:
    """Size, colours, texture and bounding box of each region; the rows after the first `count` are filled by `join`."""

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
            self.colour[:count, columns] = _share_of_bins(flat, bins[:, channel], count, _COLOUR_BINS) / 3
        self.texture = np.zeros((rows, _TEXTURES), dtype=np.float32)
        self.texture[:count] = _share_of_bins(flat, texture.ravel(), count, _TEXTURES)
        self.low = np.full((rows, 2), np.iinfo(np.int64).max)
        self.high = np.zeros((rows, 2), dtype=np.int64)
        for axis, position in enumerate(np.divmod(np.arange(flat.size), labels.shape[1])):
            np.minimum.at(self.low[:, axis], flat, position)
            np.maximum.at(self.high[:, axis], flat, position + 1)

    def compare(self, a: np.ndarray, b: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Return the similarity of the regions `a` and `b` (`[P]` rows), `step` being the colour step between them."""
        colour, texture, size, fill, border = self.weights
        joint_share = (self.size[a] + self.size[b]) / self.pixels
        extent = np.maximum(self.high[a], self.high[b]) - np.minimum(self.low[a], self.low[b])
        return (
            colour * np.minimum(self.colour[a], self.colour[b]).sum(1)
            + texture * np.minimum(self.texture[a], self.texture[b]).sum(1)
            + size * (1 - joint_share)
            + fill * (1 - extent.prod(1) / self.pixels + joint_share)
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


def _share_of_bins(labels: np.ndarray, bins: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the share of each bin in each region, `[count, width]` float."""
    table = np.bincount(labels * width + bins, minlength=count * width).reshape(count, width)
    return table / table.sum(1, keepdims=True)


_Neighbours = dict[int, tuple[float, float]]
"""For each neighbour the length of the common border in pixels and the sum of the colour steps along it."""


class _Borders:
    """Which regions touch, how long their borders are, and how far colours step across them.

    Args:
        labels: `[H, W]` int, superpixels `0..count-1`.
        colours: `[H, W, 3]` float32.
        count: number of superpixels; as many merged regions may follow.

    Attributes:
        first, second: `[P]` int, the pairs of superpixels that touch.
        mean_step: `[P]` float64, the mean colour step along the border of each pair.
    """

    def __init__(self, labels: np.ndarray, colours: np.ndarray, count: int) -> None:
        a = np.concatenate([labels[:, :-1].ravel(), labels[:-1].ravel()]).astype(np.int64)
        b = np.concatenate([labels[:, 1:].ravel(), labels[1:].ravel()]).astype(np.int64)
        steps = np.concatenate(
            [np.abs(np.diff(colours, axis=1)).sum(-1).ravel(), np.abs(np.diff(colours, axis=0)).sum(-1).ravel()]
        )
        is_border = a != b
        keys = np.minimum(a, b)[is_border] * count + np.maximum(a, b)[is_border]
        pairs, index = np.unique(keys, return_inverse=True)
        length = np.bincount(index, minlength=len(pairs)).astype(np.float64)
        step = np.bincount(index, weights=steps[is_border], minlength=len(pairs))
        self.first, self.second = np.divmod(pairs, count)
        self.mean_step = step / length
        self._neighbours: list[_Neighbours] = [{} for _ in range(2 * count)]
        columns = (self.first.tolist(), self.second.tolist(), length.tolist(), step.tolist())
        for i, j, pixels, total in zip(*columns, strict=True):
            self._neighbours[i][j] = self._neighbours[j][i] = (pixels, total)

    def join(self, i: int, j: int, node: int) -> _Neighbours:
        """Make `node` the union of the regions `i` and `j`, and return its neighbours."""
        around = self._neighbours[i]
        for other, (pixels, total) in self._neighbours[j].items():
            before = around.get(other, (0.0, 0.0))
            around[other] = (before[0] + pixels, before[1] + total)
        del around[i], around[j]
        self._neighbours[node] = around
        for other, border in around.items():
            self._neighbours[other].pop(i, None)
            self._neighbours[other].pop(j, None)
            self._neighbours[other][node] = border
        return around

    def measure_contrast(self, node: int) -> float:
        """Return the mean colour step along a region's border; 0 for a region without neighbours."""
        around = self._neighbours[node]
        pixels = sum(border[0] for border in around.values())
        return sum(border[1] for border in around.values()) / pixels if pixels else 0.0
