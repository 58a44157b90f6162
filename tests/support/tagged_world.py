"""Scenes of the embedded world as folders of one's own: images, tags, masks, class names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from moduseg.datasets.io import write_label_png, write_rgb_png
from moduseg.files import write_atomic
from moduseg.miniature.world.scenes import CLASSES, Scene, WorldConfig, render_scene

NEW = "red star"
"""The class that tests withhold."""
ORACLE = ("proposer=ground_truth", "pseudo_masks=ground_truth")
CLIP = ("proposer=superpixels", "pseudo_masks=clip_dense")


@lru_cache(maxsize=64)
def scene(index: int, size: int = 64) -> Scene:
    return render_scene(0, "train", index, WorldConfig(size=size, max_objects=3))


def holding(name: str, count: int, yes: bool = True, size: int = 64) -> list[int]:
    """The first scenes that show a class, or do not."""
    label = CLASSES.index(name)
    found: list[int] = []
    index = 0
    while len(found) < count:
        if (label in scene(index, size).labels) == yes:
            found.append(index)
        index += 1
    return found


def write_folder(
    root: Path, indices: Sequence[int], classes: Sequence[str] = CLASSES, size: int = 64, masks: bool = True
) -> Path:
    """`images/`, `labels.csv`, `classes.txt`, `train.txt` in the order of `indices`, and `masks/` in these classes."""
    to_new = np.zeros(len(CLASSES), np.uint8)
    for new, name in enumerate(classes):
        to_new[CLASSES.index(name)] = new
    lines = ["image,labels"]
    for index in indices:
        drawn = scene(index, size)
        write_atomic(root / "images" / f"{image_id(index)}.png", write_rgb_png(drawn.image))
        if masks:
            write_atomic(root / "masks" / f"{image_id(index)}.png", write_label_png(to_new[drawn.semantic]))
        names = [CLASSES[label] for label in drawn.labels]
        lines.append(f"{image_id(index)}.png," + ";".join(name for name in names if name in classes))
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (root / "train.txt").write_text("".join(f"{image_id(index)}\n" for index in indices))
    return root


def image_id(index: int) -> str:
    return f"scene{index:03d}"


def settings(root: Path, outputs: Path, *more: str) -> list[str]:
    """Overrides that build a bank of a folder of small scenes on the CPU."""
    return [
        "dataset=folder",
        f"dataset.root={root}",
        "backbone=miniature_random",
        f"runtime.outputs={outputs}",
        "runtime.device=cpu",
        "runtime.record_size=2",
        "bank.min_area=10",
        "retrieval.top_k=1",
        "evaluation.panels=0",
        *more,
    ]
