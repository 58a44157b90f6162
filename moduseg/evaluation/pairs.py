"""Counting of the pixels of many pairs of label maps, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moduseg.devices import count_workers
from moduseg.evaluation.boundary import boundary_counts, contour_width
from moduseg.evaluation.confusion import count_pixels
from moduseg.evaluation.counts import ImageCounts

Pair = tuple[np.ndarray, np.ndarray]
"""Truth and prediction of one image, `[H, W]` uint8 each."""

_CHUNK = 16
"""Images handed to a worker at once."""


def count_pairs(
    ids: Sequence[str],
    load: Callable[[str], Pair | None],
    num_labels: int,
    *,
    boundary_width: float = 0.0,
    workers: int = 0,
) -> Iterator[tuple[str, ImageCounts | None]]:
    """Count the pixels of every image.

    Workers are threads: decoding, counting and eroding release the interpreter's lock. The counts are integers and
    come in the order of `ids`, so that their number changes no bit of a result.

    Args:
        ids: the images.
        load: id -> truth (255 ignored) and prediction; `None` leaves the image out. Called from several threads.
        num_labels: labels, background included.
        boundary_width: width of contours as a share of the diagonal; 0 counts none.
        workers: threads; 1 works in the calling thread, 0 takes one for each core, 4 at most.

    Yields:
        Each id with its counts, or with `None` where it was left out.

    Raises:
        DataError: of `load`, or maps that do not fit (see `count_pixels`); the first in the order of `ids`.
    """

    def count(image_id: str) -> ImageCounts | None:
        pair = load(image_id)
        if pair is None:
            return None
        truth, prediction = pair
        confusion = count_pixels(truth, prediction, num_labels, image_id).numpy()
        if not boundary_width:
            return ImageCounts(confusion)
        width = contour_width(truth.shape, boundary_width)
        return ImageCounts(confusion, boundary_counts(truth, prediction, num_labels, width), width)

    num_workers = count_workers(workers)
    # Load the first image on its own: the data set caches its lists and label files before other threads start.
    for image_id in ids[:1] if num_workers > 1 else ids:
        yield image_id, count(image_id)
    if num_workers == 1:
        return
    chunks = [ids[i : i + _CHUNK] for i in range(1, len(ids), _CHUNK)]
    with ThreadPoolExecutor(num_workers, thread_name_prefix="score") as pool:
        waiting: deque[tuple[Sequence[str], Future[list[ImageCounts | None]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(lambda part: [count(i) for i in part], chunk)))
                if len(waiting) > 2 * num_workers:
                    yield from _take_first(waiting)
            while waiting:
                yield from _take_first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _take_first(
    waiting: deque[tuple[Sequence[str], Future[list[ImageCounts | None]]]],
) -> Iterator[tuple[str, ImageCounts | None]]:
    chunk, future = waiting.popleft()
    yield from zip(chunk, future.result(), strict=True)
