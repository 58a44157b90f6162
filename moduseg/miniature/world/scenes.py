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

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from moduseg.errors import ConfigError
from moduseg.miniature.world.drawing import (
    STUFF,
    TEXTURES,
    USUAL_PATTERNS,
    USUAL_TRIMS,
    axes,
    circle,
    fill,
    hsv,
    outline,
    surface,
    trim,
)

WORLD_VERSION = 1
"""Version of the drawing; raised whenever equal arguments draw other pixels."""

DATASET_SEEDS = range(0, 1_000)
"""Seeds of data sets (`write_voc`)."""
PRETRAIN_SEED = 10_000
"""First seed of the scenes that the miniature models are trained on; their seeds end below the next constant."""
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
    """Settings of the scenes of a world.

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
        mixing: width in pixels of the band along the outlines of objects in which object and surroundings are dithered
            into each other, half of it on either side; the nearer to the object's inside, the more of its pixels. The
            ground truth is what it is without, and so is every pixel outside the band but for the lens blur.

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
    mixing: float = 0.0

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
        if not 0 <= self.mixing <= 64:
            raise ConfigError(f"mixing: got {self.mixing}, expected 0..64 pixels; try 12 at size 256, or 0 for none")

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by name, fit for JSON; `mixing` only if it is on, as worlds of before know nothing of it."""
        settings = asdict(self)
        return settings if self.mixing else {name: settings[name] for name in settings if name != "mixing"}


@dataclass(frozen=True)
class Scene:
    """One picture with its masks, classes and textures.

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
        """Ascending foreground class ids with at least one pixel."""
        return tuple(sorted(set(self.instance_classes)))

    def caption(self, rng: np.random.Generator) -> str:
        """Write a sentence that names every object and the background, worded by `rng`."""
        return describe(self.instance_classes, self.stuff, rng)


def describe(instance_classes: Sequence[int], stuff: Sequence[str], rng: np.random.Generator) -> str:
    """Write a caption of objects on a background.

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


def render_scene(seed: int, split: str | int, index: int, config: WorldConfig | None = None) -> Scene:
    """Draw one scene.

    Args:
        seed: world seed, 0 or more, from `DATASET_SEEDS`, from `PRETRAIN_SEED` on, or `QUALITY_SEED`.
        split: `"train"`, `"val"`, `"test"` or a number of your own (0 or more).
        index: number of the scene, 0 or more.
        config: settings; the defaults if omitted.

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
    # Dithering has a generator of its own, so that it moves no object. A fourth number of 0 would repeat the first one.
    instances, classes = _draw_objects(canvas, rng, config, np.random.default_rng([seed, code, index, 1]))
    image = _camera(canvas, rng, config)

    # `_objects` refuses to cover an object completely. Numbering would stay dense even if it did.
    visible = np.flatnonzero(np.bincount(instances.ravel(), minlength=len(classes) + 1)[1:])
    renumber = np.zeros(len(classes) + 1, np.uint16)
    renumber[visible + 1] = np.arange(1, len(visible) + 1)
    kept = tuple(classes[int(i)] for i in visible)
    instances = renumber[instances]
    semantic = np.array([0, *kept], np.uint8)[instances]
    return Scene(
        image=image, semantic=semantic, instances=instances, instance_classes=kept, stuff=stuff, stuff_map=stuff_map
    )


def _background(rng: np.random.Generator, h: int, w: int, s: float) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    names = [STUFF[int(i)] for i in rng.permutation(len(STUFF))[: 1 + int(rng.random() < 0.5)]]
    canvas = TEXTURES[names[0]](rng, h, w, s)
    stuff_map = np.zeros((h, w), np.uint8)
    if len(names) == 2:
        along, across = axes(h, w, rng.uniform(-0.5, 0.5) + (math.pi / 2 if rng.random() < 0.3 else 0.0))
        edge = across - np.quantile(across, rng.uniform(0.3, 0.7)) + 4 * s * np.sin(along / (rng.uniform(8, 30) * s))
        alpha = np.clip(edge + 0.5, 0.0, 1.0).astype(np.float32)[..., None]
        canvas = canvas * (1 - alpha) + TEXTURES[names[1]](rng, h, w, s) * alpha
        stuff_map = (alpha[..., 0] > 0.5).astype(np.uint8)
    present = [name for i, name in enumerate(names) if (stuff_map == i).any()]
    return canvas, tuple(present), stuff_map if len(present) == len(names) else np.zeros_like(stuff_map)


def _draw_clutter(canvas: np.ndarray, rng: np.random.Generator, s: float) -> None:
    """A thin line, a small blob or a bar in an object colour; it is background."""
    h, w = canvas.shape[:2]
    colour = hsv(rng.uniform(0, 360), rng.uniform(0.3, 0.95), np.full((1, 1), rng.uniform(0.4, 0.95), np.float32))[0, 0]
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
        corners = circle(half_length, 14)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    alpha = fill([corners @ rotation + centre], (0, h, 0, w))[..., None] * np.float32(rng.uniform(0.6, 1.0))
    canvas += alpha * (colour - canvas)


@dataclass(frozen=True)
class _Placement:
    """Class of an object, its centre `[2]` as x, y, and its radius, in pixels."""

    class_id: int
    centre: np.ndarray
    radius: float


def _place_object(
    rng: np.random.Generator, config: WorldConfig, size: tuple[int, int], sibling: _Placement | None
) -> _Placement:
    """Draw where an object of `(height, width)` scenes goes: beside a sibling of its class, or anywhere."""
    if sibling is not None:
        angle, radius = rng.uniform(0, 2 * math.pi), sibling.radius * rng.uniform(0.75, 1.3)
        reach = rng.uniform(0.7, 0.95) * (sibling.radius + radius)
        centre = sibling.centre + reach * np.array([math.cos(angle), math.sin(angle)])
        return _Placement(sibling.class_id, centre, radius)
    class_id = int(rng.integers(1, len(CLASSES)))
    radius = config.size * (config.radius[0] + (config.radius[1] - config.radius[0]) * rng.random() ** 1.4)
    margin, (height, width) = 0.2 * radius, size
    return _Placement(class_id, rng.uniform([-margin, -margin], [width + margin, height + margin]), radius)


def _draw_objects(
    canvas: np.ndarray, rng: np.random.Generator, config: WorldConfig, dither_rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw the objects from back to front: id map `[H, W]` uint16 and the class of each id."""
    h, w = canvas.shape[:2]
    scale = config.detail * config.size / 128.0
    instances = np.zeros((h, w), np.uint16)
    classes: list[int] = []
    areas = [0]
    sibling: _Placement | None = None
    wanted = int(rng.integers(1, config.max_objects + 1))
    for _attempt in range(6 * wanted):
        if len(classes) >= wanted:
            break
        placement = _place_object(rng, config, (h, w), sibling)
        sibling = None
        hue_name, shape = CLASSES[placement.class_id].split()
        linear = _random_linear(rng, placement.radius)
        contours = [c @ linear + placement.centre for c in outline(shape, rng)]
        low = np.maximum(np.floor(contours[0].min(0)) - 2, 0).astype(int)
        high = np.minimum(np.ceil(contours[0].max(0)) + 3, [w, h]).astype(int)
        if (high - low).min() < 3:
            continue
        window = (int(low[1]), int(high[1]), int(low[0]), int(high[0]))
        alpha = fill(contours, window)
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
        skin = surface(
            rng,
            alpha.shape[0],
            alpha.shape[1],
            scale,
            60.0 * HUES.index(hue_name) + jitter,
            usual=USUAL_PATTERNS[shape],
            loyalty=config.loyalty,
        )
        skin = trim(rng, skin, alpha, placement.radius, usual=USUAL_TRIMS[shape], loyalty=config.trim_loyalty)
        if rng.random() < 0.35:
            _cast_shadow(canvas, contours, rng, scale)
        if config.mixing:
            window, alpha, skin = _dither_outline((h, w), window, inside, skin, mixing=config.mixing, rng=dither_rng)
        target = canvas[window[0] : window[1], window[2] : window[3]]
        target += alpha[..., None] * (skin - target)
        classes.append(placement.class_id)
        areas.append(area)
        view[inside] = len(classes)
        if rng.random() < config.cluster:
            sibling = placement
    if not classes:  # practically impossible; a scene without an object would have no tag, so draw one in the middle
        contours = [c * 0.2 * min(h, w) + [w / 2, h / 2] for c in outline("disc", rng)]
        alpha = fill(contours, (0, h, 0, w))
        canvas += alpha[..., None] * (surface(rng, h, w, scale, 0.0) - canvas)
        instances[alpha > 0.5] = 1
        classes.append(1)
    return instances, classes


def _dither_outline(
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    inside: np.ndarray,
    skin: np.ndarray,
    *,
    mixing: float,
    rng: np.random.Generator,
) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
    """Return window, `[h, w]` alpha (0 or 1) and `[h, w, 3]` skin of an object whose outline is mixed.

    The share of object pixels falls from 1 to 0 across the band, linearly in the distance from the outline.

    Args:
        size: height and width of the scene.
        window: (y0, y1, x0, x1) that holds the object; the one returned is larger by the band, within the scene.
        inside: `[h, w]` bool on the window, the object's pixels.
        skin: `[h, w, 3]` on the window; beyond it, its mirror image.
        mixing: width of the band in pixels.
        rng: tosses a coin for each pixel.
    """
    reach = math.ceil(mixing / 2) + 1
    y0, y1, x0, x1 = window
    pads = ((min(reach, y0), min(reach, size[0] - y1)), (min(reach, x0), min(reach, size[1] - x1)))
    inside = np.pad(inside, pads).astype(np.uint8)
    # Distances lead to the centre of the nearest pixel beyond the outline, which is half a pixel nearer.
    depth, distance = (cv2.distanceTransform(side, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in (inside, 1 - inside))
    share = np.clip(0.5 + np.where(inside, depth - 0.5, 0.5 - distance) / mixing, 0.0, 1.0)
    wider = (y0 - pads[0][0], y1 + pads[0][1], x0 - pads[1][0], x1 + pads[1][1])
    alpha = (rng.random(share.shape) < share).astype(np.float32)
    return wider, alpha, np.pad(skin, (*pads, (0, 0)), mode="symmetric")


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
    shadow = cv2.GaussianBlur(fill([c + offset for c in contours], (0, h, 0, w)), (0, 0), 1.5 * s)
    canvas *= 1.0 - np.float32(rng.uniform(0.25, 0.5)) * shadow[..., None]


def _camera(canvas: np.ndarray, rng: np.random.Generator, config: WorldConfig) -> np.ndarray:
    """Illumination, colour balance, blur and noise; float `[H, W, 3]` to uint8."""
    h, w = canvas.shape[:2]
    along, _ = axes(h, w, rng.uniform(0, 2 * math.pi))
    ramp = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    light = 1.0 + rng.uniform(0.0, 0.4) * (ramp - 0.5)
    balance = rng.uniform(0.92, 1.08, 3) * rng.uniform(0.85, 1.12)
    canvas = canvas * light[..., None] * balance.astype(np.float32)
    sigma = rng.uniform(0.0, config.blur) * config.detail * config.size / 128.0
    if sigma > 0.2:
        canvas = cv2.GaussianBlur(canvas, (0, 0), sigma)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.2, 1.0) * config.noise)
    return np.clip(np.round((canvas + noise) * 255.0), 0, 255).astype(np.uint8)
