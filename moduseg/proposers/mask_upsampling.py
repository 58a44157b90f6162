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
"""Pixels of full-size logits that are held at once, by device, 4 bytes each: what caches hold, or a share of a GPU."""
_GROUP_BYTES = 1024
"""128 words of eight bytes, each at most 128 once they are added."""


@dataclass(frozen=True)
class Embedded:
    """An image, or a crop of one, as a promptable model has seen it.

    Attributes:
        features: what the model's decoder wants.
        size: `(H, W)` of the image in pixels.
        input_size: `(H', W')` of the image at the model's input, padding apart.
        padded_size: `(H, W)` of the padded input that mask logits cover, where they are cut back to `input_size` before
            they get the image's size; `None` where they cover the image itself.
    """

    features: Any
    size: tuple[int, int]
    input_size: tuple[int, int]
    padded_size: tuple[int, int] | None


def enlarge(logits: Tensor, embedded: Embedded) -> Iterator[Tensor]:
    """Mask logits at the size of the image, a few masks at a time.

    SAM enlarges twice, to the padded input and from there, cut back, to the image. Both steps are linear and separable,
    so that together they are one matrix a side, and the padded input is never filled in.

    Args:
        logits: `[N, h, w]` float32.
        embedded: the image that they are of.

    Yields:
        `[n, H, W]` float32, in the order of `logits`.
    """
    height, width = embedded.size
    target = _only_target(logits, embedded)
    if target is not None:
        yield from _enlarge_once(logits, target, embedded.size)
        return
    padded = embedded.padded_size or (None, None)
    rows = resize_matrix(logits.shape[1], padded[0], embedded.input_size[0], height, logits.device)
    columns = resize_matrix(logits.shape[2], padded[1], embedded.input_size[1], width, logits.device)
    at_once = max(1, CHUNK_PIXELS.get(logits.device.type, CHUNK_PIXELS["cpu"]) // (height * width))
    for chunk in logits.split(at_once):
        yield rows @ (chunk @ columns.T)


def _only_target(logits: Tensor, embedded: Embedded) -> tuple[int, int] | None:
    """On the CPU, the size that one bilinear step leads to, where one does all: the image is as large as the input."""
    if logits.device.type != "cpu" or not (embedded.padded_size is None or embedded.input_size == embedded.size):
        return None
    return embedded.padded_size or embedded.size


def _enlarge_once(logits: Tensor, target: tuple[int, int], size: tuple[int, int]) -> Iterator[Tensor]:
    """`enlarge` on the CPU where it is one bilinear step to `target`, cut to `size`.

    OpenCV takes a fifth of the time of matrix products for it.
    """
    at_once = max(1, CHUNK_PIXELS["cpu"] // (target[0] * target[1]))
    for chunk in logits.split(at_once):
        room = np.empty((len(chunk), *target), dtype=np.float32)
        for source, large in zip(chunk.numpy(), room, strict=True):
            cv2.resize(source, (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        yield torch.from_numpy(room[:, : size[0], : size[1]])


def resize_matrix(source: int, padded: int | None, inner: int, target: int, device: torch.device) -> Tensor:
    """`[target, source]` float32: bilinear resizing of one side to `padded`, cut back to `inner`, then to `target`.

    Args:
        source: cells that are resized.
        padded: side of the padded input; `None` where there is one step, from `source` to `target`.
        inner: how much of the padded input is image.
        target: pixels of the result.
        device: where the matrix is put.
    """
    steps = torch.eye(source, device=device)[None]
    if padded is not None:
        steps = F.interpolate(steps, size=padded, mode="linear", align_corners=False)[..., :inner]
    return F.interpolate(steps, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def hopeful(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """`[n]` int64, rows of the masks that are not far too unstable at the decoder's resolution.

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


def boxes(logits: Tensor, rows: Tensor, embedded: Embedded, threshold: float) -> tuple[Tensor, Tensor]:
    """Boxes of some masks at full size.

    Args:
        logits: `[N, h, w]` float32.
        rows: `[n]` int64, which.
        embedded, threshold: as everywhere.

    Returns:
        `[n, 4]` float32, x0, y0, x1, y1 of the outermost pixels, and `[n]` bool, whether there are pixels at all.
    """
    target = _only_target(logits, embedded)
    if target is not None:
        return _boxes_of_one_step(logits, rows, target, embedded.size, threshold)
    corners, filled = [logits.new_zeros(0, 4)], [torch.zeros(0, dtype=torch.bool, device=logits.device)]
    for chunk in enlarge(logits[rows], embedded):
        across, down = chunk.amax(1) > threshold, chunk.amax(2) > threshold
        (left, right), (top, bottom) = _ends(across), _ends(down)
        corners.append(torch.stack([left, top, right, bottom], dim=1).float())
        filled.append(down.any(1))
    return torch.cat(corners), torch.cat(filled)


def _boxes_of_one_step(
    logits: Tensor, rows: Tensor, target: tuple[int, int], size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """`boxes` on the CPU where one bilinear step leads to `target`: mask by mask, in blocks that stay in the cache."""
    large, above = np.empty(target, dtype=np.float32), np.empty(size, dtype=bool)
    level = np.float32(threshold)
    sources, found = logits.numpy(), np.zeros((len(rows), 4), dtype=np.float32)
    for box, row in zip(found, rows.tolist(), strict=True):
        cv2.resize(sources[row], (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        np.greater(large[: size[0], : size[1]], level, out=above)
        box[:] = cv2.boundingRect(above.view(np.uint8))
    filled = found[:, 2] > 0
    found[filled, 2:] += found[filled, :2] - 1
    return torch.from_numpy(found), torch.from_numpy(filled)


def stability(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """`[N]` float32: IoU at full size between the masks at a higher and at a lower cut-off; of masks with pixels."""
    low, high = threshold - options.stability_score_offset, threshold + options.stability_score_offset
    parts = [logits.new_zeros(0)]
    parts += [count_above(large, high) / count_above(large, low) for large in enlarge(logits, embedded)]
    return torch.cat(parts)


def count_above(logits: Tensor, level: float) -> Tensor:
    """`[N]` int64, how many of each mask's logits, `[N, H, W]` float32, are above `level`."""
    if logits.device.type != "cpu":
        return (logits > level).sum((1, 2))
    # NumPy compares and adds integers several times as fast as PyTorch does on a CPU: eight bytes in one addition, and
    # of no more words than a byte can count.
    count, pixels = len(logits), logits.shape[1] * logits.shape[2]
    groups = -(-pixels // _GROUP_BYTES)
    above = np.empty((count, groups * _GROUP_BYTES), dtype=np.uint8)
    above[:, pixels:] = 0
    np.greater(logits.numpy(), np.float32(level), out=above[:, :pixels].reshape(logits.shape).view(bool))
    words = above.view(np.uint64).reshape(count, groups, _GROUP_BYTES // 8)
    return torch.from_numpy(np.add.reduce(np.add.reduce(words, axis=2).view(np.uint8), axis=1, dtype=np.int64))


def _ends(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true position of each row of `[N, L]` bool, `[N]` each; every row has one."""
    hits = hit.to(torch.uint8)
    return hits.argmax(1), hit.shape[1] - 1 - hits.flip(1).argmax(1)
