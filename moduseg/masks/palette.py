"""The colours of label maps: those of the files, and those that people see in pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from moduseg.errors import ConfigError

SCHEMES = ("auto", "voc", "distinct", "colour_blind")
"""Ways to colour classes, see `choose_class_colours`."""

_NUM_IDS = 256
_LEVELS = 16
"""Values of red, green and blue that candidates have: 4,096 colours."""
_HUE_WORDS: dict[str, str] = {
    "red": "#e02828", "orange": "#f08a1e", "yellow": "#f0d21e", "green": "#2aa838", "cyan": "#1ec8dc",
    "turquoise": "#1ec8b4", "blue": "#2850e6", "purple": "#8228c8", "violet": "#8228c8", "magenta": "#e628c8",
    "pink": "#f06eaa", "brown": "#96643c",
}  # fmt: skip
"""Words for hues, each with a colour that everybody calls so. Black, grey and white are no hues: an overlay in them is
not told from the photograph."""
_HUE_WIDTH = np.pi / 36
"""Largest angle between the hue of a word and that of a class named after it."""
_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929],
     [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468],
     [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip
"""From linear RGB to Oklab (B. Ottosson, 2020), in which distances are about those that people see."""
_DEFICIENCIES = np.array(
    [[[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
     [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
     [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]]
)  # fmt: skip
"""What linear RGB looks like without red, green or blue cones (G. Machado et al., 2009, severity 1)."""


def voc_palette(n: int = _NUM_IDS) -> np.ndarray:
    """The PASCAL VOC colour map: the bits of the id, dealt to R, G, B from the highest bit down.

    Returns:
        `[n, 3]` uint8, row = label id; id 0 is black and id 255 the cream of ignored pixels.
    """
    ids = np.arange(n, dtype=np.uint32)
    palette = np.zeros((n, 3), dtype=np.uint32)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            palette[:, channel] |= bit << (7 - level)
    return palette.astype(np.uint8)


def choose_class_colours(
    classes: Sequence[str], named: Mapping[str, str] | None = None, scheme: str = "auto"
) -> np.ndarray:
    """Return the colours in which people see the classes; label files keep VOC's, whatever is chosen here.

    A class keeps its colour when others are appended to the list.

    Args:
        classes: names by id, background first.
        named: colours of one's own, name -> `#rrggbb`, which `auto` and `distinct` use.
        scheme: `auto`: a class whose name has a word for a hue ("blue crescent") is of that hue, the others as in
            `distinct`. `distinct`: each colour is as far from those before it as can be. `colour_blind`: the same as
            seen with and without each kind of cone. `voc`: PASCAL VOC's.

    Returns:
        `[256, 3]` uint8, row = label id; id 0 is black, id 255 VOC's cream, ids without a class have VOC's colour.

    Raises:
        ConfigError: no such scheme.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"colours: got {scheme!r}, expected one of {', '.join(SCHEMES)}; try auto")
    if scheme == "voc":
        return voc_palette()
    chosen = {} if scheme == "colour_blind" else dict(named or {})
    foreground = tuple(classes[1:])
    hues = tuple(_find_hue(name) if scheme == "auto" and name not in chosen else None for name in foreground)
    fixed = tuple(chosen.get(name) for name in foreground)
    palette = voc_palette()
    palette[1 : len(classes)] = _spread_colours(hues, fixed, scheme == "colour_blind")
    return palette


def parse_colour(text: str) -> tuple[int, int, int]:
    """Return red, green and blue, 0..255, of `#rrggbb`.

    Raises:
        ValueError: text of another form.
    """
    if re.fullmatch("#[0-9a-fA-F]{6}", text) is None:
        raise ValueError(f"colour: got {text!r}, expected #rrggbb; try #ff8000")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def format_colour(colour: Sequence[int] | np.ndarray) -> str:
    """Return `#rrggbb` of red, green and blue, 0..255."""
    return f"#{bytes(int(value) for value in colour).hex()}"


def simulate_deficiencies(colours: np.ndarray) -> np.ndarray:
    """Return how colours look to people without red, green or blue cones.

    Args:
        colours: `[N, 3]` uint8.

    Returns:
        `[3, N, 3]` float Oklab: lightness 0..1 and two axes of hue, for each kind of cone that is missing.
    """
    return np.stack([_to_oklab(_to_linear(colours) @ matrix.T) for matrix in _DEFICIENCIES])


def to_oklab(colours: np.ndarray) -> np.ndarray:
    """Return `[N, 3]` float Oklab of `[N, 3]` uint8 colours: lightness 0..1 and two axes of hue."""
    return _to_oklab(_to_linear(colours))


def _to_linear(colours: np.ndarray) -> np.ndarray:
    values = colours.astype(np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _to_oklab(linear: np.ndarray) -> np.ndarray:
    return np.cbrt(linear.clip(0, 1) @ _TO_LMS.T) @ _TO_LAB.T


def _find_hue(name: str) -> str | None:
    """Return the colour of the first word of a class name that is a hue; `None` if there is none."""
    words = re.findall("[a-z]+", name.lower())
    return next((_HUE_WORDS[word] for word in words if word in _HUE_WORDS), None)


@lru_cache(maxsize=8)
def _list_candidates(is_colour_blind: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return colours `[K, 3]` uint8 to choose from, neither pale nor dark, and how they look, `[V, K, 3]` Oklab."""
    levels = np.linspace(0, 255, _LEVELS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = to_oklab(colours)
    chroma = np.hypot(seen[:, 1], seen[:, 2])
    # Only lightness is seen by everybody, so that a palette for everybody uses more of it.
    darkest, lightest, palest = (0.35, 0.93, 0.06) if is_colour_blind else (0.5, 0.9, 0.11)
    is_usable = (seen[:, 0] > darkest) & (seen[:, 0] < lightest) & (chroma > palest) & (chroma < 0.27)
    colours = colours[is_usable]
    views = to_oklab(colours)[None]
    return colours, np.concatenate((views, simulate_deficiencies(colours))) if is_colour_blind else views


@lru_cache(maxsize=64)
def _spread_colours(hues: tuple[str | None, ...], fixed: tuple[str | None, ...], is_colour_blind: bool) -> np.ndarray:
    """Return `[C, 3]` uint8, each colour as far from those before it as its hue allows.

    Args:
        hues: of each class, a colour of the hue that its name says, or `None`.
        fixed: of each class, the colour that it has in any case, or `None`.
        is_colour_blind: whether colours have to differ without any one kind of cone too.
    """
    candidates, views = _list_candidates(is_colour_blind)
    angles = np.arctan2(views[0, :, 2], views[0, :, 1])
    # Nothing is painted in the colours of skin, sky and shadow that fill photographs; the first class keeps off them.
    taken = [np.array(colour, np.uint8) for colour in ((0, 0, 0), (255, 255, 255), (128, 128, 128), (205, 170, 140))]
    distances = np.full(len(candidates), np.inf)

    def keep_off(colour: np.ndarray) -> None:
        seen = to_oklab(colour[None])[None]
        if is_colour_blind:
            seen = np.concatenate((seen, simulate_deficiencies(colour[None])))
        np.minimum(distances, np.linalg.norm(views - seen, axis=2).min(0), out=distances)

    for colour in taken:
        keep_off(colour)
    # Colours of one's own are known before any is chosen.
    for text in fixed:
        if text is not None:
            keep_off(np.array(parse_colour(text), np.uint8))
    chosen = []
    for hue, text in zip(hues, fixed, strict=True):
        if text is not None:
            chosen.append(np.array(parse_colour(text), np.uint8))
            continue
        worth = distances
        if hue is not None:
            lab = to_oklab(np.array([parse_colour(hue)], np.uint8))[0]
            turn = np.abs((angles - np.arctan2(lab[2], lab[1]) + np.pi) % (2 * np.pi) - np.pi)
            worth = np.where(turn < _HUE_WIDTH, distances, -1)
        chosen.append(candidates[int(np.argmax(worth))])
        keep_off(chosen[-1])
    return np.array(chosen, np.uint8).reshape(-1, 3)
