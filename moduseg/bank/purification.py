"""Boundary purification: the bank takes only pixels that are far from other classes (docs/method.md, step 2)."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.structures import IGNORE_INDEX


def purify(label_map: Tensor, kernel_size: int, iterations: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Erode every class of a label map at once.

    The result is that of eroding each class's binary mask (background included) by an all-ones square kernel,
    `iterations` times: a pixel stays iff its window of `iterations * (kernel_size - 1) + 1` pixels a side, clipped at
    the image border, holds one value only. The border does not erode; ignore pixels erode their neighbours and stay.

    Args:
        label_map: `[H, W]` integer ids below 2^24 in magnitude, `ignore_index` included.
        kernel_size: side of the kernel in pixels, odd.
        iterations: number of erosions; 0 changes nothing.
        ignore_index: value of removed pixels.

    Returns:
        `[H, W]`, dtype and device of `label_map`; never the same storage.

    Raises:
        ValueError: not an `[H, W]` integer map, an even or non-positive kernel, a negative number of iterations, or an
            `ignore_index` that the map's dtype cannot hold.
    """
    _check_label_map(label_map)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number >= 1; try 3")
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, expected 0 or more; try 20, or 0 for no erosion")
    limits = torch.iinfo(label_map.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index: got {ignore_index}, which {label_map.dtype} cannot hold; try a wider dtype")
    window = iterations * (kernel_size - 1) + 1
    if window == 1 or label_map.numel() == 0:
        return label_map.clone()
    if label_map.device.type == "cpu" and int(label_map.min()) >= 0 and int(label_map.max()) <= 255:
        is_pure = _is_uniform_opencv(label_map.to(torch.uint8), window)
    else:
        is_pure = _is_uniform(label_map, window)
    return torch.where(is_pure, label_map, ignore_index)


def class_regions(label_map: Tensor, min_area: int, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Return one mask for each class of a label map, background (0) included.

    Args:
        label_map: `[H, W]` integer class ids.
        min_area: classes with fewer pixels are skipped.
        ignore_index: value of pixels without a class.

    Returns:
        `class_ids [R]` int64, ascending, and `masks [R, H, W]` bool.

    Raises:
        ValueError: not an `[H, W]` integer map, or a negative area.
    """
    _check_label_map(label_map)
    if min_area < 0:
        raise ValueError(f"min_area: got {min_area}, expected 0 or more pixels; try 300")
    class_ids, areas = label_map.unique(return_counts=True)
    class_ids = class_ids[(class_ids != ignore_index) & (areas >= min_area)]
    return class_ids.long(), label_map == class_ids[:, None, None]


def _is_uniform(label_map: Tensor, window: int) -> Tensor:
    """Return `[H, W]` bool: the window around the pixel has one value. Max-pooling pads with minus infinity."""
    values = label_map.float()
    signed = torch.stack((values, -values))[:, None]
    half = window // 2
    signed = F.max_pool2d(signed, (window, 1), stride=1, padding=(half, 0))
    signed = F.max_pool2d(signed, (1, window), stride=1, padding=(0, half))[:, 0]
    return signed[0] == -signed[1]


def _is_uniform_opencv(label_map: Tensor, window: int) -> Tensor:
    """Return what `_is_uniform` does, for uint8 on the CPU, where OpenCV is several times faster than pooling."""
    values = label_map.contiguous().numpy()
    kernel = np.ones((window, window), np.uint8)
    highest = cv2.dilate(values, kernel, borderType=cv2.BORDER_REPLICATE)
    lowest = cv2.erode(values, kernel, borderType=cv2.BORDER_REPLICATE)
    return torch.from_numpy(highest == lowest)


def _check_label_map(label_map: Tensor) -> None:
    dtype = label_map.dtype
    if label_map.ndim != 2 or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"label_map: got {tuple(label_map.shape)} {dtype}, expected [H, W] of integers")
