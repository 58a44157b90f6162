"""Counting of pairs of label maps into a confusion matrix, beside the reference implementation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.common import Row, Setting, interleave, require_faster, summarise
from moduseg.datasets.io import read_label_png, write_label_png
from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.pairs import count_pairs
from tests import reference

NUM_LABELS = 21


def write_pairs(
    folder: Path, count: int, height: int = 375, width: int = 500, seed: int = 0
) -> list[tuple[Path, Path]]:
    """Write truths of blobs with ignored ribbons, and predictions a few pixels off with one blob in four wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pairs = []
    for i in range(count):
        truth, prediction = (np.zeros((height, width), np.uint8) for _ in range(2))
        for _ in range(rng.integers(1, 6)):
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            ry, rx = rng.uniform(0.08, 0.5, 2) * (height, width)
            lobes, phase, label = rng.integers(2, 7), rng.uniform(0, 6), rng.integers(1, NUM_LABELS)
            blob = (
                1 + 0.25 * np.sin(np.arctan2(y - cy, x - cx) * lobes + phase)
                >= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
            )
            truth[blob] = label
            moved = np.roll(blob, rng.integers(-6, 7, 2), (0, 1))
            prediction[moved] = label if rng.random() < 0.75 else rng.integers(1, NUM_LABELS)
        ribbon = cv2.morphologyEx(truth, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
        truth[ribbon] = 255
        names = folder / f"truth_{i}.png", folder / f"prediction_{i}.png"
        for path, labels in zip(names, (truth, prediction), strict=True):
            path.write_bytes(write_label_png(labels))
        pairs.append(names)
    return pairs


def count_files(pairs: list[tuple[Path, Path]], workers: int, boundary_width: float = 0.0) -> SplitCounts:
    """Do what scoring does: read, check, count, keep each image's counts."""
    files = {str(i): pair for i, pair in enumerate(pairs)}
    counts = SplitCounts(NUM_LABELS)

    def load(image_id: str) -> tuple[np.ndarray, np.ndarray]:
        truth, prediction = files[image_id]
        return read_label_png(truth), read_label_png(prediction)

    for image_id, image_counts in count_pairs(
        list(files), load, NUM_LABELS, boundary_width=boundary_width, workers=workers
    ):
        if image_counts is not None:
            counts.append(image_id, image_counts)
    return counts


def list_ways(pairs: list[tuple[Path, Path]]) -> dict[str, Callable[[], np.ndarray]]:
    """Return the ways to count all pairs, by name; decoding alone shows its share of the time."""

    def read_only() -> np.ndarray:
        for pair in pairs:
            for path in pair:
                read_label_png(path)
        return np.empty(0)

    return {
        "plain": lambda: reference.confusion_of_files(pairs, NUM_LABELS),
        "one worker": lambda: count_files(pairs, 1).matrix(),
        "two workers": lambda: count_files(pairs, 2).matrix(),
        "decoding alone": read_only,
    }


def evaluation(setting: Setting) -> list[Row]:
    """Measure a thousand pairs of 500 x 375."""
    count, height, width = (10, 60, 80) if setting.is_small else (1000, 375, 500)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder), count, height, width)
        ways = list_ways(pairs)
        expected = ways["plain"]()
        for name, way in ways.items():
            if name != "decoding alone":
                np.testing.assert_array_equal(way(), expected, err_msg=name)
        times = interleave(ways, setting.repeats, torch.device("cpu"))
    title = f"evaluation of {count} pairs of {width}x{height} PNGs"
    share = summarise([a / b for a, b in zip(times["decoding alone"].cpu, times["one worker"].cpu, strict=True)])[
        "median"
    ]
    return [
        require_faster(f"{title}, one process", 1.6, times, "plain", "one worker", share_of_decoding=share),
        require_faster(f"{title}, two workers", 3, times, "plain", "two workers"),
    ]
