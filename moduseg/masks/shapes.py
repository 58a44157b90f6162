"""The shape of masks in a few numbers that do not depend on where a mask lies, for a ranking that is learnt."""

from __future__ import annotations

import cv2
import numpy as np

_NUM_HARMONICS = 8
"""Harmonics of the outline's distance to the centre that are kept: how many corners or arms a shape has."""
_NUM_MOMENTS = 3
"""Hu's moments that are kept; the later ones are noise for masks of some dozen pixels."""

SHAPES = (
    "area", "perimeter", "solidity", "hole", "inner_radius", "radius_spread", "radius_low", "radius_high", "centre",
    *(f"moment_{i}" for i in range(_NUM_MOMENTS)),
    "frame", "fill", "elongation", "roundness",
    *(f"harmonic_{i}" for i in range(1, _NUM_HARMONICS + 1)),
)  # fmt: skip
"""Names of the columns of `describe_shapes`."""


def describe_shapes(masks: np.ndarray) -> np.ndarray:
    """Return the shape of each mask, `[N, len(SHAPES)]` float64; zeros for an empty one.

    Lengths are relative to the root of the mask's area, so that a shape and its double look alike; only `area`, the
    logarithm of the mask's share of the image, tells them apart.

    Args:
        masks: `[N, H, W]` bool.

    Raises:
        ValueError: another shape or dtype.
    """
    if masks.ndim != 3 or masks.dtype != np.bool_:
        raise ValueError(f"masks: got {masks.shape} {masks.dtype}, expected [N, H, W] bool")
    rows = [_describe(mask) if mask.any() else np.zeros(len(SHAPES)) for mask in masks]
    return np.stack(rows) if rows else np.zeros((0, len(SHAPES)))


def _describe(mask: np.ndarray) -> np.ndarray:
    # All but the frame's share and the size of the image is measured in the mask's own box.
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    pixels = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    area = float(pixels.sum())
    unit = np.sqrt(area)
    padded = np.pad(pixels, 1)
    perimeter = np.count_nonzero(padded[1:] != padded[:-1]) + np.count_nonzero(padded[:, 1:] != padded[:, :-1])
    outlines, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.convexHull(np.concatenate(outlines))
    convex = cv2.fillConvexPoly(np.zeros_like(pixels), hull, 1)
    filled = cv2.drawContours(np.zeros_like(pixels), outlines, -1, 1, -1)
    ys, xs = np.nonzero(pixels)
    centre_y, centre_x = ys.mean(), xs.mean()
    outline = max(outlines, key=len)[:, 0]
    radii = np.hypot(outline[:, 0] - centre_x, outline[:, 1] - centre_y)
    mean_radius = max(radii.mean(), 1.0)
    moments = cv2.HuMoments(cv2.moments(pixels, True))[:_NUM_MOMENTS, 0]
    sides = [side + 1 for side in cv2.minAreaRect(hull)[1]]
    circle_radius = cv2.minEnclosingCircle(hull)[1]
    frame = sum(np.count_nonzero(line) for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    return np.array([
        np.log(area / mask.size),
        perimeter / unit,
        area / max(float(convex.sum()), area),
        1 - area / max(float(filled.sum()), area),
        cv2.distanceTransform(padded, cv2.DIST_L2, 3).max() / unit,
        radii.std() / mean_radius,
        np.percentile(radii, 5) / mean_radius,
        np.percentile(radii, 95) / mean_radius,
        float(pixels[round(centre_y), round(centre_x)]),
        *(np.sign(moments) * np.log10(np.abs(moments) + 1e-10)),
        frame / unit,
        area / (sides[0] * sides[1]),
        np.log(max(sides) / min(sides)),
        area / (np.pi * circle_radius**2 + 1),
        *_measure_harmonics(radii),
    ])  # fmt: skip


def _measure_harmonics(radii: np.ndarray) -> np.ndarray:
    """Return how much the distance of an outline to its centre varies once, twice, ... on the way around."""
    harmonics = np.zeros(_NUM_HARMONICS)
    if len(radii) > 2 * _NUM_HARMONICS:
        spectrum = np.abs(np.fft.rfft(radii - radii.mean()))[1 : _NUM_HARMONICS + 1]
        harmonics[:] = spectrum / max(radii.mean() * len(radii), 1.0)
    return harmonics
