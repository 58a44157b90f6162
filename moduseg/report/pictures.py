"""The pictures of a report page: small photographs, label maps and proposals as palette PNGs, crops of regions.

All are made to be looked at: nothing here is larger than a screen needs, and the same input gives the same bytes.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from zlib_ng import zlib_ng

from moduseg.datasets.png import SIGNATURE
from moduseg.masks.palette import voc_palette
from moduseg.report.overlay import dimmed, distinct_colours, resize_image, resize_labels
from moduseg.structures import IGNORE_INDEX

MAX_CODES = 254
"""Masks that one layer holds beside "none"."""
_QUALITY = 82
_MARGIN = 0.2
"""What a crop shows around its region, as a share of the region's longer side."""
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])
_BRIGHT = 150
"""What the colour of an outline has at least, of 255."""
_PALETTE = voc_palette()
_LAYER_COLOURS = np.concatenate([np.zeros((1, 3), np.uint8), distinct_colours(MAX_CODES)])

Colour = tuple[int, int, int]


def shown_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`(H, W)` at which an image of `size` is stored: never enlarged, its longer side at most `longest`."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def jpeg(image: np.ndarray) -> bytes:
    """`[H, W, 3]` uint8 RGB as a JPEG file."""
    done, data = cv2.imencode(
        ".jpg",
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1],
    )
    if not done:
        raise ValueError(f"picture: {image.shape} cannot be encoded as JPEG, expected [H, W, 3] uint8")
    return bytes(data)


def index_png(ids: np.ndarray, palette: np.ndarray) -> bytes:
    """An 8-bit palette PNG whose rows are stored unfiltered, so that whoever inflates it has the ids.

    Args:
        ids: `[H, W]` uint8, each below the palette's length.
        palette: `[n, 3]` uint8, `n` up to 256; no more of it than needed is stored.

    Raises:
        ValueError: an id that the palette does not have.
    """
    highest = int(ids.max(initial=0))
    if highest >= len(palette):
        raise ValueError(f"palette PNG: got id {highest}, expected 0..{len(palette) - 1} as the palette has colours")
    height, width = ids.shape
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = ids
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette[: highest + 1].astype(np.uint8).tobytes()),
        (b"IDAT", zlib_ng.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    )
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def label_png(labels: np.ndarray, size: tuple[int, int]) -> bytes:
    """A label map at the size of a page, as `index_png` with the VOC palette.

    Args:
        labels: `[H, W]` uint8, 255 where ignored.
        size: `(H, W)` to store it at, by nearest neighbour.
    """
    return index_png(resize_labels(labels, size), _PALETTE)


def shrink_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[N, h, w]` bool: masks (`[N, H, W]` bool) at the size of a page, by nearest neighbour; small ones may vanish."""
    shrunk = np.zeros((len(masks), *size), dtype=bool)
    for i, mask in enumerate(masks):
        shrunk[i] = resize_labels(np.ascontiguousarray(mask), size)
    return shrunk


def pack_layers(masks: np.ndarray) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Masks that may overlap as few id maps in which none do: large ones go first, each to the first map with room.

    Args:
        masks: `[N, h, w]` bool.

    Returns:
        The layers, `[h, w]` uint8 each; of every mask its layer and its id there. An empty mask has layer -1 and id 0.
    """
    layers: list[np.ndarray] = []
    used: list[int] = []
    layer_of, code_of = [-1] * len(masks), [0] * len(masks)
    areas = masks.reshape(len(masks), -1).sum(1) if len(masks) else np.zeros(0, int)
    for index in np.argsort(-areas, kind="stable").tolist():
        if not areas[index]:
            continue
        window = _window(masks[index])
        inside = masks[index][window]
        for number, layer in enumerate(layers):
            if used[number] < MAX_CODES and not layer[window][inside].any():
                break
        else:
            number = len(layers)
            layers.append(np.zeros(masks.shape[1:], np.uint8))
            used.append(0)
        used[number] += 1
        layers[number][window][inside] = used[number]
        layer_of[index], code_of[index] = number, used[number]
    return layers, layer_of, code_of


def layer_png(layer: np.ndarray) -> bytes:
    """One map of `pack_layers` as `index_png`, 0 black, the ids in distinct colours."""
    return index_png(layer, _LAYER_COLOURS)


def region_crop(image: np.ndarray, region: np.ndarray, label: int, side: int = 128) -> np.ndarray:
    """A region in its surroundings, outlined: what a bank entry was made of.

    Args:
        image: `[H, W, 3]` uint8.
        region: `[H, W]` bool; an empty one gives the whole image without an outline.
        label: its class, whose colour outlines it.
        side: of the square picture, in pixels.

    Returns:
        `[side, side, 3]` uint8.
    """
    height, width = region.shape
    if not region.any():
        top, left, bottom, right = 0, 0, height, width
    else:
        rows, columns = _window(region)
        top, bottom, left, right = rows.start, rows.stop, columns.start, columns.stop
    reach = max(bottom - top, right - left)
    # A square around the region's middle, moved and cut so that it stays inside the image.
    reach = min(round(reach * (1 + 2 * _MARGIN)) + 2, max(height, width))
    top = max(0, min((top + bottom - reach) // 2, height - reach))
    left = max(0, min((left + right - reach) // 2, width - reach))
    part = image[top : top + reach, left : left + reach]
    inside = region[top : top + reach, left : left + reach]
    square = np.full((side, side, 3), 24, np.uint8)
    factor = side / reach
    size = (max(1, min(side, round(part.shape[0] * factor))), max(1, min(side, round(part.shape[1] * factor))))
    shown = resize_image(np.ascontiguousarray(part), size).copy()
    _outline(shown, resize_labels(np.ascontiguousarray(inside), size), label)
    y, x = (side - size[0]) // 2, (side - size[1]) // 2
    square[y : y + size[0], x : x + size[1]] = shown
    return square


def outlined(image: np.ndarray, labels: np.ndarray, purified: np.ndarray, longest: int) -> np.ndarray:
    """A training image with its pseudo mask: what purification left is outlined, what it took away is dimmed.

    Args:
        image: `[H, W, 3]` uint8.
        labels: `[H, W]` uint8 pseudo mask, 255 where it is open.
        purified: the same after purification, 255 where it was taken away.
        longest: longer side of the picture in pixels.

    Returns:
        `[h, w, 3]` uint8.
    """
    size = shown_size(labels.shape, longest)
    if max(labels.shape) * 2 <= longest:
        factor = longest // max(labels.shape)
        size = (labels.shape[0] * factor, labels.shape[1] * factor)
    shown = resize_image(image, size)
    before, after = resize_labels(labels, size), resize_labels(purified, size)
    tinted = cv2.addWeighted(shown, 0.65, _PALETTE[before], 0.35, 0.0)
    painted = shown.copy()
    cv2.copyTo(tinted, ((before > 0) & (before != IGNORE_INDEX)).view(np.uint8), painted)
    cv2.copyTo(dimmed(painted, 0.6), (after == IGNORE_INDEX).view(np.uint8), painted)
    for label in np.unique(after).tolist():
        # The background's outline would only double those of the others.
        if label not in (0, IGNORE_INDEX):
            _outline(painted, after == label, label)
    return painted


def outline_colour(label: int) -> Colour:
    """The class's colour, brightened so that it shows on any photograph; the background's is white."""
    if label == 0:
        return 235, 235, 235
    colour = _PALETTE[label].astype(float)
    bright = float(colour @ _BRIGHTNESS)
    if bright < _BRIGHT:
        colour += (255 - colour) * (_BRIGHT - bright) / (255 - bright)
    red, green, blue = np.round(colour).astype(int).tolist()
    return red, green, blue


def _outline(picture: np.ndarray, region: np.ndarray, label: int) -> None:
    """Draw the contours of `region` into `picture`: a light line in a dark one, readable on every ground."""
    contours, _ = cv2.findContours(region.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # The background's runs around everything else, so it is drawn thin.
    width = 2 if label else 1
    cv2.drawContours(picture, contours, -1, (0, 0, 0), width + 2)
    cv2.drawContours(picture, contours, -1, outline_colour(label), width)


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return slice(top, top + height), slice(left, left + width)
