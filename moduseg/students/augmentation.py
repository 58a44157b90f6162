"""Random crops of training images: size, place and side, drawn from a generator that the caller seeds."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from moduseg.structures import IGNORE_INDEX
from moduseg.students.base import LabelledImage


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied.

    Attributes:
        crop: side of the square that a step sees, in pixels; a multiple of 32.
        min_scale, max_scale: the image is resized by a factor drawn between these, on a logarithmic scale.
        mirror: whether every second image is mirrored.
        brightness: a factor of the values is drawn from `[1 - brightness, 1 + brightness]`; 0 leaves them.

    Raises:
        ValueError: a number out of range.
    """

    crop: int = 320
    min_scale: float = 0.5
    max_scale: float = 2.0
    mirror: bool = True
    brightness: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 32:
            raise ValueError(f"crop: got {self.crop}, expected a multiple of 32 pixels; published recipes use 320")
        if not 0 < self.min_scale <= self.max_scale <= 8:
            raise ValueError(
                f"min_scale, max_scale: got {self.min_scale}, {self.max_scale}, expected 0 < min_scale <= max_scale "
                "<= 8; published recipes use 0.5 and 2"
            )
        if not 0 <= self.brightness < 1:
            raise ValueError(f"brightness: got {self.brightness}, expected 0 <= brightness < 1; 0 leaves values")


@dataclass(frozen=True)
class _Square:
    """Where a square lies in a resized image: `(height, width)` of that image, its top left corner, its side."""

    size: tuple[int, int]
    corner: tuple[int, int]
    side: int
    is_mirrored: bool

    def take(self, array: np.ndarray, interpolation: int, filling: int) -> np.ndarray:
        """Return the square of an array; what lies outside it has the value `filling`."""
        height, width = self.size
        resized = (
            array if array.shape[:2] == self.size else cv2.resize(array, (width, height), None, 0, 0, interpolation)
        )
        square = np.full((self.side, self.side, *array.shape[2:]), filling, np.uint8)
        top, left = self.corner
        part = resized[max(0, top) : max(0, top + self.side), max(0, left) : max(0, left + self.side)]
        y, x = max(0, -top), max(0, -left)
        square[y : y + part.shape[0], x : x + part.shape[1]] = part
        return np.ascontiguousarray(square[:, ::-1]) if self.is_mirrored else square


def crop_randomly(item: LabelledImage, settings: Augmentation, rng: np.random.Generator) -> LabelledImage:
    """Return a random square of a training image with its label map and weights.

    Args:
        item: of any size.
        settings: size of the square and how the image is varied.
        rng: decides; the same state gives the same square.

    Returns:
        A square of `crop` pixels. Outside the image it is black, 255 in the label map and 0 in the weights.
    """
    low, high = np.log(settings.min_scale), np.log(settings.max_scale)
    scale = float(np.exp(rng.uniform(low, high)))
    height, width = (max(1, round(side * scale)) for side in item.label_map.shape)
    square = _Square(
        (height, width),
        (_draw_offset(height, settings.crop, rng), _draw_offset(width, settings.crop, rng)),
        settings.crop,
        settings.mirror and bool(rng.integers(2)),
    )
    image = square.take(item.image, cv2.INTER_LINEAR, 0)
    if settings.brightness:
        factor = rng.uniform(1 - settings.brightness, 1 + settings.brightness)
        image = np.clip(image.astype(np.float32) * factor, 0, 255).astype(np.uint8)
    # The plain nearest pixel is that of a corner, half a pixel away from what the bilinear image shows.
    return LabelledImage(
        image,
        square.take(item.label_map, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX),
        None if item.weights is None else square.take(item.weights, cv2.INTER_NEAREST_EXACT, 0),
    )


def _draw_offset(length: int, side: int, rng: np.random.Generator) -> int:
    """Return where a square begins: inside a longer image, or so that a shorter one lies inside the square."""
    low, high = sorted((0, length - side))
    return int(rng.integers(low, high + 1))
