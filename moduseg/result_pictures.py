"""Pictures of a prediction: names on regions, the overlay above its legend, small ones for notebooks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np
from PIL import Image, ImageDraw

from moduseg.masks.palette import format_colour
from moduseg.report.annotations import PredictedObject
from moduseg.report.panel import draw_legend, load_font
from moduseg.report.pictures import encode_data_url, fit_size

Legend = Sequence[tuple[str, tuple[int, int, int]]]
"""Class names with their colours."""
_NOTEBOOK_SIDE = 560
"""Longer side of pictures in notebooks, in pixels, which keeps these small."""
_MIN_NAMED_SHARE = 0.005
"""Regions below this share of the picture get no name written on them."""


def write_names(picture: Image.Image, objects: Sequence[PredictedObject], classes: Sequence[str]) -> None:
    """Write the name of each object on its thickest place, dark on a light rim.

    Args:
        picture: written on, `H x W` pixels.
        objects: with masks `[H, W]`; small ones get no name.
        classes: names by id.
    """
    font, draw = load_font(max(11, round(max(picture.size) / 32))), ImageDraw.Draw(picture)
    for entry in objects:
        if entry.mask.sum() < _MIN_NAMED_SHARE * picture.width * picture.height:
            continue
        padded = np.pad(entry.mask.astype(np.uint8), 1)
        depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        name = classes[entry.label]
        half = font.getlength(name) / 2
        left = min(max(float(x), half + 2), picture.width - half - 2)
        draw.text((left, float(y)), name, fill="black", font=font, anchor="mm", stroke_width=2, stroke_fill="white")


def append_legend(overlay: Image.Image, legend: Legend) -> Image.Image:
    """Return a sheet with an overlay, and below it which colour is which class."""
    drawn = Image.fromarray(draw_legend(list(legend), overlay.width))
    sheet = Image.new("RGB", (max(overlay.width, drawn.width), overlay.height + drawn.height), "white")
    sheet.paste(overlay, (0, 0))
    sheet.paste(drawn, (0, overlay.height))
    return sheet


def to_html(overlay: Image.Image, legend: Legend, shares: Mapping[str, float], title: str) -> str:
    """Return what a notebook shows of a prediction.

    Args:
        overlay: the photograph with its classes in colour.
        legend: classes that are named below it.
        shares: their share of the picture, in [0, 1], by name.
        title: read out where the picture cannot be seen.
    """
    swatches = "".join(
        f'<span style="margin-right:1em;white-space:nowrap"><span style="display:inline-block;width:1em;height:1em;'
        f'background:{format_colour(colour)};border:1px solid #222;vertical-align:-.1em"></span> {escape(name)} '
        f"{100 * shares.get(name, 0):.1f} %</span>"
        for name, colour in legend
    )
    # A small picture is enlarged by a whole factor, pixel by pixel.
    width = overlay.width * max(1, _NOTEBOOK_SIDE // (2 * max(overlay.size)))
    size = f'width="{width}" style="image-rendering:pixelated" ' if width > overlay.width else ""
    return (
        f'<div><img {size}src="{encode_data_url(np.asarray(overlay), _NOTEBOOK_SIDE)}" alt="{escape(title)}">'
        f"<div>{swatches or 'background alone'}</div></div>"
    )


def encode_small_png(overlay: Image.Image, legend: Legend) -> bytes:
    """Return an overlay above its legend as a PNG of the size that notebooks show."""
    height, width = fit_size((overlay.height, overlay.width), _NOTEBOOK_SIDE)
    small = append_legend(overlay.resize((width, height), Image.Resampling.BOX), legend)
    file = io.BytesIO()
    # An eighth of the bytes of full colour, so that notebooks stay small.
    small.quantize(128).save(file, "PNG", optimize=True)
    return file.getvalue()
