"""Masks as polygons and back, with holes and several components.

Contours come from `cv2.findContours` with its two-level hierarchy: each outer contour with the holes inside it. No
annotation format of polygons has holes, so every hole is joined to its outer contour by a slit of no width, there and
back along the same line, which leaves one ring for each component and adds nothing to its area. A mask of several
components gives several rings.

Two conventions of coordinates are in use. With *edges*, a ring runs along sides of pixels, and pixel `(x, y)` is the
square from `(x, y)` to `(x + 1, y + 1)`, as in COCO's rasteriser and Label Studio. With *centres*, it runs through the
middle of the outermost pixels, which have integer coordinates, and a reader fills the ring and draws its outline, as
LabelMe does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageDraw

Convention = Literal["edges", "centres"]
MIN_IOU = 0.97
"""Least IoU of simplified polygons with the mask, whatever the tolerance."""
_SQUARE = np.ones((3, 3), np.uint8)


def find_polygons(mask: np.ndarray, tolerance: float = 0.0, convention: Convention = "edges") -> list[np.ndarray]:
    """Return the polygons of a mask, one for each component (pixels that touch at a corner are connected).

    Args:
        mask: `[H, W]` bool.
        tolerance: pixels that a simplified contour may lie off (Douglas-Peucker); 0 keeps every corner. It is halved
            until the polygons, rasterised, have an IoU of `MIN_IOU` with the mask.
        convention: of the coordinates, as the module says.

    Returns:
        `[n, 2]` float64 `(x, y)` each, three points or more, not closed, with an area; none for an empty mask. With
        tolerance 0 and on edges, the pixels whose centre lies inside (even-odd rule) are exactly those of the mask.

    Raises:
        ValueError: not a mask, or a negative tolerance.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask: got {mask.shape} {mask.dtype}, expected [H, W] bool")
    if tolerance < 0:
        raise ValueError(f"tolerance: got {tolerance}, expected 0 or more pixels; try 1")
    components = _contours(mask, convention)
    while True:
        polygons = [_give_area(_join([_simplify(ring, tolerance) for ring in rings])) for rings in components]
        if tolerance == 0 or not polygons:
            return polygons
        if compute_iou(fill_polygons(polygons, (mask.shape[0], mask.shape[1]), convention), mask) >= MIN_IOU:
            return polygons
        tolerance = tolerance / 2 if tolerance > 0.2 else 0.0


def fill_polygons(
    polygons: Sequence[np.ndarray], size: tuple[int, int], convention: Convention = "edges"
) -> np.ndarray:
    """Rasterise polygons of `find_polygons` as the programs that read them do.

    Args:
        polygons: `[n, 2]` float `(x, y)` each.
        size: `(height, width)` of the mask.
        convention: of the coordinates: `edges` as COCO's API, `centres` filled and outlined.

    Returns:
        `[H, W]` bool.
    """
    if convention == "centres":
        canvas = Image.new("1", (size[1], size[0]))
        for polygon in polygons:
            ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in polygon], fill=1, outline=1)
        return np.asarray(canvas, dtype=bool)
    from pycocotools import mask as coco

    if not polygons:
        return np.zeros(size, dtype=bool)
    runs = coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], size[0], size[1])
    return np.asarray(coco.decode(coco.merge(runs)), dtype=bool)


def compute_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two masks, 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def _contours(mask: np.ndarray, convention: Convention) -> list[list[np.ndarray]]:
    """Return the outer contour of each component, then its holes; `[n, 2]` float64 each."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return []
    inside = np.ascontiguousarray(mask[top : top + height, left : left + width]).view(np.uint8)
    scale = 1.0
    if convention == "edges":
        # A grid of pixels (odd rows and columns) and of the edges and corners between them (even ones), where an edge
        # belongs to the mask if a pixel beside it does: contours of that grid run along the edges of pixels.
        grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
        grid[1::2, 1::2] = inside
        inside, scale = cv2.dilate(grid, _SQUARE), 0.5
    contours, hierarchy = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [contour[:, 0].astype(np.float64) * scale + (left, top) for contour in contours]
    parents = hierarchy[0, :, 3]
    return [
        [rings[i], *(rings[j] for j in range(len(rings)) if parents[j] == i)]
        for i in range(len(rings))
        if parents[i] < 0
    ]  # fmt: skip


def _simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the ring without points that lie within the tolerance, or the ring itself if no area would remain."""
    if tolerance == 0:
        return ring
    simple = cv2.approxPolyDP(ring.astype(np.float32)[:, None], tolerance, True)[:, 0].astype(np.float64)
    return simple if _compute_area(simple) else ring


def _give_area(ring: np.ndarray) -> np.ndarray:
    """Return the ring, with a loop of half a pixel at its first point if it has no area.

    The centres of pixels in a row lie on a line, and tools drop or refuse what has no area. Readers that draw outlines
    truncate coordinates, so that the loop lies in the pixel that it begins at.
    """
    if _compute_area(ring):
        return ring
    loop = ring[0] + np.array([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [0.0, 0.5]])
    return loop if len(ring) == 1 else np.concatenate([loop, ring])


def _compute_area(ring: np.ndarray) -> float:
    """Return the area of a ring; what it goes around in opposite directions cancels out."""
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _join(rings: list[np.ndarray]) -> np.ndarray:
    """Return one ring of an outer contour and its holes, each joined at the closest pair of points."""
    outer = rings[0]
    for hole in rings[1:]:
        distances = np.abs(outer[:, None] - hole[None]).sum(2)
        at, start = np.unravel_index(int(distances.argmin()), distances.shape)
        outer = np.concatenate([outer[: at + 1], hole[start:], hole[: start + 1], outer[at:]])
    return outer
