"""The miniature world: procedural scenes with exact masks, tags and captions.

Twelve foreground classes are made of six hue families and six shapes. Every hue carries two shapes and every shape
appears in two hues, so that neither colour nor outline alone decides the class. A shape usually, not always, wears one
of three surface patterns, each of which two shapes share, and a light or a dark rim, each of which three share. Objects
overlap, touch others of their class and leave the picture; backgrounds are textured in colours close to the objects'
own and hold clutter in object colours that belongs to no class.

Everything is drawn from `numpy.random.default_rng([seed, split, index])`: the same arguments give the same bytes,
whatever was drawn before.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from moduseg.errors import ArtefactError, ConfigError

WORLD_VERSION = 1
"""Raised whenever the same arguments would draw other pixels."""

DATASET_SEEDS = range(0, 1_000)
"""Seeds meant for data sets (`write_voc`)."""
PRETRAIN_SEED = 10_000
"""First seed of the scenes on which the miniature models are trained; theirs are all up to the next constant."""
QUALITY_SEED = 20_000
"""Seed of the scenes on which the quality of the miniature models is measured."""

HUES: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES: tuple[str, ...] = ("disc", "star", "ring", "triangle", "crescent", "cross")
PLURALS: dict[str, str] = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
CLASSES: tuple[str, ...] = (
    "background",
    *(f"{hue} {SHAPES[(i + step) % len(SHAPES)]}" for i, hue in enumerate(HUES) for step in (0, 1)),
)
"""Thirteen class names; the position is the id, `0` is the background."""

SPLITS: dict[str, int] = {"train": 0, "val": 1, "test": 2}
NUMBERS: tuple[str, ...] = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_TEMPLATES: tuple[str, ...] = (
    "{objects} on {stuff}",
    "a photo of {objects} on {stuff}",
    "a picture of {objects} in front of {stuff}",
    "{objects} over {stuff}",
    "there are {objects} on {stuff}",
    "{stuff} with {objects}",
)


@dataclass(frozen=True)
class WorldConfig:
    """Settings of the scenes.

    Args:
        size: longest side in pixels, 32 or more.
        aspects: shorter side as fractions of `size`; one is drawn per scene, either orientation.
        max_objects: a scene holds 1 to this many objects.
        radius: smallest and largest object radius, as fractions of `size`.
        hue_jitter: standard deviation of an object's hue in degrees (families are 60 degrees apart).
        loyalty: probability that an object wears the surface pattern that its shape usually has (else any of five).
        trim_loyalty: probability that it wears the light or dark rim that its shape usually has (else any, or none).
        detail: size of textures, patterns, clutter and blur, as a multiple of what `size` alone would give; 2 draws at
            64 pixels what a part of a scene of 128 shows.
        cluster: probability that an object is followed by a sibling of its class that touches it.
        max_clutter: a scene holds up to this many distractors that are background.
        noise: largest standard deviation of the sensor noise, in fractions of full scale.
        blur: largest standard deviation of the lens blur, in pixels at `size` 128.

    Raises:
        ConfigError: a value outside its range.
    """

    size: int = 128
    aspects: tuple[float, ...] = (1.0, 0.875, 0.75)
    max_objects: int = 5
    radius: tuple[float, float] = (0.0664, 0.2656)
    hue_jitter: float = 10.0
    loyalty: float = 0.9
    trim_loyalty: float = 0.55
    detail: float = 1.0
    cluster: float = 0.3
    max_clutter: int = 9
    noise: float = 0.04
    blur: float = 0.9

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ConfigError(f"size: got {self.size}, expected 32 or more; smaller scenes cannot hold the shapes")
        if not self.aspects or not all(0.5 <= a <= 1.0 for a in self.aspects):
            raise ConfigError(f"aspects: got {self.aspects}, expected fractions in [0.5, 1]; try (1.0, 0.75)")
        if not 1 <= self.max_objects < len(NUMBERS):
            raise ConfigError(f"max_objects: got {self.max_objects}, expected 1..{len(NUMBERS) - 1}; try 5")
        if not 0.03 <= self.radius[0] <= self.radius[1] <= 0.5:
            raise ConfigError(f"radius: got {self.radius}, expected 0.03 <= low <= high <= 0.5; try (0.0664, 0.2656)")
        for name, low, high in (
            ("hue_jitter", 0, 60),
            ("loyalty", 0, 1),
            ("trim_loyalty", 0, 1),
            ("detail", 0.25, 4),
            ("cluster", 0, 1),
            ("max_clutter", 0, 100),
            ("noise", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected {low}..{high}; leave it at its default")
        if not 0 <= self.blur <= 10:
            raise ConfigError(f"blur: got {self.blur}, expected 0..10; leave it at its default")


@dataclass(frozen=True)
class Scene:
    """One picture with everything that is known about it.

    Attributes:
        image: `[H, W, 3]` uint8 RGB.
        semantic: `[H, W]` uint8 class ids, `0` background.
        instances: `[H, W]` uint16, `0` background, object `i` of `1..n`; every one of them has a visible pixel.
        instance_classes: class id of object `i` at position `i - 1`.
        stuff: names of the background textures, 1 or 2.
        stuff_map: `[H, W]` uint8, position in `stuff` of the texture behind each pixel (objects ignored).
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: np.ndarray
    instance_classes: tuple[int, ...]
    stuff: tuple[str, ...]
    stuff_map: np.ndarray

    @property
    def labels(self) -> tuple[int, ...]:
        """Ascending foreground class ids that own at least one pixel."""
        return tuple(sorted(set(self.instance_classes)))

    def caption(self, rng: np.random.Generator) -> str:
        """A sentence that names every object and the background, worded by `rng`."""
        return describe(self.instance_classes, self.stuff, rng)


def describe(instance_classes: Sequence[int], stuff: Sequence[str], rng: np.random.Generator) -> str:
    """Caption of a set of objects on a background.

    Args:
        instance_classes: class id of each object, in any order; may be empty.
        stuff: background names; may be empty.
        rng: decides order and wording.

    Returns:
        A lower-case sentence such as `"a red disc and two green triangles on grass"`.
    """
    counts = list(Counter(instance_classes).items())
    phrases = []
    for position in rng.permutation(len(counts)):
        class_id, count = counts[int(position)]
        hue, shape = CLASSES[class_id].split()
        article = "a" if rng.random() < 0.8 else "one"
        number = article if count == 1 else NUMBERS[count] if rng.random() < 0.8 else "some"
        phrases.append(f"{number} {hue} {shape if count == 1 else PLURALS[shape]}")
    ground = [stuff[int(i)] for i in rng.permutation(len(stuff))]
    template = CAPTION_TEMPLATES[int(rng.integers(len(CAPTION_TEMPLATES)))]
    if not phrases:
        return f"a photo of {_enumerate(ground)}" if ground else "a photo"
    if not ground:
        return f"a photo of {_enumerate(phrases)}"
    return template.format(objects=_enumerate(phrases), stuff=_enumerate(ground))


def _enumerate(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


# Outlines -------------------------------------------------------------------------------------------------------------


def _circle(radius: float, points: int = 40, start: float = 0.0, stop: float = 2 * math.pi) -> np.ndarray:
    angles = np.linspace(start, stop, points, endpoint=stop - start < 2 * math.pi - 1e-6)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _outline(shape: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Contours of a shape inside the unit circle, each `[P, 2]` float; a second contour is a hole."""
    if shape == "disc":
        return [_circle(0.92)]
    if shape == "ring":
        return [_circle(1.0), _circle(rng.uniform(0.45, 0.62))]
    if shape == "star":
        tips = int(rng.integers(5, 7))
        angles = np.arange(2 * tips) * math.pi / tips
        radii = np.where(np.arange(2 * tips) % 2 == 0, 1.08, rng.uniform(0.42, 0.52))
        return [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]
    if shape == "triangle":
        angles = np.array([0.0, 2.0, 4.0]) * math.pi / 3 + rng.uniform(-0.2, 0.2, 3)
        return [1.1 * np.stack([np.cos(angles), np.sin(angles)], axis=1)]
    if shape == "cross":
        a = rng.uniform(0.26, 0.38)
        corners = [
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
        ]
        return [np.array(corners)]
    # Crescent: the outer arc of the unit circle and, walked back, the inner arc of a circle shifted to the right
    # that meets it at the same two tips.
    opening = rng.uniform(0.9, 1.15)
    tip_x, tip_y = math.cos(opening), math.sin(opening)
    centre = rng.uniform(0.5, 0.68)
    inner = math.hypot(tip_x - centre, tip_y)
    half = math.atan2(tip_y, tip_x - centre)
    outer_arc = _circle(1.0, 30, opening, 2 * math.pi - opening)
    inner_arc = _circle(inner, 24, half, 2 * math.pi - half)[::-1] + [centre, 0.0]
    return [np.concatenate([outer_arc, inner_arc]) + [0.2, 0.0]]


def _fill(contours: Sequence[np.ndarray], window: tuple[int, int, int, int]) -> np.ndarray:
    """Anti-aliased coverage of `contours` (image coordinates) on `window` (y0, y1, x0, x1): float32 in [0, 1]."""
    y0, y1, x0, x1 = window
    canvas = np.zeros((y1 - y0, x1 - x0), np.uint8)
    fixed = [np.round((c - [x0, y0]) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(canvas, fixed, 255, lineType=cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255.0


def _hsv(hue: np.ndarray | float, saturation: np.ndarray | float, value: np.ndarray) -> np.ndarray:
    """RGB float32 `[H, W, 3]` in [0, 1] from hue in degrees and saturation, value in [0, 1] (broadcast over pixels)."""
    planes = [np.broadcast_to(np.asarray(p, np.float32), value.shape) for p in (np.mod(hue, 360.0), saturation, value)]
    stacked = np.stack(planes, axis=-1)
    np.clip(stacked[..., 1:], 0.0, 1.0, out=stacked[..., 1:])
    return cv2.cvtColor(stacked, cv2.COLOR_HSV2RGB)


# Textures -------------------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, h: int, w: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise in about [-1, 1] whose features measure `cell_y` x `cell_x` pixels."""
    grid = rng.uniform(-1.0, 1.0, (max(2, round(h / cell_y) + 1), max(2, round(w / cell_x) + 1))).astype(np.float32)
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)


def _axes(h: int, w: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates along and across `angle`, each `[H, W]` float32."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _grass(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    blades = _noise(rng, h, w, 6 * s, 1.5 * s) + 0.5 * _noise(rng, h, w, 3 * s, 1.5 * s)
    patches = _noise(rng, h, w, 30 * s, 30 * s)
    return _hsv(rng.uniform(75, 135) + 10 * patches, rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.65) + 0.12 * blades)


def _sky(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    clouds = _noise(rng, h, w, 18 * s, 36 * s) + 0.5 * _noise(rng, h, w, 8 * s, 14 * s)
    haze = np.linspace(0.0, rng.uniform(0.0, 0.25), h, dtype=np.float32)[:, None]
    return _hsv(
        rng.uniform(185, 235),
        rng.uniform(0.3, 0.6) - 0.18 * clouds - haze,
        rng.uniform(0.7, 0.9) + 0.08 * clouds,
    )


def _sand(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    grain = rng.normal(0.0, 1.0, (h, w)).astype(np.float32)
    dunes = _noise(rng, h, w, 14 * s, 40 * s)
    return _hsv(rng.uniform(34, 56), rng.uniform(0.25, 0.5), rng.uniform(0.6, 0.85) + 0.05 * grain + 0.06 * dunes)


def _water(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    _, across = _axes(h, w, rng.uniform(-0.2, 0.2))
    waves = np.sin(across * 2 * math.pi / (rng.uniform(6, 11) * s) + 2.5 * _noise(rng, h, w, 10 * s, 20 * s))
    return _hsv(rng.uniform(175, 245), rng.uniform(0.35, 0.65) - 0.1 * waves, rng.uniform(0.4, 0.65) + 0.09 * waves)


def _brick(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    height, width = rng.uniform(7, 12) * s, rng.uniform(15, 24) * s
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    row = np.floor(y / height)
    column = np.floor(x / width + 0.5 * (row % 2))
    mortar = ((y % height) < 1.3 * s) | (((x + 0.5 * width * (row % 2)) % width) < 1.3 * s)
    tint = rng.uniform(-1, 1, (64, 64)).astype(np.float32)[row.astype(int) % 64, column.astype(int) % 64]
    value = np.where(mortar, 0.7, rng.uniform(0.45, 0.65) + 0.08 * tint)
    return _hsv(rng.uniform(0, 22), np.where(mortar, 0.1, rng.uniform(0.4, 0.65)), value.astype(np.float32))


def _wood(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    along, across = _axes(h, w, rng.choice([0.0, math.pi / 2]) + rng.uniform(-0.1, 0.1))
    grain = np.sin(across / (rng.uniform(1.4, 2.6) * s) + 3.0 * _noise(rng, h, w, 22 * s, 22 * s) + 0.02 * along)
    plank = (across % (rng.uniform(22, 34) * s)) < 1.2 * s
    value = rng.uniform(0.45, 0.7) + 0.07 * grain - 0.2 * plank
    return _hsv(rng.uniform(20, 38), rng.uniform(0.4, 0.65), value.astype(np.float32))


def _stone(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    relief = _noise(rng, h, w, 12 * s, 12 * s) + 0.6 * _noise(rng, h, w, 5 * s, 5 * s)
    cracks = np.abs(_noise(rng, h, w, 26 * s, 26 * s)) < 0.035
    value = rng.uniform(0.4, 0.7) + 0.09 * relief - 0.18 * cracks
    return _hsv(rng.uniform(0, 360), rng.uniform(0.02, 0.16), value.astype(np.float32))


def _fabric(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    along, across = _axes(h, w, rng.uniform(0, math.pi))
    period = rng.uniform(8, 16) * s
    weave = np.sign(np.sin(along * 2 * math.pi / period)) + np.sign(np.sin(across * 2 * math.pi / period))
    thread = rng.normal(0.0, 0.03, (h, w)).astype(np.float32)
    return _hsv(rng.uniform(265, 345), rng.uniform(0.22, 0.5), rng.uniform(0.5, 0.75) + 0.07 * weave + thread)


_TEXTURES: dict[str, Callable[[np.random.Generator, int, int, float], np.ndarray]] = {
    "grass": _grass, "sky": _sky, "sand": _sand, "water": _water,
    "brick": _brick, "wood": _wood, "stone": _stone, "fabric": _fabric,
}  # fmt: skip
STUFF: tuple[str, ...] = tuple(_TEXTURES)
"""Names of the background textures."""


_PATTERNS = ("plain", "gradient", "stripes", "dots", "noise")
_USUAL_PATTERNS = {
    "disc": "dots", "star": "stripes", "ring": "plain", "triangle": "dots", "crescent": "stripes", "cross": "plain",
}  # fmt: skip

_TRIMS = ("light", "dark", "none")
_USUAL_TRIMS = {
    "disc": "light",
    "star": "dark",
    "ring": "light",
    "triangle": "dark",
    "crescent": "light",
    "cross": "dark",
}


def _trim(
    rng: np.random.Generator, surface: np.ndarray, alpha: np.ndarray, radius: float, usual: str, loyalty: float
) -> np.ndarray:
    """`surface` with a light or dark rim inside the outline `alpha`; the `usual` one with chance `loyalty`."""
    kind = usual if rng.random() < loyalty else _TRIMS[int(rng.integers(len(_TRIMS)))]
    width = int(np.clip(round(radius * rng.uniform(0.1, 0.2)), 1, 5))
    lightness = rng.uniform(0.88, 1.0) if kind == "light" else rng.uniform(0.02, 0.16)
    if kind == "none":
        return surface
    # The rim keeps a trace of the object's hue, as paint and shadow do.
    colour = (lightness * (0.85 + 0.15 * surface.reshape(-1, 3).mean(0))).astype(np.float32)
    padded = cv2.copyMakeBorder(alpha, width, width, width, width, cv2.BORDER_REPLICATE)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    core = cv2.erode(padded, disc)[width:-width, width:-width]
    return surface + (1.0 - core)[..., None] * (colour - surface)


def _surface(
    rng: np.random.Generator, h: int, w: int, s: float, hue: float, usual: str = "plain", loyalty: float = 0.0
) -> np.ndarray:
    """Surface of an object, `[H, W, 3]` float32 RGB: hue of its family, `usual` pattern with chance `loyalty`."""
    saturation, value = rng.uniform(0.55, 1.0), rng.uniform(0.55, 1.0)
    contrast = rng.uniform(0.15, 0.34)
    pattern = int(rng.integers(5))
    if rng.random() < loyalty:
        pattern = _PATTERNS.index(usual)
    base = np.zeros((h, w), np.float32)
    if pattern == 1:  # gradient
        along, _ = _axes(h, w, rng.uniform(0, 2 * math.pi))
        base = (along - along.mean()) / max(float(np.ptp(along)), 1.0) * 2.0
    elif pattern == 2:  # stripes
        along, _ = _axes(h, w, rng.uniform(0, math.pi))
        base = np.sign(np.sin(along * 2 * math.pi / (rng.uniform(4, 10) * s) + rng.uniform(0, 6)))
    elif pattern == 3:  # dots
        along, across = _axes(h, w, rng.uniform(0, math.pi))
        period = rng.uniform(5, 9) * s
        base = np.where(np.sin(along * 2 * math.pi / period) * np.sin(across * 2 * math.pi / period) > 0.3, 1.0, -0.4)
    elif pattern == 4:  # noise
        base = _noise(rng, h, w, 4 * s, 4 * s)
    # Half of the patterns modulate lightness, half fade towards white: both happen on real surfaces.
    if rng.random() < 0.5:
        return _hsv(hue, saturation, (value - contrast * (0.5 - 0.5 * base)).astype(np.float32))
    return _hsv(hue, saturation - contrast * (0.5 + 0.5 * base), np.full((h, w), value, np.float32))


# Scenes ---------------------------------------------------------------------------------------------------------------


def render_scene(seed: int, split: str | int, index: int, config: WorldConfig | None = None) -> Scene:
    """Draw one scene.

    Args:
        seed: world seed, 0 or more; see `DATASET_SEEDS`, `PRETRAIN_SEED` and `QUALITY_SEED`.
        split: `"train"`, `"val"`, `"test"` or a number of your own (0 or more).
        index: number of the scene, 0 or more.
        config: settings; the defaults where left out.

    Returns:
        The scene. Equal arguments give equal bytes.

    Raises:
        ConfigError: a negative number or an unknown split.
    """
    config = config or WorldConfig()
    if isinstance(split, str) and split not in SPLITS:
        raise ConfigError(f"split: got {split!r}, expected one of {sorted(SPLITS)} or a number; try 'train'")
    code = SPLITS[split] if isinstance(split, str) else int(split)
    if min(seed, code, index) < 0:
        raise ConfigError(f"seed, split, index: got {(seed, code, index)}, expected numbers >= 0; try 0")
    rng = np.random.default_rng([seed, code, index])
    scale = config.detail * config.size / 128.0
    short = round(config.size * config.aspects[int(rng.integers(len(config.aspects)))])
    h, w = (short, config.size) if rng.random() < 0.5 else (config.size, short)

    canvas, stuff, stuff_map = _background(rng, h, w, scale)
    for _ in range(int(rng.integers(config.max_clutter + 1))):
        _draw_clutter(canvas, rng, scale)
    instances, classes = _objects(canvas, rng, config)
    image = _camera(canvas, rng, config)

    # Objects can be covered completely by later ones only in theory (see _objects), but numbering stays dense anyway.
    visible = np.flatnonzero(np.bincount(instances.ravel(), minlength=len(classes) + 1)[1:])
    renumber = np.zeros(len(classes) + 1, np.uint16)
    renumber[visible + 1] = np.arange(1, len(visible) + 1)
    kept = tuple(classes[int(i)] for i in visible)
    instances = renumber[instances]
    semantic = np.array([0, *kept], np.uint8)[instances]
    return Scene(image, semantic, instances, kept, stuff, stuff_map)


def _background(rng: np.random.Generator, h: int, w: int, s: float) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    names = [STUFF[int(i)] for i in rng.permutation(len(STUFF))[: 1 + int(rng.random() < 0.5)]]
    canvas = _TEXTURES[names[0]](rng, h, w, s)
    stuff_map = np.zeros((h, w), np.uint8)
    if len(names) == 2:
        along, across = _axes(h, w, rng.uniform(-0.5, 0.5) + (math.pi / 2 if rng.random() < 0.3 else 0.0))
        edge = across - np.quantile(across, rng.uniform(0.3, 0.7)) + 4 * s * np.sin(along / (rng.uniform(8, 30) * s))
        alpha = np.clip(edge + 0.5, 0.0, 1.0).astype(np.float32)[..., None]
        canvas = canvas * (1 - alpha) + _TEXTURES[names[1]](rng, h, w, s) * alpha
        stuff_map = (alpha[..., 0] > 0.5).astype(np.uint8)
    present = [name for i, name in enumerate(names) if (stuff_map == i).any()]
    return canvas, tuple(present), stuff_map if len(present) == len(names) else np.zeros_like(stuff_map)


def _draw_clutter(canvas: np.ndarray, rng: np.random.Generator, s: float) -> None:
    """A thin line, a small blob or a bar in an object colour; it is background."""
    h, w = canvas.shape[:2]
    colour = _hsv(rng.uniform(0, 360), rng.uniform(0.3, 0.95), np.full((1, 1), rng.uniform(0.4, 0.95), np.float32))[
        0, 0
    ]
    centre = rng.uniform(0, [w, h])
    angle = rng.uniform(0, math.pi)
    kind = int(rng.integers(3))
    if kind == 0:
        half_length, half_width = rng.uniform(10, 60) * s, rng.uniform(0.5, 1.5) * s
    elif kind == 1:
        half_length = half_width = rng.uniform(1.5, 4.2) * s
    else:
        half_length, half_width = rng.uniform(6, 14) * s, rng.uniform(1.5, 3.2) * s
    corners = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * [half_length, half_width]
    if kind == 1 and rng.random() < 0.7:
        corners = _circle(half_length, 14)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    alpha = _fill([corners @ rotation + centre], (0, h, 0, w))[..., None] * np.float32(rng.uniform(0.6, 1.0))
    canvas += alpha * (colour - canvas)


def _objects(canvas: np.ndarray, rng: np.random.Generator, config: WorldConfig) -> tuple[np.ndarray, list[int]]:
    """Draw the objects from back to front: id map `[H, W]` uint16 and the class of each id."""
    h, w = canvas.shape[:2]
    size, scale = config.size, config.detail * config.size / 128.0
    instances = np.zeros((h, w), np.uint16)
    classes: list[int] = []
    areas = [0]
    sibling: tuple[int, np.ndarray, float] | None = None
    wanted = int(rng.integers(1, config.max_objects + 1))
    for _attempt in range(6 * wanted):
        if len(classes) >= wanted:
            break
        if sibling is not None:
            class_id, centre, radius = sibling
            angle, radius = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.75, 1.3)
            reach = rng.uniform(0.7, 0.95) * (sibling[2] + radius)
            centre = centre + reach * np.array([math.cos(angle), math.sin(angle)])
        else:
            class_id = int(rng.integers(1, len(CLASSES)))
            radius = size * (config.radius[0] + (config.radius[1] - config.radius[0]) * rng.random() ** 1.4)
            centre = rng.uniform([-0.2 * radius, -0.2 * radius], [w + 0.2 * radius, h + 0.2 * radius])
        sibling = None
        hue_name, shape = CLASSES[class_id].split()
        linear = _random_linear(rng, radius)
        contours = [c @ linear + centre for c in _outline(shape, rng)]
        low = np.maximum(np.floor(contours[0].min(0)) - 2, 0).astype(int)
        high = np.minimum(np.ceil(contours[0].max(0)) + 3, [w, h]).astype(int)
        if (high - low).min() < 3:
            continue
        window = (int(low[1]), int(high[1]), int(low[0]), int(high[0]))
        alpha = _fill(contours, window)
        view = instances[window[0] : window[1], window[2] : window[3]]
        inside = alpha > 0.5
        area = int(inside.sum())
        full = sum((-1) ** i * cv2.contourArea(c.astype(np.float32)) for i, c in enumerate(contours))
        hidden = np.bincount(view[inside], minlength=len(areas))
        visible = np.bincount(instances.ravel(), minlength=len(areas)) - hidden
        # What is placed stays recognisable: cut-off and occlusion are common, slivers are not.
        if area < max(0.5 * full, 40 * scale**2) or any(visible[i] < 0.5 * areas[i] for i in range(1, len(areas))):
            continue
        jitter = float(np.clip(rng.normal(0.0, config.hue_jitter), -34.0, 34.0))
        surface = _surface(
            rng,
            alpha.shape[0],
            alpha.shape[1],
            scale,
            60.0 * HUES.index(hue_name) + jitter,
            _USUAL_PATTERNS[shape],
            config.loyalty,
        )
        surface = _trim(rng, surface, alpha, radius, _USUAL_TRIMS[shape], config.trim_loyalty)
        if rng.random() < 0.35:
            _cast_shadow(canvas, contours, rng, scale)
        target = canvas[window[0] : window[1], window[2] : window[3]]
        target += alpha[..., None] * (surface - target)
        classes.append(class_id)
        areas.append(area)
        view[inside] = len(classes)
        if rng.random() < config.cluster:
            sibling = (class_id, centre, radius)
    if not classes:  # practically impossible; a scene without an object would have no tag, so draw one in the middle
        contours = [c * 0.2 * min(h, w) + [w / 2, h / 2] for c in _outline("disc", rng)]
        alpha = _fill(contours, (0, h, 0, w))
        canvas += alpha[..., None] * (_surface(rng, h, w, scale, 0.0) - canvas)
        instances[alpha > 0.5] = 1
        classes.append(1)
    return instances, classes


def _random_linear(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Rotation, mild stretch and shear, and size of an object as one `[2, 2]` matrix for row vectors."""
    angle = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    stretch = np.diag(np.exp(rng.uniform(-0.16, 0.16, 2)))
    shear = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, 1.0]])
    return radius * stretch @ shear @ rotation


def _cast_shadow(canvas: np.ndarray, contours: Sequence[np.ndarray], rng: np.random.Generator, s: float) -> None:
    h, w = canvas.shape[:2]
    offset = rng.uniform(2, 5, 2) * s * rng.choice([-1.0, 1.0], 2)
    shadow = cv2.GaussianBlur(_fill([c + offset for c in contours], (0, h, 0, w)), (0, 0), 1.5 * s)
    canvas *= 1.0 - np.float32(rng.uniform(0.25, 0.5)) * shadow[..., None]


def _camera(canvas: np.ndarray, rng: np.random.Generator, config: WorldConfig) -> np.ndarray:
    """Illumination, colour balance, blur and noise; float `[H, W, 3]` to uint8."""
    h, w = canvas.shape[:2]
    along, _ = _axes(h, w, rng.uniform(0, 2 * math.pi))
    ramp = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    light = 1.0 + rng.uniform(0.0, 0.4) * (ramp - 0.5)
    balance = rng.uniform(0.92, 1.08, 3) * rng.uniform(0.85, 1.12)
    canvas = canvas * light[..., None] * balance.astype(np.float32)
    sigma = rng.uniform(0.0, config.blur) * config.detail * config.size / 128.0
    if sigma > 0.2:
        canvas = cv2.GaussianBlur(canvas, (0, 0), sigma)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.2, 1.0) * config.noise)
    return np.clip(np.round((canvas + noise) * 255.0), 0, 255).astype(np.uint8)


# On disk --------------------------------------------------------------------------------------------------------------


def write_voc(root: Path, seed: int, train: int = 160, val: int = 80, config: WorldConfig | None = None) -> Path:
    """Write a data set in the layout of PASCAL VOC 2012.

    `JPEGImages/<id>.png` (the folder keeps VOC's name; the files are lossless PNG), `SegmentationClass/<id>.png` and
    `SegmentationObject/<id>.png` (indexed PNG with the VOC palette), `ImageSets/Segmentation/{train,val}.txt`,
    `image_labels.json`, `classes.txt` and `world.json` (settings). Every file is written to a temporary name and
    renamed, the lists last: a call that was killed is completed by the next one, and a complete folder is left alone.

    Args:
        root: folder to write to, made if absent.
        seed: world seed; `DATASET_SEEDS` are free of scenes that the miniature models have seen.
        train, val: number of images of each split, 0 or more.
        config: settings; the defaults where left out.

    Returns:
        `root`.

    Raises:
        ArtefactError: `root` holds a world of other settings.
        ConfigError: a number is negative.
    """
    # Imported here because `moduseg.datasets` serves this world and so imports this module.
    from moduseg.datasets.palette import voc_palette

    config, root = config or WorldConfig(), Path(root)
    if min(seed, train, val) < 0:
        raise ConfigError(f"seed, train, val: got {(seed, train, val)}, expected numbers >= 0; try 0, 160, 80")
    settings = {"version": WORLD_VERSION, "seed": seed, "train": train, "val": val, "config": asdict(config)}
    settings = json.loads(json.dumps(settings))
    _check_settings(root, settings)
    splits = {"train": train, "val": val}
    ids = {split: [f"{split}_{i:05d}" for i in range(count)] for split, count in splits.items()}
    folders = [root / name for name in ("JPEGImages", "SegmentationClass", "SegmentationObject")]
    lists = [root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in splits]
    lists += [root / "image_labels.json", root / "classes.txt"]
    pictures = [folder / f"{img_id}.png" for names in ids.values() for img_id in names for folder in folders]
    if all(path.is_file() for path in (*lists, *pictures)):
        return root
    for folder in (*folders, lists[0].parent):
        folder.mkdir(parents=True, exist_ok=True)
    _write_bytes(root / "world.json", (json.dumps(settings, indent=2) + "\n").encode())

    entries = []
    palette = voc_palette().tobytes()
    for split, names in ids.items():
        for index, img_id in enumerate(names):
            scene = render_scene(seed, split, index, config)
            for folder, array in zip(
                folders, (scene.image, scene.semantic, scene.instances.astype(np.uint8)), strict=True
            ):
                if not (folder / f"{img_id}.png").is_file():
                    picture = Image.fromarray(array)
                    if array.ndim == 2:
                        picture.putpalette(palette)
                    _write_picture(folder / f"{img_id}.png", picture)
            entries.append({"img_id": img_id, "file_name": f"{img_id}.png", "labels": list(scene.labels)})
    _write_bytes(root / "classes.txt", ("\n".join(CLASSES) + "\n").encode())
    _write_bytes(root / "image_labels.json", (json.dumps({"images": entries}, indent=1) + "\n").encode())
    for path, names in zip(lists, ids.values(), strict=False):
        _write_bytes(path, "".join(f"{name}\n" for name in names).encode())
    return root


def _check_settings(root: Path, settings: dict) -> None:
    path = root / "world.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArtefactError(
            f"{path}: got a file that is not JSON ({error}), expected the settings of a world; remove the folder"
        ) from error
    if found != settings:
        different = sorted(key for key in settings if found.get(key) != settings[key])
        got = {key: found.get(key) for key in different}
        raise ArtefactError(
            f"{root} holds another world: got {got}, expected { ({key: settings[key] for key in different}) }; "
            "try another folder, or remove this one"
        )


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _write_picture(path: Path, picture: Image.Image) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
