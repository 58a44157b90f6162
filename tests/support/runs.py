"""A pipeline small enough for a test: oracles on a few scenes, a random backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moduseg.datasets.io import read_label_png

ORACLES = ("proposer=ground_truth", "pseudo_masks=ground_truth", "backbone=miniature_random")


def overrides(outputs: Path, *more: str, train: int = 6, val: int = 4, world: Path | None = None) -> list[str]:
    """Overrides of the default configuration; the scenes are drawn into `world` (default: `outputs`)."""
    root = (world or outputs) / f"world-{train}-{val}"
    return [
        *ORACLES,
        f"runtime.outputs={outputs}",
        "runtime.device=cpu",
        f"dataset.root={root}",
        f"dataset.train={train}",
        f"dataset.val={val}",
        "runtime.record_size=2",
        "retrieval.top_k=1",
        "evaluation.bootstrap=50",
        "evaluation.panels=2",
        "evaluation.report=false",
        *more,
    ]


RESULTS = (
    "masks/",
    "maps/",
    "labels/",
    "vectors/",
    "bank.safetensors",
    "confusion.safetensors",
    "fit.safetensors",
    "failures.jsonl",
    "panels/",
)


def result_bytes(outputs: Path) -> dict[str, bytes]:
    """What has to be the same however a run came about: everything but records of times and versions."""
    found = {}
    for path in sorted(outputs.rglob("*")):
        relative = path.relative_to(outputs).as_posix()
        is_copy = "world-" in relative or "/latest/" in relative
        if path.is_file() and any(f"/{part}" in f"/{relative}" for part in RESULTS) and not is_copy:
            found[relative] = path.read_bytes()
    return found


def read_labels(folder: Path) -> dict[str, np.ndarray]:
    """Return the label maps of a stage's folder, id -> `[H, W]` uint8."""
    return {path.stem: read_label_png(path) for path in sorted((folder / "labels").glob("*.png"))}
