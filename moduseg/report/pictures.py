"""Make the pictures of a report: small photographs, label maps and proposals as palette PNGs, crops of regions.

No picture is larger than a screen needs, and equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from zlib_ng import zlib_ng

from moduseg.datasets.png import SIGNATURE
from moduseg.masks.palette import voc_palette
from moduseg.report.overlay import dim, make_distinct_colours, resize_image, resize_labels
from moduseg.structures import IGNORE_INDEX

MAX_CODES = 254
"""Masks in one layer; id 0 means "no mask"."""
_QUALITY = 82
_MARGIN = 0.2
"""Margin of a crop around its region, as a share of the region's longer side."""
_LUMA = np.array([0.299, 0.587, 0.114])
_MIN_BRIGHTNESS = 150
"""Least brightness of an outline's colour, of 255."""
_PALETTE = voc_palette()
_GREYS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
_LAYER_COLOURS = np.concatenate([np.zeros((1, 3), np.uint8), make_distinct_colours(MAX_CODES)])

Colour = tuple[int, int, int]


def fit_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Return the `(H, W)` at which an image is stored: its longer side is at most `max_side`, and it never grows."""
    factor = min(1.0, max_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return `[H, W, 3]` uint8 RGB as a JPEG file.

    Raises:
        ValueError: it cannot be encoded.
    """
    is_encoded, data = cv2.imencode(
        ".jpg",
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
        [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1],
    )
    if not is_encoded:
        raise ValueError(f"picture: {image.shape} cannot be encoded as JPEG, expected [H, W, 3] uint8")
    return bytes(data)


def encode_data_url(image: np.ndarray, max_side: int) -> str:
    """Return `[H, W, 3]` uint8 RGB as a JPEG inside an address, for pages of one file; it shrinks to `max_side`."""
    small = resize_image(image, fit_size((image.shape[0], image.shape[1]), max_side))
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(small)).decode()


def encode_index_png(ids: np.ndarray, palette: np.ndarray) -> bytes:
    """Return an 8-bit palette PNG with unfiltered rows, so that a reader who inflates it has the ids.

    Args:
        ids: `[H, W]` uint8, each below the palette's length.
        palette: `[n, 3]` uint8, `n` up to 256; only the part in use is stored.

    Raises:
        ValueError: an id without a colour in the palette.
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


def encode_label_png(labels: np.ndarray, size: tuple[int, int]) -> bytes:
    """Return a label map at the size of a page as a PNG with the VOC palette.

    Args:
        labels: `[H, W]` uint8, 255 where ignored.
        size: stored `(H, W)`; resized by nearest neighbour.
    """
    return encode_index_png(resize_labels(labels, size), _PALETTE)


def encode_grey_png(values: np.ndarray, size: tuple[int, int]) -> bytes:
    """Return `[H, W]` uint8 values at the size `(h, w)` of a page as a PNG with the 256 greys as its palette."""
    return encode_index_png(resize_labels(values, size), _GREYS)


def encode_heat_png(scores: np.ndarray, size: tuple[int, int]) -> bytes:
    """Return a map of scores at the size of a page as a PNG whose ids are steps of 1/255, in shades of grey.

    Args:
        scores: `[H, W]` float; values are cut off at 0 and 1.
        size: stored `(H, W)`; bilinear, or averages where the map shrinks.
    """
    steps = np.rint(resize_image(scores.astype(np.float32), size).clip(0, 1) * 255).astype(np.uint8)
    return encode_index_png(steps, _GREYS)


def shrink_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize masks (`[N, H, W]` bool) to `[N, h, w]` bool by nearest neighbour; small ones may vanish.

    Masks of that size are returned themselves.
    """
    if masks.shape[1:] == size:
        return masks
    shrunk = np.zeros((len(masks), *size), dtype=bool)
    for i, mask in enumerate(masks):
        shrunk[i] = resize_labels(np.ascontiguousarray(mask), size)
    return shrunk


@dataclass(frozen=True)
class PackedMasks:
    """Masks that may overlap, stored as few id maps without overlap.

    Attributes:
        layers: id maps, `[h, w]` uint8 each, 0 where there is no mask.
        layer_of: layer of each mask; -1 for an empty one.
        code_of: id of each mask in its layer; 0 for an empty one.
    """

    layers: list[np.ndarray]
    layer_of: list[int]
    code_of: list[int]


def pack_layers(masks: np.ndarray) -> PackedMasks:
    """Pack masks that may overlap into few id maps without overlap.

    Large masks go first, equal ones in index order, each into the first layer where it covers no other.

    Args:
        masks: `[N, h, w]` bool.
    """
    layers: list[np.ndarray] = []
    used: list[int] = []
    layer_of, code_of = [-1] * len(masks), [0] * len(masks)
    areas = masks.reshape(len(masks), -1).sum(1) if len(masks) else np.zeros(0, int)
    for index in np.argsort(-areas, kind="stable").tolist():
        if not areas[index]:
            continue
        window = _bounding_window(masks[index])
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
    return PackedMasks(layers, layer_of, code_of)


def encode_layer_png(layer: np.ndarray) -> bytes:
    """Return one layer of `pack_layers` as a palette PNG: 0 is black, the ids have distinct colours."""
    return encode_index_png(layer, _LAYER_COLOURS)


def crop_region(
    image: np.ndarray, region: np.ndarray, label: int, side: int = 128, *, colours: np.ndarray = _PALETTE
) -> np.ndarray:
    """Draw the outlined region of a bank entry with its surroundings.

    Args:
        image: `[H, W, 3]` uint8.
        region: `[H, W]` bool; an empty one gives the full image without an outline.
        label: its class, whose colour outlines it.
        side: the longer one of the picture, in pixels.
        colours: `[256, 3]` uint8 of the classes, row = label id.

    Returns:
        `[h, w, 3]` uint8: a square, unless the image is too narrow for one around the region.
    """
    height, width = region.shape
    if not region.any():
        top, left, bottom, right = 0, 0, height, width
    else:
        rows, columns = _bounding_window(region)
        top, bottom, left, right = rows.start, rows.stop, columns.start, columns.stop
    extent = max(bottom - top, right - left)
    # The square around the region's centre is moved and cut so that it stays inside the image.
    extent = min(round(extent * (1 + 2 * _MARGIN)) + 2, max(height, width))
    top = max(0, min((top + bottom - extent) // 2, height - extent))
    left = max(0, min((left + right - extent) // 2, width - extent))
    part = image[top : top + extent, left : left + extent]
    inside = region[top : top + extent, left : left + extent]
    factor = side / extent
    size = (max(1, min(side, round(part.shape[0] * factor))), max(1, min(side, round(part.shape[1] * factor))))
    shown = resize_image(np.ascontiguousarray(part), size).copy()
    _draw_outline(shown, resize_labels(np.ascontiguousarray(inside), size), label, colours)
    return shown


def draw_purification(
    image: np.ndarray, labels: np.ndarray, purified: np.ndarray, max_side: int, *, colours: np.ndarray = _PALETTE
) -> np.ndarray:
    """Draw a training image with its pseudo mask: outlines of what purification keeps, the rest of the mask dimmed.

    Args:
        image: `[H, W, 3]` uint8.
        labels: `[H, W]` uint8 pseudo mask, 255 where undecided.
        purified: `[H, W]` uint8 pseudo mask after purification, 255 where pixels were removed.
        max_side: longer side of the picture in pixels.
        colours: `[256, 3]` uint8 of the classes, row = label id.

    Returns:
        `[h, w, 3]` uint8.
    """
    size = fit_size(labels.shape, max_side)
    if max(labels.shape) * 2 <= max_side:
        factor = max_side // max(labels.shape)
        size = (labels.shape[0] * factor, labels.shape[1] * factor)
    shown = resize_image(image, size)
    before, after = resize_labels(labels, size), resize_labels(purified, size)
    tinted = cv2.addWeighted(shown, 0.65, colours[before], 0.35, 0.0)
    painted = shown.copy()
    cv2.copyTo(tinted, ((before > 0) & (before != IGNORE_INDEX)).view(np.uint8), painted)
    cv2.copyTo(dim(painted, 0.6), (after == IGNORE_INDEX).view(np.uint8), painted)
    for label in np.unique(after).tolist():
        # The background is skipped: its outline repeats those of the other classes.
        if label not in (0, IGNORE_INDEX):
            _draw_outline(painted, after == label, label, colours)
    return painted


def choose_outline_colour(label: int, colours: np.ndarray = _PALETTE) -> Colour:
    """Return the class's colour, brightened so that it shows on any photograph; white for the background."""
    if label == 0:
        return 235, 235, 235
    colour = colours[label].astype(float)
    brightness = float(colour @ _LUMA)
    if brightness < _MIN_BRIGHTNESS:
        colour += (255 - colour) * (_MIN_BRIGHTNESS - brightness) / (255 - brightness)
    red, green, blue = np.round(colour).astype(int).tolist()
    return red, green, blue


def _draw_outline(picture: np.ndarray, region: np.ndarray, label: int, colours: np.ndarray) -> None:
    """Draw the contours of `region` into `picture`: a light line inside a dark one, visible on any background."""
    contours, _ = cv2.findContours(region.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # The background's contour surrounds all other regions, so it is drawn thin.
    width = 2 if label else 1
    cv2.drawContours(picture, contours, -1, (0, 0, 0), width + 2)
    cv2.drawContours(picture, contours, -1, choose_outline_colour(label, colours), width)


def _bounding_window(mask: np.ndarray) -> tuple[slice, slice]:
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return slice(top, top + height), slice(left, left + width)
