"""Purification of a label map beside an erosion class by class."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from benchmarks.common import Row, Setting, interleave, require_faster
from moduseg.bank.purification import class_regions, purify
from moduseg.structures import IGNORE_INDEX
from tests import reference

KERNEL, ITERATIONS, MIN_AREA = 3, 20, 300


def make_label_map(classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return `[H, W]` uint8: convex cells of `classes` labels, background among them, and an ignored ribbon."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform([0, 0], [height, width], (max(classes, 6), 2))
    y, x = np.mgrid[:height, :width]
    distances = (y[None] - centres[:, :1, None]) ** 2 + (x[None] - centres[:, 1:, None]) ** 2
    labels = (distances.argmin(0) % classes).astype(np.uint8)
    labels[height // 2, : width // 2] = 255
    return labels


def purification(setting: Setting) -> list[Row]:
    """Measure twenty classes, and four as in a photograph."""
    height, width = (40, 60) if setting.is_small else (375, 500)
    rows = []
    for classes, min_ratio in ((20, 5.0), (4, 1.0)):
        labels = make_label_map(classes, height, width)
        tensor = torch.from_numpy(labels).to(setting.device)
        np.testing.assert_array_equal(
            purify(tensor, KERNEL, ITERATIONS).cpu().numpy(), reference.purify(labels, KERNEL, ITERATIONS)
        )
        times = interleave(
            {
                "cv2.erode per class": lambda labels=labels: reference.purify(labels, KERNEL, ITERATIONS),  # type: ignore[misc]
                "ours": lambda tensor=tensor: purify(tensor, KERNEL, ITERATIONS),  # type: ignore[misc]
            },
            setting.repeats,
            setting.device,
        )
        title = f"purification, {classes} classes, {height}x{width}"
        rows.append(require_faster(title, min_ratio, times, "cv2.erode per class", "ours"))
    return rows


def find_regions_plainly(label_map: np.ndarray, iterations: int, min_area: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and masks of the classes that are there, each eroded by itself."""
    kernel, class_ids, masks = np.ones((KERNEL, KERNEL), np.uint8), [], []
    for value in np.flatnonzero(np.bincount(label_map.ravel(), minlength=256)).tolist():
        if value == IGNORE_INDEX:
            continue
        mask = cv2.erode((label_map == value).view(np.uint8), kernel, iterations=iterations)
        if cv2.countNonZero(mask) >= min_area:
            class_ids.append(value)
            masks.append(mask.view(bool))
    return np.array(class_ids), np.stack(masks)


def regions(setting: Setting) -> list[Row]:
    """Measure purification together with the regions that it leaves, of masks of one to four classes, as VOC has."""
    height, width, iterations, min_area = (40, 60, 2, 9) if setting.is_small else (375, 500, ITERATIONS, MIN_AREA)
    return [_measure_regions(make_label_map(n, height, width), iterations, min_area, setting) for n in (1, 2, 4)]


def _measure_regions(labels: np.ndarray, iterations: int, min_area: int, setting: Setting) -> Row:
    tensor = torch.from_numpy(labels).to(setting.device)

    def find_regions() -> tuple[torch.Tensor, torch.Tensor]:
        return class_regions(purify(tensor, KERNEL, iterations), min_area)

    expected = find_regions_plainly(labels, iterations, min_area)
    for ours, plain in zip(find_regions(), expected, strict=True):
        np.testing.assert_array_equal(ours.cpu().numpy(), plain)
    base = "a loop over the classes"
    ways = {base: lambda: find_regions_plainly(labels, iterations, min_area), "ours": find_regions}
    times = interleave(ways, max(setting.repeats, 21), setting.device)
    present = len(np.unique(labels[labels != IGNORE_INDEX]))
    title = f"purification and class regions, classes {present}, {labels.shape[0]}x{labels.shape[1]}"
    return require_faster(title, 1.0, times, base, "ours")
