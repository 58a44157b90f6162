"""How long a stage will take, said after its first images."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("moduseg")

_MIN_SECONDS = 60
"""A stage that takes less is not worth a line."""
_SLOW_BATCH = 300.0
"""Seconds of a first batch that is an estimate by itself; one that is faster was slowed by loading the models."""


class TimeEstimate:
    """Says once how long the images of a stage will take.

    Args:
        title: of the stage.
        num_images: images to process.
    """

    def __init__(self, title: str, num_images: int) -> None:
        self._title, self._num_left = title, num_images
        self._start = time.monotonic()
        self._num_batches, self._is_said = 0, False

    def update(self, num_images: int) -> None:
        """Note that a batch is done."""
        now = time.monotonic()
        self._num_left -= num_images
        self._num_batches += 1
        seconds = now - self._start
        if self._is_said:
            return
        if self._num_batches == 1 and seconds < _SLOW_BATCH:
            self._start = now
            return
        self._is_said = True
        per_image = seconds / max(num_images, 1)
        if per_image * self._num_left >= _MIN_SECONDS:
            log.info(
                "%s: %.2f s an image, about %s for the %d that are left",
                self._title,
                per_image,
                format_duration(per_image * self._num_left),
                self._num_left,
            )


def format_duration(seconds: float) -> str:
    """Return a duration as `3 min` or `5 h 20 min`."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
