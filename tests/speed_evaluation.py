"""How fast pairs of label maps become a confusion matrix, beside the plain way: `python -m tests.speed_evaluation`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from moduseg.datasets.io import read_label_png, write_label_png
from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.pairs import count_pairs
from tests import plain

SIZE = 21


def write_pairs(
    folder: Path, count: int, height: int = 375, width: int = 500, seed: int = 0
) -> list[tuple[Path, Path]]:
    """Truth with blobs, an ignored ribbon around each; predictions a few pixels off, a blob in four mistaken."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pairs = []
    for i in range(count):
        truth, prediction = (np.zeros((height, width), np.uint8) for _ in range(2))
        for _ in range(rng.integers(1, 6)):
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            ry, rx = rng.uniform(0.08, 0.5, 2) * (height, width)
            lobes, phase, label = rng.integers(2, 7), rng.uniform(0, 6), rng.integers(1, SIZE)
            blob = (
                1 + 0.25 * np.sin(np.arctan2(y - cy, x - cx) * lobes + phase)
                >= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
            )
            truth[blob] = label
            moved = np.roll(blob, rng.integers(-6, 7, 2), (0, 1))
            prediction[moved] = label if rng.random() < 0.75 else rng.integers(1, SIZE)
        ribbon = cv2.morphologyEx(truth, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
        truth[ribbon] = 255
        names = folder / f"truth_{i}.png", folder / f"prediction_{i}.png"
        for path, labels in zip(names, (truth, prediction), strict=True):
            path.write_bytes(write_label_png(labels))
        pairs.append(names)
    return pairs


def fast(pairs: list[tuple[Path, Path]], workers: int, boundary_width: float = 0.0) -> SplitCounts:
    """What scoring does: read, check, count, keep each image's counts."""
    files = {str(i): pair for i, pair in enumerate(pairs)}
    counts = SplitCounts(SIZE)

    def load(image_id: str) -> tuple[np.ndarray, np.ndarray]:
        truth, prediction = files[image_id]
        return read_label_png(truth), read_label_png(prediction)

    for image_id, found in count_pairs(list(files), load, SIZE, boundary_width=boundary_width, workers=workers):
        assert found is not None
        counts.append(image_id, found)
    return counts


def measure(pairs: list[tuple[Path, Path]], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds of each way, interleaved: median, least and most of the wall clock, median of all threads' CPU time."""
    reference = plain.confusion_of_files(pairs, SIZE)
    stored = fast(pairs, 1).to_bytes()

    def read_only() -> np.ndarray:
        for pair in pairs:
            for path in pair:
                read_label_png(path)
        return reference

    ways: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: plain.confusion_of_files(pairs, SIZE),
        "one worker": lambda: fast(pairs, 1).matrix(),
        "two workers": lambda: fast(pairs, 2).matrix(),
        "decoding alone": read_only,
        "one worker, with contours": lambda: fast(pairs, 1, 0.02).matrix(),
        "from stored counts": lambda: SplitCounts.from_bytes(stored, "memory").matrix(),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            matrix = way()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert np.array_equal(matrix, reference), name
    return {
        name: {
            "median": median(w for w, _ in times),
            "least": min(w for w, _ in times),
            "most": max(w for w, _ in times),
            "cpu": median(c for _, c in times),
        }
        for name, times in spent.items()
    }


def main() -> None:
    """Measure a thousand pairs of 500 x 375 and print the ratios against the plain way."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder), 1000)
        found = measure(pairs)
        stored = len(fast(pairs, 1, 0.02).to_bytes())
    cv2.setNumThreads(threads)
    base = found["plain"]
    for name, times in found.items():
        ratios = ", ".join(f"{key} {base[key] / times[key]:.2f}x" for key in ("median", "least", "cpu"))
        print(f"{name}: {json.dumps({k: round(v, 3) for k, v in times.items()})} ({ratios})")
    print(f"stored counts: {stored / len(pairs):.0f} bytes an image, contours included")


if __name__ == "__main__":
    main()
