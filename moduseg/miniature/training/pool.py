"""Scenes drawn once and kept in memory, and the batches that are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moduseg.errors import ConfigError
from moduseg.miniature.training.loop import TrainingSettings
from moduseg.miniature.world.scenes import PRETRAIN_SEED, QUALITY_SEED, Scene, WorldConfig, render_scene
from moduseg.progress import track

MODEL_SIZE = 128
"""Side of the square inputs of the models, and longest side of a scene."""
CLOSE_UP = WorldConfig(
    size=64, detail=2.0, aspects=(1.0,), max_objects=1, radius=(0.14, 0.5), max_clutter=3, cluster=0.1
)
"""Small pictures of one object, drawn at the scale of scenes of 128 pixels."""
TILE = replace(CLOSE_UP, size=32, detail=4.0, radius=(0.22, 0.5), max_clutter=1, cluster=0.0)
"""Smaller pictures, nearly filled by one object."""
SceneFacts = tuple[tuple[int, ...], tuple[str, ...]]
"""Of a scene: class of each object, and names of the background textures."""


@dataclass
class MosaicSettings(TrainingSettings):
    """Settings of the trainings that mix tiles, close-ups and whole scenes.

    Args:
        tiles, close_ups: pictures drawn before the training, beside the `scenes`.
        first_shares, last_shares: shares of steps on tiles, close-ups and scenes, at the start and at the end.
        world_seed: seed of the pictures, as `make_pools` reads it.
    """

    tiles: int = 30_000
    close_ups: int = 12_000
    first_shares: tuple[float, float, float] = (0.6, 0.25, 0.15)
    last_shares: tuple[float, float, float] = (0.3, 0.3, 0.4)
    world_seed: int = PRETRAIN_SEED


@dataclass
class PoolGroup:
    """Scenes of one shape, stacked.

    Attributes:
        images: `[N, H, W, 3]` uint8.
        instances: `[N, H, W]` uint8.
        stuff_maps: `[N, H, W]` uint8.
        scenes: the `N` scenes without their pixels.
    """

    images: np.ndarray
    instances: np.ndarray
    stuff_maps: np.ndarray
    scenes: list[SceneFacts]


@dataclass
class ScenePool:
    """Training scenes grouped by shape; a batch holds scenes of one shape, so that nothing is padded."""

    groups: list[PoolGroup]

    @property
    def count(self) -> int:
        """Number of scenes."""
        return sum(len(group.scenes) for group in self.groups)

    def draw_batch(self, rng: np.random.Generator, size: int) -> tuple[PoolGroup, np.ndarray]:
        """Draw a group in proportion to its scenes, and `[size]` indices into it."""
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
    for index in track(range(count), "drawing scenes", unit="scene"):
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
    """Apply random flips (one for the whole batch) and, per image, contrast, brightness and colour balance.

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
    """Draw pools of tiles, close-ups and whole scenes, by the side of their pictures: 32, 64 and 128.

    Args:
        seed: seed of the scenes, as `make_pool` takes it; close-ups use the next one, tiles the one after it.
        tiles, close_ups, scenes: number of pictures.
    """
    return {
        TILE.size: make_pool(seed + 2, tiles, TILE),
        CLOSE_UP.size: make_pool(seed + 1, close_ups, CLOSE_UP),
        MODEL_SIZE: make_pool(seed, scenes),
    }


def mosaic(images: torch.Tensor) -> torch.Tensor:
    """Put small square pictures side by side into inputs of `MODEL_SIZE` pixels.

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
    """Return the tokens of each picture of a `mosaic`.

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
    """Draw the side of the next batch's pictures: 32, 64 or 128.

    Args:
        rng: random numbers.
        first, last: shares of the three sides at the start and at the end; linear in between.
        progress: in [0, 1].
    """
    shares = np.asarray(first) + (np.asarray(last) - np.asarray(first)) * progress
    return int(rng.choice([TILE.size, CLOSE_UP.size, MODEL_SIZE], p=shares / shares.sum()))


@dataclass
class MosaicBatch:
    """Inputs of one step, each a scene or a mosaic of smaller pictures.

    Attributes:
        pixels: `[B, 3, H, W]` float32 in about [0, 1].
        scenes: what each picture shows, `B` times `per_input` of them.
        side: side of the pictures in pixels: 32, 64 or 128.
    """

    pixels: torch.Tensor
    scenes: list[SceneFacts]
    side: int

    @property
    def per_input(self) -> int:
        """Number of pictures in an input; 1 for whole scenes."""
        return (MODEL_SIZE // self.side) ** 2

    def split_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens of each picture: `[B, N, C]` -> `[B * per_input, N / per_input, C]`."""
        return tokens if self.per_input == 1 else split_mosaic(tokens, self.side)


def draw_mosaics(
    pools: dict[int, ScenePool], settings: MosaicSettings, progress: float, rng: np.random.Generator
) -> MosaicBatch:
    """Draw the inputs of one step from the pools of `make_pools`; `progress` in [0, 1] decides the shares."""
    side = draw_side(rng, settings.first_shares, settings.last_shares, progress)
    per_input = (MODEL_SIZE // side) ** 2
    group, index = pools[side].draw_batch(rng, settings.batch * per_input)
    images, _ = augment(group.images[index], (), rng)
    scenes = [group.scenes[number] for number in index]
    return MosaicBatch(images if per_input == 1 else mosaic(images), scenes, side)
