"""The labelled picture as the page shows it: outlines thin at any size, small pictures enlarged, changes striped."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from moduseg.app.changes import WhatChanged
from moduseg.report.overlay import find_rims, overlay_labels, resize_image, resize_labels
from moduseg.result import ImagePrediction

MIN_SIDE, MAX_SIDE = 768, 1280
"""A picture grows by a whole factor while its longer side stays within the first, and shrinks to the second."""
_PIXELS_PER_OUTLINE = 640
"""An outline is a pixel wide for each so many pixels of the longer side."""
_STRIPES = 12
"""Stripes lie so many outlines apart."""


@dataclass(frozen=True)
class ShownPicture:
    """A picture at the size that the page shows.

    Attributes:
        painted: `[h, w, 3]` uint8, classes in colour.
        labels: `[h, w]` uint8, the class that is seen at each pixel.
    """

    painted: np.ndarray
    labels: np.ndarray


def choose_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the `(h, w)` at which a picture of `(H, W)` is shown."""
    longest = max(size)
    factor: float = max(1, MIN_SIDE // longest) if longest <= MAX_SIDE else MAX_SIDE / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def draw_picture(
    prediction: ImagePrediction, colours: np.ndarray, proposal: int | None = None, change: WhatChanged | None = None
) -> ShownPicture:
    """Draw a prediction.

    Args:
        prediction: of the picture.
        colours: `[256, 3]` uint8, row = label id.
        proposal: outlined in white on black; `None` for none.
        change: its pixels are striped; `None` for none.
    """
    size = choose_size((prediction.image.shape[0], prediction.image.shape[1]))
    image = prediction.image
    if size[0] > image.shape[0]:
        # The pixels of a small picture stay what they are.
        image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    image = resize_image(image, size)
    labels = resize_labels(prediction.label_map, size)
    width = max(1, round(max(size) / _PIXELS_PER_OUTLINE))
    painted = overlay_labels(image, labels, colours, outline=width)
    if change is not None and change.mask.any():
        _stripe(painted, resize_labels(change.mask, size), width)
    if proposal is not None:
        _outline(painted, resize_labels(prediction.get_mask(proposal), size), width)
    return ShownPicture(painted, labels)


def _stripe(painted: np.ndarray, mask: np.ndarray, width: int) -> None:
    """Draw slanting stripes, white beside black, into the pixels of a mask."""
    rows, columns = np.nonzero(mask)
    phase = (rows + columns) % (_STRIPES * width)
    for start, colour in ((0, 255), (width, 0)):
        is_stripe = (phase >= start) & (phase < start + width)
        painted[rows[is_stripe], columns[is_stripe]] = colour


def _outline(painted: np.ndarray, mask: np.ndarray, width: int) -> None:
    """Draw a white line along the inside of a mask, and a black one along its outside."""
    padded = np.pad(mask.view(np.uint8), width)
    rim = find_rims(padded, width)[width:-width, width:-width]
    painted[rim & ~mask] = 0
    painted[rim & mask] = 255
