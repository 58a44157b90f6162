"""Mask logits of a promptable model at the size of the image: enlarged, counted, boxed, a few masks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.proposers.grid_options import GridOptions

CHUNK_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Pixels of full-size logits, 4 bytes each, that are held at once: they fit a CPU's cache, or take a share of a GPU."""
CERTAIN_STABILITY = 0.9
"""Least stability at the decoder's resolution of a mask whose points are skipped."""
_GROUP_BYTES = 1024
"""128 words of eight bytes are added at once, so that no byte of their sum exceeds 128."""


@dataclass(frozen=True)
class Embedded:
    """An image, or a crop of one, embedded by a promptable model.

    Attributes:
        features: the embedding, in the form that the model's decoder reads.
        size: `(H, W)` of the image in pixels.
        input_size: `(H', W')` of the image at the model's input, padding apart.
        padded_size: `(H, W)` of the padded input that mask logits cover, if they are cut back to `input_size` before
            they are resized to the image; `None` if they cover the image itself.
    """

    features: Any
    size: tuple[int, int]
    input_size: tuple[int, int]
    padded_size: tuple[int, int] | None


def enlarge(logits: Tensor, embedded: Embedded) -> Iterator[Tensor]:
    """Enlarge mask logits to the size of the image, a few masks at a time.

    SAM enlarges twice, to the padded input and from there, cut back, to the image. Both steps are linear and separable,
    so that together they are one matrix a side, and the padded input is never filled in.

    Args:
        logits: `[N, h, w]` float32.
        embedded: the image of the masks.

    Yields:
        `[n, H, W]` float32, in the order of `logits`.
    """
    height, width = embedded.size
    target = _get_single_target(logits, embedded)
    if target is not None:
        yield from _enlarge_once(logits, target, embedded.size)
        return
    padded = embedded.padded_size or (None, None)
    rows = make_resize_matrix(logits.shape[1], padded[0], embedded.input_size[0], height, logits.device)
    columns = make_resize_matrix(logits.shape[2], padded[1], embedded.input_size[1], width, logits.device)
    # Of a strip that lies, masks whose rows are not yet reduced to the few of the image are larger than the result.
    rows_held = height if logits.device.type == "cpu" else max(height, logits.shape[1])
    at_once = max(1, CHUNK_PIXELS.get(logits.device.type, CHUNK_PIXELS["cpu"]) // (rows_held * width))
    for chunk in logits.split(at_once):
        yield rows @ (chunk @ columns.T)


def _get_single_target(logits: Tensor, embedded: Embedded) -> tuple[int, int] | None:
    """Return the size after the only bilinear step; `None` if two steps are needed, or not on the CPU.

    One step is enough if the image has the size of the model's input.
    """
    if logits.device.type != "cpu" or not (embedded.padded_size is None or embedded.input_size == embedded.size):
        return None
    return embedded.padded_size or embedded.size


def _enlarge_once(logits: Tensor, target: tuple[int, int], size: tuple[int, int]) -> Iterator[Tensor]:
    """Enlarge on the CPU in one bilinear step to `target`, and cut to `size`.

    OpenCV needs a fifth of the time of matrix products.
    """
    at_once = max(1, CHUNK_PIXELS["cpu"] // (target[0] * target[1]))
    for chunk in logits.split(at_once):
        buffer = np.empty((len(chunk), *target), dtype=np.float32)
        for source, large in zip(chunk.numpy(), buffer, strict=True):
            cv2.resize(source, (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        yield torch.from_numpy(buffer[:, : size[0], : size[1]])


def make_resize_matrix(source: int, padded: int | None, inner: int, target: int, device: torch.device) -> Tensor:
    """Make the matrix that resizes one side to `padded`, cuts it to `inner`, and resizes it to `target`.

    Args:
        source: cells that are resized.
        padded: side of the padded input; `None` for one step, from `source` to `target`.
        inner: cells of the padded input that are image.
        target: pixels of the result.
        device: where the matrix is put.

    Returns:
        `[target, source]` float32.
    """
    steps = torch.eye(source, device=device)[None]
    if padded is not None:
        steps = F.interpolate(steps, size=padded, mode="linear", align_corners=False)[..., :inner]
    return F.interpolate(steps, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def find_possibly_stable(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """Return the rows of the masks that are not far too unstable at the decoder's resolution, `[n]` int64.

    On trained and on random weights, images of 96 to 512 pixels, the two stabilities were never further apart than 0.05
    and 0.8 over the square root of the area in cells (that of the lower cut-off); the margin is twice that.
    """
    if options.stability_score_thresh <= 0:
        return torch.arange(len(logits), device=logits.device)
    cells = logits.shape[1:]
    padded = embedded.padded_size or embedded.input_size
    rows, columns = (
        min(count, -(-count * inner // outer) + 1)
        for count, inner, outer in zip(cells, embedded.input_size, padded, strict=True)
    )
    inner = logits[:, :rows, :columns]
    area = count_above(inner, threshold - options.stability_score_offset)
    share = count_above(inner, threshold + options.stability_score_offset) / area
    return (share + 0.1 + 1.6 / area.sqrt() >= options.stability_score_thresh).nonzero()[:, 0]


def find_certain_cells(logits: Tensor, is_certain: Tensor, threshold: float, options: GridOptions) -> Tensor:
    """Return the cells that lie inside a stable mask of those whose predicted IoU is high.

    Args:
        logits: `[N, h, w]` float32 at the decoder's resolution.
        is_certain: `[N]` bool, whether a mask's predicted IoU is high.
        threshold: logits above it are inside a mask.
        options: the cut-offs of stability, which has to be at least `CERTAIN_STABILITY` here.

    Returns:
        `[h, w]` bool.
    """
    area = count_above(logits, threshold - options.stability_score_offset)
    core = count_above(logits, threshold + options.stability_score_offset)
    min_stability = max(CERTAIN_STABILITY, options.stability_score_thresh)
    is_chosen = is_certain & (area > 0) & (core >= min_stability * area)
    return ((logits > threshold) & is_chosen[:, None, None]).any(0)


def measure_boxes(logits: Tensor, rows: Tensor, embedded: Embedded, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the boxes of some masks at full size.

    Args:
        logits: `[N, h, w]` float32.
        rows: `[n]` int64, the masks.
        embedded: the image of the masks.
        threshold: logits above it are inside a mask.

    Returns:
        `[n, 4]` float32, x0, y0, x1, y1 of the outermost pixels, and `[n]` bool, whether there are pixels at all.
    """
    target = _get_single_target(logits, embedded)
    if target is not None:
        return _measure_boxes_once(logits, rows, target, embedded.size, threshold)
    corners, filled = [logits.new_zeros(0, 4)], [torch.zeros(0, dtype=torch.bool, device=logits.device)]
    for chunk in enlarge(logits[rows], embedded):
        boxes, has_pixels = _measure_enlarged(chunk, threshold)
        corners.append(boxes)
        filled.append(has_pixels)
    return torch.cat(corners), torch.cat(filled)


def measure_masks(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """Return box, pixels and stability of masks at full size, enlarged once, without waiting for the device.

    Returns:
        `[N, 6]` float32: x0, y0, x1, y1 of the outermost pixels, 1 if there are pixels and 0 if not, and the stability
        of `measure_stability`.
    """
    low, high = threshold - options.stability_score_offset, threshold + options.stability_score_offset
    parts = [logits.new_zeros(0, 6)]
    for chunk in enlarge(logits, embedded):
        boxes, has_pixels = _measure_enlarged(chunk, threshold)
        stability = count_above(chunk, high) / count_above(chunk, low)
        parts.append(torch.cat([boxes, has_pixels[:, None], stability[:, None]], dim=1))
    return torch.cat(parts)


def _measure_enlarged(enlarged: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the boxes `[n, 4]` float32 of full-size logits `[n, H, W]`, and whether there are pixels, `[n]` bool."""
    across, down = enlarged.amax(1) > threshold, enlarged.amax(2) > threshold
    (left, right), (top, bottom) = _find_ends(across), _find_ends(down)
    return torch.stack([left, top, right, bottom], dim=1).float(), down.any(1)


def _measure_boxes_once(
    logits: Tensor, rows: Tensor, target: tuple[int, int], size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """Return the boxes on the CPU after one bilinear step to `target`, one mask at a time, which stays in the cache."""
    large, above = np.empty(target, dtype=np.float32), np.empty(size, dtype=bool)
    level = np.float32(threshold)
    sources, corners = logits.numpy(), np.zeros((len(rows), 4), dtype=np.float32)
    for box, row in zip(corners, rows.tolist(), strict=True):
        cv2.resize(sources[row], (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        np.greater(large[: size[0], : size[1]], level, out=above)
        box[:] = cv2.boundingRect(above.view(np.uint8))
    # OpenCV gives width and height, both 0 for a mask without pixels.
    filled = corners[:, 2] > 0
    corners[filled, 2:] += corners[filled, :2] - 1
    return torch.from_numpy(corners), torch.from_numpy(filled)


def measure_stability(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """Return the IoU at full size between each mask at a higher and at a lower cut-off, `[N]` float32; needs pixels."""
    low, high = threshold - options.stability_score_offset, threshold + options.stability_score_offset
    parts = [logits.new_zeros(0)]
    parts += [count_above(large, high) / count_above(large, low) for large in enlarge(logits, embedded)]
    return torch.cat(parts)


def count_above(logits: Tensor, level: float) -> Tensor:
    """Count how many of each mask's logits, `[N, H, W]` float32, are above `level`, `[N]` int64."""
    if logits.device.type != "cpu":
        return (logits > level).sum((1, 2))
    # NumPy compares and adds integers several times as fast as PyTorch does on a CPU. Eight bytes are added at once, in
    # groups so small that no byte overflows.
    count, pixels = len(logits), logits.shape[1] * logits.shape[2]
    groups = -(-pixels // _GROUP_BYTES)
    above = np.empty((count, groups * _GROUP_BYTES), dtype=np.uint8)
    above[:, pixels:] = 0
    np.greater(logits.numpy(), np.float32(level), out=above[:, :pixels].reshape(logits.shape).view(bool))
    words = above.view(np.uint64).reshape(count, groups, _GROUP_BYTES // 8)
    return torch.from_numpy(np.add.reduce(np.add.reduce(words, axis=2).view(np.uint8), axis=1, dtype=np.int64))


def _find_ends(hit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last true position of each row of `[N, L]` bool, `[N]` each; every row needs one."""
    hits = hit.to(torch.uint8)
    return hits.argmax(1), hit.shape[1] - 1 - hits.flip(1).argmax(1)
