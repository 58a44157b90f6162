"""Scenes drawn once and kept in memory, and the little machinery that the three trainings share."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange

from moduseg.errors import ConfigError
from moduseg.miniature.world.scenes import PRETRAIN_SEED, QUALITY_SEED, Scene, WorldConfig, render_scene

MODEL_SIZE = 128
"""Side of the square that the models are made for, and longest side of a scene."""
CLOSE_UP = WorldConfig(
    size=64, detail=2.0, aspects=(1.0,), max_objects=1, radius=(0.14, 0.5), max_clutter=3, cluster=0.1
)
"""Small pictures of one object, drawn at the scale of scenes of 128 pixels."""
TILE = replace(CLOSE_UP, size=32, detail=4.0, radius=(0.22, 0.5), max_clutter=1, cluster=0.0)
"""Smaller ones that the object nearly fills."""


@dataclass
class PoolGroup:
    """Scenes of one shape, stacked.

    Attributes:
        images: `[N, H, W, 3]` uint8.
        instances: `[N, H, W]` uint8.
        stuff_maps: `[N, H, W]` uint8.
        scenes: the `N` scenes without their pixels: `(instance_classes, stuff)`.
    """

    images: np.ndarray
    instances: np.ndarray
    stuff_maps: np.ndarray
    scenes: list[tuple[tuple[int, ...], tuple[str, ...]]]


@dataclass
class ScenePool:
    """Training scenes by shape; a batch holds scenes of one shape, so that nothing is padded."""

    groups: list[PoolGroup]

    @property
    def count(self) -> int:
        """Number of scenes."""
        return sum(len(group.scenes) for group in self.groups)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[PoolGroup, np.ndarray]:
        """A group, drawn in proportion to its scenes, and `[size]` indices into it."""
        weights = np.array([len(group.scenes) for group in self.groups], np.float64)
        group = self.groups[int(rng.choice(len(self.groups), p=weights / weights.sum()))]
        return group, rng.integers(len(group.scenes), size=size)


def make_pool(seed: int, count: int, config: WorldConfig | None = None) -> ScenePool:
    """Draw `count` training scenes.

    Args:
        seed: pre-training seed, `PRETRAIN_SEED` or more and below `QUALITY_SEED`.
        count: number of scenes, 1 or more.
        config: settings of the world.

    Raises:
        ConfigError: a seed outside the pre-training range, or a count below 1.
    """
    if not PRETRAIN_SEED <= seed < QUALITY_SEED:
        raise ConfigError(
            f"seed: got {seed}, expected {PRETRAIN_SEED}..{QUALITY_SEED - 1}, so that no scene of a data set or of "
            f"the quality check is trained on; try {PRETRAIN_SEED}"
        )
    if count < 1:
        raise ConfigError(f"scenes: got {count}, expected 1 or more; try 20000")
    by_shape: dict[tuple[int, ...], list[Scene]] = {}
    for index in trange(count, desc="drawing scenes", mininterval=5):
        scene = render_scene(seed, "train", index, config)
        by_shape.setdefault(scene.semantic.shape, []).append(scene)
    groups = []
    for shape in sorted(by_shape):
        scenes = by_shape.pop(shape)
        groups.append(
            PoolGroup(
                images=np.stack([s.image for s in scenes]),
                instances=np.stack([s.instances for s in scenes]).astype(np.uint8),
                stuff_maps=np.stack([s.stuff_map for s in scenes]),
                scenes=[(s.instance_classes, s.stuff) for s in scenes],
            )
        )
    return ScenePool(groups)


def augment(
    images: np.ndarray, maps: tuple[np.ndarray, ...], rng: np.random.Generator
) -> tuple[torch.Tensor, tuple[np.ndarray, ...]]:
    """Random flips (one for the whole batch) and, per image, contrast, brightness and colour balance.

    Args:
        images: `[B, H, W, 3]` uint8.
        maps: arrays `[B, H, W]` that are flipped with the images.

    Returns:
        `[B, 3, H, W]` float32 in about [0, 1], and the maps.
    """
    for axis in (1, 2):
        if rng.random() < 0.5:
            images = np.flip(images, axis)
            maps = tuple(np.flip(m, axis) for m in maps)
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255.0)
    gain = rng.uniform(0.8, 1.2, (len(images), 1, 1, 1)) * rng.uniform(0.96, 1.04, (len(images), 3, 1, 1))
    shift = rng.uniform(-0.06, 0.06, (len(images), 1, 1, 1))
    x = (x - 0.5) * torch.from_numpy(gain).float() + (0.5 + torch.from_numpy(shift).float())
    return x.clamp_(0.0, 1.0), tuple(np.ascontiguousarray(m) for m in maps)


def make_pools(seed: int, tiles: int, close_ups: int, scenes: int) -> dict[int, ScenePool]:
    """Pools of tiles, close-ups and whole scenes, by the side of their pictures: 32, 64 and 128.

    Args:
        seed: of the scenes; close-ups use the next one, tiles the one after it. See `make_pool`.
        tiles, close_ups, scenes: number of pictures.
    """
    return {
        TILE.size: make_pool(seed + 2, tiles, TILE),
        CLOSE_UP.size: make_pool(seed + 1, close_ups, CLOSE_UP),
        MODEL_SIZE: make_pool(seed, scenes),
    }


def mosaic(images: torch.Tensor) -> torch.Tensor:
    """Small square pictures side by side in inputs of `MODEL_SIZE` pixels.

    Args:
        images: `[B * n * n, 3, S, S]` with `S = MODEL_SIZE / n`.

    Returns:
        `[B, 3, MODEL_SIZE, MODEL_SIZE]`, the pictures in reading order.
    """
    side = images.shape[-1]
    n = MODEL_SIZE // side
    grid = images.view(-1, n, n, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, MODEL_SIZE, MODEL_SIZE)


def split_mosaic(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """Tokens of each picture of a `mosaic`.

    Args:
        tokens: `[B, h * h, C]`, rows of patches in reading order.
        side: side `S` of the pictures, in pixels.

    Returns:
        `[B * n * n, (h / n) ** 2, C]` in the order of the pictures.
    """
    n = MODEL_SIZE // side
    channels = tokens.shape[-1]
    k = round(tokens.shape[1] ** 0.5) // n
    return tokens.view(-1, n, k, n, k, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, channels)


def draw_side(rng: np.random.Generator, first: Sequence[float], last: Sequence[float], progress: float) -> int:
    """Side of the next batch's pictures: 32, 64 or 128.

    Args:
        rng: decides.
        first, last: shares of the three sides at the start and at the end; linear in between.
        progress: in [0, 1].
    """
    shares = np.asarray(first) + (np.asarray(last) - np.asarray(first)) * progress
    return int(rng.choice([TILE.size, CLOSE_UP.size, MODEL_SIZE], p=shares / shares.sum()))


@dataclass
class Schedule:
    """Steps of a training: linear warm-up times a cosine that ends at one percent.

    Args:
        steps: number of optimiser steps; the schedule follows them, so equal settings give equal weights.
        minutes: stop after this long and let the schedule follow the clock instead (not reproducible).
        warmup: steps of the linear rise.

    Raises:
        ConfigError: a number that is not positive.
    """

    steps: int
    minutes: float | None = None
    warmup: int = 150
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.minutes is not None and self.minutes <= 0):
            raise ConfigError(
                f"steps, minutes: got {self.steps}, {self.minutes}, expected positive numbers; try steps=1000"
            )

    @property
    def seconds(self) -> float:
        """Seconds since the schedule was made (or restarted)."""
        return time.perf_counter() - self.started

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        """Yields `(step, progress in [0, 1), learning-rate factor in (0, 1])`."""
        self.started = time.perf_counter()
        step = 0
        while True:
            progress = step / self.steps if self.minutes is None else self.seconds / (60.0 * self.minutes)
            if progress >= 1.0:
                return
            ramp = min(1.0, (step + 1) / self.warmup)
            yield step, progress, ramp * (0.5 * (1.0 + math.cos(math.pi * progress)) + 0.01)
            step += 1


class TrainingLog:
    """One JSON object a line, in a file and on the standard output."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one line; floats are rounded to four digits after the point."""
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay, biases, norms and embeddings of positions do not."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "pos_embed" not in name and "cls_token" not in name
        (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
