"""Purification of a label map beside an erosion class by class."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.common import Row, Setting, interleave, require_faster
from moduseg.bank.purification import purify
from tests import reference

KERNEL, ITERATIONS = 3, 20


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
