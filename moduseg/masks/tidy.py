"""Tidy label maps for people who go on working with them: smooth outlines, closed holes, no specks.

Published rows are scored without it.
"""

from __future__ import annotations

import cv2
import numpy as np

from moduseg.structures import IGNORE_INDEX


def tidy_label_map(
    label_map: np.ndarray, *, min_object_area: int = 0, max_hole_area: int = 0, smoothing_radius: int = 0
) -> np.ndarray:
    """Smooth the outlines of a label map, then close holes, then remove small objects; 0 leaves a step out.

    Args:
        label_map: `[H, W]` uint8, 0 background, 255 unknown, which is smoothed like a class and else stays.
        min_object_area: smaller objects get the label around them, see `remove_small_objects`; pixels.
        max_hole_area: holes of at most this size are closed, see `close_holes`; pixels.
        smoothing_radius: of the disc in which labels are counted, see `smooth_outlines`; pixels.

    Returns:
        `[H, W]` uint8; the map itself if there is nothing to do.
    """
    if smoothing_radius > 0 and label_map.size:
        label_map = smooth_outlines(label_map, smoothing_radius)
    # Before small objects: an object is as large as with its holes closed.
    if max_hole_area > 0:
        label_map = close_holes(label_map, max_hole_area)
    if min_object_area > 0:
        label_map = remove_small_objects(label_map, min_object_area)
    return label_map


def smooth_outlines(label_map: np.ndarray, radius: int) -> np.ndarray:
    """Give each pixel the label of most pixels of the disc around it.

    Corners are rounded and what is thinner than the radius goes; a straight outline stays where it is. No label is
    preferred, so that an outline between two classes is smoothed like one to the background.

    Args:
        label_map: `[H, W]` uint8.
        radius: of the disc in pixels, 1 or more; pixels outside the image have no label.

    Returns:
        `[H, W]` uint8. Of equally frequent labels, the pixel's own; if it is not among them, the smallest.
    """
    offsets = np.arange(-radius, radius + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    smoothed = np.zeros_like(label_map)
    highest = np.zeros(label_map.shape, dtype=np.float32)
    for label in np.unique(label_map):
        is_label = label_map == label
        # Rounded, as large discs are counted by Fourier transforms. An own label is half a pixel ahead of its equals.
        counts = cv2.filter2D(is_label.astype(np.float32), -1, disc, borderType=cv2.BORDER_CONSTANT)
        counts = np.rint(counts) + 0.5 * is_label
        is_higher = counts > highest
        smoothed[is_higher] = label
        highest[is_higher] = counts[is_higher]
    return smoothed


def close_holes(label_map: np.ndarray, max_area: int) -> np.ndarray:
    """Give small background regions inside objects the label around them.

    Args:
        label_map: `[H, W]` uint8, 0 background.
        max_area: a hole is a region of background, its pixels joined along their sides, that does not touch the border
            of the image and has at most this many pixels.

    Returns:
        `[H, W]` uint8. A hole gets the label of most of the pixels along its sides; of equally frequent ones, the
        smallest.
    """
    regions, areas = _number_regions(label_map == 0, connectivity=4)
    # Region 0 is what is not background.
    is_hole = np.full(len(areas), False)
    is_hole[1:] = areas[1:] <= max_area
    for edge in (regions[:1], regions[-1:], regions[:, :1], regions[:, -1:]):
        is_hole[edge] = False
    return _absorb(label_map, np.where(is_hole[regions], regions, 0))


def remove_small_objects(label_map: np.ndarray, min_area: int) -> np.ndarray:
    """Give small objects the label around them, so that a speck on a class joins the class, others the background.

    Args:
        label_map: `[H, W]` uint8, 0 background, 255 unknown; neither is an object.
        min_area: an object is a connected region of one class, corners included; smaller ones go, in pixels.

    Returns:
        `[H, W]` uint8. An object gets the label of most of the pixels along its sides that belong to no small object;
        of equally frequent ones, the smallest. Small objects that touch no other pixels wait until their neighbours
        have been decided; where no pixel is left to decide by, they become background.
    """
    while True:
        small, count = _number_small_objects(label_map, min_area)
        if count == 0:
            return label_map
        absorbed = _absorb(label_map, small)
        if np.array_equal(absorbed, label_map):
            return np.where(small > 0, np.uint8(0), label_map)
        label_map = absorbed


def _number_small_objects(label_map: np.ndarray, min_area: int) -> tuple[np.ndarray, int]:
    """Return `[H, W]` int32 with a number from 1 for each object under `min_area`, 0 elsewhere, and how many."""
    numbers, count = np.zeros(label_map.shape, dtype=np.int32), 0
    for label in np.unique(label_map):
        if label in (0, IGNORE_INDEX):
            continue
        regions, areas = _number_regions(label_map == label, connectivity=8)
        is_small = np.full(len(areas), False)
        is_small[1:] = areas[1:] < min_area
        new_numbers = np.where(is_small, count + np.cumsum(is_small), 0).astype(np.int32)
        numbers = np.maximum(numbers, new_numbers[regions])
        count += int(is_small.sum())
    return numbers, count


def _absorb(label_map: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Give each region the label of most of the pixels along its sides that are in no region.

    Args:
        label_map: `[H, W]` uint8.
        regions: `[H, W]` integers, the region of each pixel, 0 for none.

    Returns:
        `[H, W]` uint8; of equally frequent labels the smallest, and a region without such a pixel keeps its label.
    """
    codes = []
    for inside, outside in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:-1, :], np.s_[1:, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        is_side = (regions[inside] > 0) & (regions[outside] == 0)
        codes.append(regions[inside][is_side].astype(np.int64) * 256 + label_map[outside][is_side])
    # Pairs of region and label that occur: noise has a region for every few pixels, and hardly a label of each.
    pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
    region_of, label_of = np.divmod(pairs, 256)
    order = np.lexsort((label_of, -counts, region_of))
    decided, first = np.unique(region_of[order], return_index=True)
    new_labels = np.full(int(regions.max(initial=0)) + 1, -1, dtype=np.int16)
    new_labels[decided] = label_of[order][first]
    label_by_pixel = new_labels[regions]
    return np.where(label_by_pixel >= 0, label_by_pixel, label_map).astype(np.uint8)


def _number_regions(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the connected regions of a mask: `[H, W]` int32 numbers from 1, 0 outside, and `[R + 1]` pixels of each.

    Args:
        mask: `[H, W]` bool.
        connectivity: 4 joins pixels along their sides, 8 at their corners too.
    """
    if not mask.size:  # which OpenCV does not survive
        return np.zeros(mask.shape, dtype=np.int32), np.zeros(1, dtype=np.int32)
    pixels = np.ascontiguousarray(mask).view(np.uint8)
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(pixels, connectivity=connectivity)
    return regions, statistics[:, cv2.CC_STAT_AREA]
