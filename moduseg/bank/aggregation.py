"""Soft-masked aggregation: pool patch tokens by the share of each patch that a mask covers (docs/method.md, step 3)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.structures import Proposals, TokenMap

_MAX_LENGTHS = 1 << 18
"""Shared lengths of pixels and patches that are held at once: those of a side of 2048 pixels and patches of 16."""
_BLOCK = 1 << 22
"""Mask pixels turned into floats at once: bounds the memory, and stays near the cache on a CPU."""


def patch_coverage(masks: Tensor, patch_size: int) -> Tensor:
    """Return the fraction of each patch that each mask covers, for an image that was not resized.

    Args:
        masks: `[N, H, W]` bool; they may overlap.
        patch_size: side of a patch in pixels.

    Returns:
        `[N, h, w]` float32 in [0, 1], `h = ceil(H / patch_size)`; the part of a patch beyond the bottom or
        right border is padding and counts as uncovered.

    Raises:
        ValueError: `masks` is not `[N, H, W]` bool, or `patch_size < 1`.
    """
    _check_masks(masks)
    _check_patch_size(patch_size)
    return _count_pixels(masks, patch_size)


def coverage(masks: Tensor, token_map: TokenMap) -> Tensor:
    """Return the fraction of each patch of a token map that each mask covers, exact for resized images too.

    A pixel of the image is a rectangle of the input, and a patch gets the area it shares with the mask's rectangles, so
    nothing is resampled. At native size this is `patch_coverage`, to the last bit.

    Args:
        masks: `[N, H, W]` bool at the size of the image.
        token_map: the tokens to pool; its stride, image size and input size are used.

    Returns:
        `[N, h, w]` float32 in [0, 1] on the device of `masks`; padding counts as uncovered.

    Raises:
        ValueError: `masks` is not `[N, H, W]` bool of the image's size.
    """
    _check_masks(masks)
    if tuple(masks.shape[1:]) != tuple(token_map.image_size):
        raise ValueError(f"masks: got {tuple(masks.shape[1:])} pixels, expected the image's {token_map.image_size}")
    if tuple(token_map.input_size) == tuple(token_map.image_size):
        return _count_pixels(masks, token_map.stride)
    return _measure_shared_areas(masks, token_map.stride, token_map.input_size)


def proposal_coverage(proposals: Proposals, token_map: TokenMap) -> Tensor:
    """Return the `coverage` of proposals; for disjoint ones at native size by one histogram, with equal bits.

    Args:
        proposals: at the size of the image, on any device.
        token_map: the tokens to pool.

    Returns:
        `[N, h, w]` float32 in [0, 1], on the device of the tokens.

    Raises:
        ValueError: the proposals are not of the image's size.
    """
    device = token_map.tokens.device
    native = tuple(token_map.input_size) == tuple(token_map.image_size)
    if proposals.id_map is None or not native or tuple(proposals.id_map.shape) != tuple(token_map.image_size):
        return coverage(proposals.masks.to(device), token_map)
    return id_map_coverage(proposals.id_map.to(device), len(proposals), token_map.stride)


def id_map_coverage(id_map: Tensor, count: int, patch_size: int) -> Tensor:
    """Return the `patch_coverage` of the disjoint masks `id_map == 0 .. count - 1`, by one histogram over (id, patch).

    Args:
        id_map: `[H, W]` integers; a negative one means no mask.
        count: number of masks.
        patch_size: side of a patch in pixels.

    Returns:
        `[count, h, w]` float32 in [0, 1], equal to `patch_coverage` of the masks.

    Raises:
        ValueError: not an `[H, W]` integer map, an id that is not below `count`, `count < 0` or `patch_size < 1`.
    """
    if id_map.ndim != 2 or id_map.dtype.is_floating_point or id_map.dtype == torch.bool:
        raise ValueError(f"id_map: got {tuple(id_map.shape)} {id_map.dtype}, expected [H, W] of integers")
    _check_patch_size(patch_size)
    if count < 0 or (id_map.numel() and int(id_map.max()) >= count):
        raise ValueError(f"count: got {count}, expected more than every id of the map; try its largest id + 1")
    height, width = id_map.shape
    rows, columns = _num_patches(height, patch_size), _num_patches(width, patch_size)
    # Bin 0 collects the pixels of no mask. int32 is used where it suffices, which halves the memory.
    fits_int32 = (count + 1) * rows * columns < 1 << 31 and id_map.dtype == torch.int32
    dtype = torch.int32 if fits_int32 else torch.int64
    row = torch.arange(height, device=id_map.device, dtype=dtype)[:, None] // patch_size * columns
    column = torch.arange(width, device=id_map.device, dtype=dtype) // patch_size
    bins = id_map.to(dtype).clamp(min=-1).add_(1).mul_(rows * columns).add_(row + column)
    counts = torch.bincount(bins.flatten(), minlength=(count + 1) * rows * columns)
    return counts.view(count + 1, rows, columns)[1:].float() / patch_size**2


def harden(coverage: Tensor) -> Tensor:
    """Turn coverage into hard masks on the patch grid, for an ablation (`bank.aggregation=hard`).

    Args:
        coverage: `[N, h, w]` in [0, 1].

    Returns:
        `[N, h, w]` of 0 and 1, dtype of `coverage`: patches more than half covered; where a mask has none, its most
        covered patch (the first of equals, row by row). An empty mask stays empty.

    Raises:
        ValueError: `coverage` is not `[N, h, w]` float.
    """
    _check_coverage(coverage)
    if coverage.numel() == 0:
        return coverage.clone()
    flat = coverage.flatten(1)
    hard = flat > 0.5
    largest, first = flat.max(1, keepdim=True)
    only = torch.zeros_like(hard).scatter(1, first, largest > 0)
    return torch.where(hard.any(1, keepdim=True), hard, only).to(coverage.dtype).view_as(coverage)


def aggregate(tokens: Tensor, coverage: Tensor, normalize: bool = True) -> Tensor:
    """Pool one vector for each mask: `sum(W * F) / sum(W)`, L2-normalised.

    Args:
        tokens: `[h, w, C]` float, `F`.
        coverage: `[N, h, w]` float in [0, 1], `W`.
        normalize: `False` gives the pooled vector itself, which is what the bank stores.

    Returns:
        `[N, C]` float32; a row is all zeros where its mask covers nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_coverage(coverage)
    if tokens.ndim != 3 or tokens.shape[:2] != coverage.shape[1:]:
        raise ValueError(
            f"tokens: got {tuple(tokens.shape)} for a coverage of {tuple(coverage.shape)}, expected [h, w, C] "
            "and [N, h, w] on the same grid"
        )
    weights = coverage.float().flatten(1)
    total = weights.sum(1, keepdim=True)
    pooled = weights @ tokens.float().flatten(0, 1) / torch.where(total > 0, total, 1)
    return F.normalize(pooled, dim=1) if normalize else pooled


def _count_pixels(masks: Tensor, patch_size: int) -> Tensor:
    """Return `[N, h, w]` coverage at native size by counting pixels, down the rows first."""
    count, height, width = masks.shape
    rows, columns = _num_patches(height, patch_size), _num_patches(width, patch_size)
    pixels = masks.view(torch.uint8)
    if masks.device.type == "cpu" and patch_size <= 255:
        return torch.from_numpy(_count_in_bytes(pixels.numpy(), patch_size, (rows, columns))).div_(patch_size**2)
    down = F.pad(_sum_rows(pixels, patch_size).float(), (0, columns * patch_size - width))
    return down.view(count, rows, columns, patch_size).sum(3) / patch_size**2


def _count_in_bytes(pixels: np.ndarray, patch_size: int, grid: tuple[int, int]) -> np.ndarray:
    """Return the pixels in each patch, `[N, *grid]` float32, of `pixels [N, H, W]` uint8 of 0 and 1, on the CPU.

    NumPy adds rows to each other, and neighbouring bytes of them, in a third of PyTorch's time. `patch_size` is at most
    255, so that a byte holds the count of a column, and 16 bits that of a patch.
    """
    height, width = pixels.shape[1:]
    num_full, rest = divmod(height, patch_size)
    counts = np.empty((len(pixels), *grid), np.float32)
    # A few masks at a time, whose sums stay in the cache; what is beyond the right border stays 0.
    step = max(1, _BLOCK // max(1, height * width))
    sums = np.zeros((min(step, len(pixels)), grid[0], grid[1] * patch_size), np.uint8)
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step]
        down = sums[: len(part)]
        full_rows = part[:, : num_full * patch_size].reshape(len(part), num_full, patch_size, width)
        np.add.reduce(full_rows, axis=2, dtype=np.uint8, out=down[:, :num_full, :width])
        if rest:
            np.add.reduce(part[:, -rest:], axis=1, dtype=np.uint8, out=down[:, num_full, :width])
        across = down.reshape(len(part), *grid, patch_size)
        counts[start : start + step] = np.einsum("nrcp->nrc", across, dtype=np.uint16)
    return counts


def _sum_rows(pixels: Tensor, patch_size: int) -> Tensor:
    """Return `[N, h, W]`: sums of `patch_size` rows of `[N, H, W]` uint8; the last sum may have fewer rows."""
    count, height, width = pixels.shape
    # Bytes hold the count of a column of up to 255 pixels, and add up ten times as fast as wider integers.
    dtype, num_full = torch.uint8 if patch_size <= 255 else torch.int32, height // patch_size
    parts = [pixels[:, : num_full * patch_size].unflatten(1, (num_full, patch_size))] if num_full else []
    if height % patch_size:
        parts.append(pixels[:, None, num_full * patch_size :])
    sums = [part.sum(2, dtype=dtype) for part in parts]
    return torch.cat(sums, 1) if sums else pixels.new_zeros((count, 0, width))


def _measure_shared_areas(masks: Tensor, stride: int, input_size: tuple[int, int]) -> Tensor:
    """Return `[N, h, w]` coverage for a resized input: overlaps of pixels and patches, one axis after the other."""
    height, width = masks.shape[1:]
    down, across = _Overlaps(height, input_size[0], stride), _Overlaps(width, input_size[1], stride)
    area = down.unit * across.unit
    # All lengths are whole numbers, so sums are exact if the dtype can hold them. MPS has no float64.
    dtype = torch.float32 if area < 1 << 24 or masks.device.type == "mps" else torch.float64
    result = torch.zeros((len(masks), down.num_patches, across.num_patches), device=masks.device)
    step = max(1, _BLOCK // max(1, height * width))
    # A strip takes the patches of its long side in parts.
    for rows in down.split():
        lengths_down = down.measure(rows, masks.device).to(dtype)
        for columns in across.split():
            lengths_across = across.measure(columns, masks.device).to(dtype).T.contiguous()
            if masks.device.type == "cpu":
                part = _measure_in_boxes(masks.numpy(), lengths_down.numpy(), lengths_across.numpy(), area)
                result[:, rows, columns] = torch.from_numpy(part)
                continue
            for start in range(0, len(masks), step):
                shared = (lengths_down @ masks[start : start + step].to(dtype)) @ lengths_across
                result[start : start + step, rows, columns] = shared / area
    return result


def _measure_in_boxes(pixels: np.ndarray, down: np.ndarray, across: np.ndarray, area: int) -> np.ndarray:
    """Return the share of each patch that each mask covers, `[N, h, w]` float32, looking at the masks' boxes alone.

    Args:
        pixels: `[N, H, W]` bool.
        down: `[h, H]` float, the length that a pixel's row shares with a row of patches.
        across: `[W, w]` float, the same for columns.
        area: of a patch, in the units of both lengths.
    """
    result = np.zeros((len(pixels), len(down), across.shape[1]), np.float32)
    for index, mask in enumerate(pixels):
        rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
        if not rows.any():
            continue
        box_rows, box_columns = _span(rows), _span(columns)
        # The patches that the box touches: those that share a length with one of its rows, and of its columns.
        is_row_touched, is_column_touched = down[:, box_rows].max(axis=1) > 0, across[box_columns].max(axis=0) > 0
        if not (is_row_touched.any() and is_column_touched.any()):
            continue
        patch_rows, patch_columns = _span(is_row_touched), _span(is_column_touched)
        box = mask[box_rows, box_columns].astype(down.dtype)
        shared = (down[patch_rows, box_rows] @ box) @ across[box_columns, patch_columns]
        result[index, patch_rows, patch_columns] = shared / area
    return result


def _span(hit: np.ndarray) -> slice:
    """Return the slice from the first to the last true entry of `hit [L]`, one of which is true."""
    return slice(int(hit.argmax()), len(hit) - int(hit[::-1].argmax()))


class _Overlaps:
    """Lengths that pixels and patches share along one axis, in a common unit.

    Args:
        size: pixels of the image.
        input_size: pixels of the input.
        stride: of the patches, in pixels of the input.

    Attributes:
        num_patches: patches along the axis.
        unit: length of a patch.
    """

    def __init__(self, size: int, input_size: int, stride: int) -> None:
        divisor = math.gcd(size, input_size)
        self._size, self._pixel = size, input_size // divisor
        self.num_patches, self.unit = _num_patches(input_size, stride), stride * (size // divisor)

    def split(self) -> list[slice]:
        """Return the patches in parts whose lengths are held at once."""
        step = max(1, _MAX_LENGTHS // max(1, self._size))
        return [slice(start, start + step) for start in range(0, self.num_patches, step)]

    def measure(self, part: slice, device: torch.device) -> Tensor:
        """Return the lengths `[patches, size]` int64 of a part of the patches."""
        pixels = torch.arange(self._size, device=device) * self._pixel
        patches = torch.arange(self.num_patches, device=device)[part, None] * self.unit
        ends = torch.minimum(pixels + self._pixel, patches + self.unit)
        return (ends - torch.maximum(pixels, patches)).clamp(min=0)


def _num_patches(size: int, stride: int) -> int:
    return -(-size // stride)


def _check_masks(masks: Tensor) -> None:
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks: got {tuple(masks.shape)} {masks.dtype}, expected [N, H, W] bool")


def _check_coverage(coverage: Tensor) -> None:
    if coverage.ndim != 3 or not coverage.dtype.is_floating_point:
        raise ValueError(f"coverage: got {tuple(coverage.shape)} {coverage.dtype}, expected [N, h, w] float")


def _check_patch_size(patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, expected 1 or more pixels; try the backbone's stride")
