"""How the miniature world looks: outlines of objects, their surfaces, and the textures behind them.

Lengths are in pixels; `s` is the size of textures and patterns relative to a scene of 128 pixels. Every function takes
its randomness from the generator it is given, in a fixed order of calls, so that equal seeds draw equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

# Outlines -------------------------------------------------------------------------------------------------------------


def circle(radius: float, points: int = 40, start: float = 0.0, stop: float = 2 * math.pi) -> np.ndarray:
    """`[points, 2]` float64 on a circle about the origin, from angle `start` to `stop`, open unless it closes."""
    angles = np.linspace(start, stop, points, endpoint=stop - start < 2 * math.pi - 1e-6)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def outline(shape: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Contours of a shape inside the unit circle, each `[P, 2]` float; a second contour is a hole."""
    if shape == "disc":
        return [circle(0.92)]
    if shape == "ring":
        return [circle(1.0), circle(rng.uniform(0.45, 0.62))]
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
    outer_arc = circle(1.0, 30, opening, 2 * math.pi - opening)
    inner_arc = circle(inner, 24, half, 2 * math.pi - half)[::-1] + [centre, 0.0]
    return [np.concatenate([outer_arc, inner_arc]) + [0.2, 0.0]]


def fill(contours: Sequence[np.ndarray], window: tuple[int, int, int, int]) -> np.ndarray:
    """Anti-aliased coverage of `contours` (image coordinates) on `window` (y0, y1, x0, x1): float32 in [0, 1]."""
    y0, y1, x0, x1 = window
    canvas = np.zeros((y1 - y0, x1 - x0), np.uint8)
    fixed = [np.round((c - [x0, y0]) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(canvas, fixed, 255, lineType=cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255.0


def hsv(hue: np.ndarray | float, saturation: np.ndarray | float, value: np.ndarray) -> np.ndarray:
    """RGB float32 `[H, W, 3]` in [0, 1] from hue in degrees and saturation, value in [0, 1] (broadcast over pixels)."""
    planes = [np.broadcast_to(np.asarray(p, np.float32), value.shape) for p in (np.mod(hue, 360.0), saturation, value)]
    stacked = np.stack(planes, axis=-1)
    np.clip(stacked[..., 1:], 0.0, 1.0, out=stacked[..., 1:])
    return cv2.cvtColor(stacked, cv2.COLOR_HSV2RGB)


# Textures -------------------------------------------------------------------------------------------------------------


def noise(rng: np.random.Generator, h: int, w: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise in about [-1, 1] whose features measure `cell_y` x `cell_x` pixels."""
    grid = rng.uniform(-1.0, 1.0, (max(2, round(h / cell_y) + 1), max(2, round(w / cell_x) + 1))).astype(np.float32)
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC)


def axes(h: int, w: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates along and across `angle`, each `[H, W]` float32."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _grass(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    blades = noise(rng, h, w, 6 * s, 1.5 * s) + 0.5 * noise(rng, h, w, 3 * s, 1.5 * s)
    patches = noise(rng, h, w, 30 * s, 30 * s)
    return hsv(rng.uniform(75, 135) + 10 * patches, rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.65) + 0.12 * blades)


def _sky(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    clouds = noise(rng, h, w, 18 * s, 36 * s) + 0.5 * noise(rng, h, w, 8 * s, 14 * s)
    haze = np.linspace(0.0, rng.uniform(0.0, 0.25), h, dtype=np.float32)[:, None]
    return hsv(
        rng.uniform(185, 235),
        rng.uniform(0.3, 0.6) - 0.18 * clouds - haze,
        rng.uniform(0.7, 0.9) + 0.08 * clouds,
    )


def _sand(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    grain = rng.normal(0.0, 1.0, (h, w)).astype(np.float32)
    dunes = noise(rng, h, w, 14 * s, 40 * s)
    return hsv(rng.uniform(34, 56), rng.uniform(0.25, 0.5), rng.uniform(0.6, 0.85) + 0.05 * grain + 0.06 * dunes)


def _water(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    _, across = axes(h, w, rng.uniform(-0.2, 0.2))
    waves = np.sin(across * 2 * math.pi / (rng.uniform(6, 11) * s) + 2.5 * noise(rng, h, w, 10 * s, 20 * s))
    return hsv(rng.uniform(175, 245), rng.uniform(0.35, 0.65) - 0.1 * waves, rng.uniform(0.4, 0.65) + 0.09 * waves)


def _brick(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    height, width = rng.uniform(7, 12) * s, rng.uniform(15, 24) * s
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    row = np.floor(y / height)
    column = np.floor(x / width + 0.5 * (row % 2))
    mortar = ((y % height) < 1.3 * s) | (((x + 0.5 * width * (row % 2)) % width) < 1.3 * s)
    tint = rng.uniform(-1, 1, (64, 64)).astype(np.float32)[row.astype(int) % 64, column.astype(int) % 64]
    value = np.where(mortar, 0.7, rng.uniform(0.45, 0.65) + 0.08 * tint)
    return hsv(rng.uniform(0, 22), np.where(mortar, 0.1, rng.uniform(0.4, 0.65)), value.astype(np.float32))


def _wood(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    along, across = axes(h, w, rng.choice([0.0, math.pi / 2]) + rng.uniform(-0.1, 0.1))
    grain = np.sin(across / (rng.uniform(1.4, 2.6) * s) + 3.0 * noise(rng, h, w, 22 * s, 22 * s) + 0.02 * along)
    plank = (across % (rng.uniform(22, 34) * s)) < 1.2 * s
    value = rng.uniform(0.45, 0.7) + 0.07 * grain - 0.2 * plank
    return hsv(rng.uniform(20, 38), rng.uniform(0.4, 0.65), value.astype(np.float32))


def _stone(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    relief = noise(rng, h, w, 12 * s, 12 * s) + 0.6 * noise(rng, h, w, 5 * s, 5 * s)
    cracks = np.abs(noise(rng, h, w, 26 * s, 26 * s)) < 0.035
    value = rng.uniform(0.4, 0.7) + 0.09 * relief - 0.18 * cracks
    return hsv(rng.uniform(0, 360), rng.uniform(0.02, 0.16), value.astype(np.float32))


def _fabric(rng: np.random.Generator, h: int, w: int, s: float) -> np.ndarray:
    along, across = axes(h, w, rng.uniform(0, math.pi))
    period = rng.uniform(8, 16) * s
    weave = np.sign(np.sin(along * 2 * math.pi / period)) + np.sign(np.sin(across * 2 * math.pi / period))
    thread = rng.normal(0.0, 0.03, (h, w)).astype(np.float32)
    return hsv(rng.uniform(265, 345), rng.uniform(0.22, 0.5), rng.uniform(0.5, 0.75) + 0.07 * weave + thread)


TEXTURES: dict[str, Callable[[np.random.Generator, int, int, float], np.ndarray]] = {
    "grass": _grass, "sky": _sky, "sand": _sand, "water": _water,
    "brick": _brick, "wood": _wood, "stone": _stone, "fabric": _fabric,
}  # fmt: skip
STUFF: tuple[str, ...] = tuple(TEXTURES)
"""Names of the background textures."""


_PATTERNS = ("plain", "gradient", "stripes", "dots", "noise")
USUAL_PATTERNS = {
    "disc": "dots", "star": "stripes", "ring": "plain", "triangle": "dots", "crescent": "stripes", "cross": "plain",
}  # fmt: skip

_TRIMS = ("light", "dark", "none")
USUAL_TRIMS = {
    "disc": "light",
    "star": "dark",
    "ring": "light",
    "triangle": "dark",
    "crescent": "light",
    "cross": "dark",
}


def trim(
    rng: np.random.Generator, skin: np.ndarray, alpha: np.ndarray, radius: float, *, usual: str, loyalty: float
) -> np.ndarray:
    """`skin` with a light or dark rim inside the outline `alpha`; the `usual` one with chance `loyalty`."""
    kind = usual if rng.random() < loyalty else _TRIMS[int(rng.integers(len(_TRIMS)))]
    width = int(np.clip(round(radius * rng.uniform(0.1, 0.2)), 1, 5))
    lightness = rng.uniform(0.88, 1.0) if kind == "light" else rng.uniform(0.02, 0.16)
    if kind == "none":
        return skin
    # The rim keeps a trace of the object's hue, as paint and shadow do.
    colour = (lightness * (0.85 + 0.15 * skin.reshape(-1, 3).mean(0))).astype(np.float32)
    padded = cv2.copyMakeBorder(alpha, width, width, width, width, cv2.BORDER_REPLICATE)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    core = cv2.erode(padded, disc)[width:-width, width:-width]
    return skin + (1.0 - core)[..., None] * (colour - skin)


def surface(
    rng: np.random.Generator, h: int, w: int, s: float, hue: float, *, usual: str = "plain", loyalty: float = 0.0
) -> np.ndarray:
    """Surface of an object, `[H, W, 3]` float32 RGB: hue of its family, `usual` pattern with chance `loyalty`."""
    saturation, value = rng.uniform(0.55, 1.0), rng.uniform(0.55, 1.0)
    contrast = rng.uniform(0.15, 0.34)
    pattern = int(rng.integers(5))
    if rng.random() < loyalty:
        pattern = _PATTERNS.index(usual)
    base = np.zeros((h, w), np.float32)
    if pattern == 1:  # gradient
        along, _ = axes(h, w, rng.uniform(0, 2 * math.pi))
        base = (along - along.mean()) / max(float(np.ptp(along)), 1.0) * 2.0
    elif pattern == 2:  # stripes
        along, _ = axes(h, w, rng.uniform(0, math.pi))
        base = np.sign(np.sin(along * 2 * math.pi / (rng.uniform(4, 10) * s) + rng.uniform(0, 6)))
    elif pattern == 3:  # dots
        along, across = axes(h, w, rng.uniform(0, math.pi))
        period = rng.uniform(5, 9) * s
        base = np.where(np.sin(along * 2 * math.pi / period) * np.sin(across * 2 * math.pi / period) > 0.3, 1.0, -0.4)
    elif pattern == 4:  # noise
        base = noise(rng, h, w, 4 * s, 4 * s)
    # Half of the patterns modulate lightness, half fade towards white: both happen on real surfaces.
    if rng.random() < 0.5:
        return hsv(hue, saturation, (value - contrast * (0.5 - 0.5 * base)).astype(np.float32))
    return hsv(hue, saturation - contrast * (0.5 + 0.5 * base), np.full((h, w), value, np.float32))
