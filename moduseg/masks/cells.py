"""Overlapping masks as a partition of the image: pixels that the same masks cover form a cell.

An image has a few dozen cells and thousands of pixels, so that overlaps and label maps are computed on cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moduseg.masks.bits import PACKED, PackedMasks
from moduseg.masks.forest import paint_deepest
from moduseg.masks.rle import find_changes

_BITS = 36
"""Masks between two renumberings: a cell number (below 2^27) and this many bits fit into 63."""


def split_into_cells(
    masks: Tensor, values: Tensor | None = None, parents: Tensor | None = None, *, in_any_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the cells of an image.

    Args:
        masks: `[N, H, W]` bool.
        values: `[H, W]` integers 0..255 that split cells further.
        parents: `[N]` int64 of masks that may be nested (`Proposals.parents`). If they are, in one tree or in several
            beside each other, the same cells are made sooner on the CPU, in another order.
        in_any_order: the order of the cells does not matter, so that those of many masks are made sooner on the CPU.

    Returns:
        `cell_of [H * W]` int64, the cell of each pixel, and `cell_pixels [U]` int64, one pixel of each cell.
    """
    pixels = masks.flatten(1)
    code = torch.zeros(pixels.shape[1], dtype=torch.int64, device=masks.device)
    if values is not None:
        code = values.flatten().to(masks.device).long()
    deepest = hashed = None
    if parents is not None and masks.device.type in PACKED:
        deepest = paint_deepest(masks, parents.cpu().numpy())
    if deepest is None and in_any_order and values is None and masks.device.type in PACKED and len(masks) > _BITS:
        hashed = _split_by_hashes(masks)
    if hashed is not None:
        code = hashed
    elif deepest is not None:
        # The deepest mask of a pixel stands for all that cover it.
        code = (code * (len(masks) + 1) + torch.from_numpy(deepest).flatten() + 1).unique(return_inverse=True)[1]
    else:
        for start in range(0, max(len(pixels), 1), _BITS):
            for mask in pixels[start : start + _BITS]:
                code = code * 2 + mask
            code = code.unique(return_inverse=True)[1]
    # Any pixel of a cell represents it.
    cell_pixels = torch.zeros(int(code.max()) + 1 if len(code) else 0, dtype=torch.int64, device=masks.device)
    cell_pixels[code] = torch.arange(len(code), device=masks.device)
    return code, cell_pixels


def _split_by_hashes(masks: Tensor) -> Tensor | None:
    """Return the cell of each pixel, `[H * W]` int64, from where masks begin and end; `None` if two hashes coincide.

    Each mask has a random number. A pixel's hash is the exclusive or of the numbers of the masks that cover it, so that
    it changes at their outlines alone. Pixels of one cell have equal hashes; a second hash of other numbers tells if
    pixels of two cells have as well.
    """
    count, height, width = masks.shape
    mask, position = np.divmod(find_changes(PackedMasks.of(masks)), max(height * width, 1))
    numbers = np.random.default_rng(0).integers(0, 1 << 64, size=(2, count), dtype=np.uint64)
    hashes = np.zeros((2, height * width), np.uint64)
    for line, number in zip(hashes, numbers, strict=True):
        np.bitwise_xor.at(line, position, number[mask])
        np.bitwise_xor.accumulate(line, out=line)
    # Positions go down the columns.
    first_hash, second_hash = (line.reshape(width, height).T.reshape(-1) for line in hashes)
    _, pixels, cells = np.unique(first_hash, return_index=True, return_inverse=True)
    cells = cells.reshape(-1)
    if not np.array_equal(second_hash, second_hash[pixels][cells]):
        return None
    return torch.from_numpy(cells.astype(np.int64))


@dataclass(frozen=True)
class Cells:
    """The cells of one image; if `values` were given, all pixels of a cell have one value.

    Attributes:
        cover: `[U, N]` bool, whether a mask covers the cell.
        sizes: `[U]` int64, pixels of each cell.
        values: `[U]` int64, the value of each cell; zeros if omitted.
    """

    cover: np.ndarray
    sizes: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, masks: Tensor, values: Tensor | None = None, parents: Tensor | None = None) -> Cells:
        """Partition an image.

        Args:
            masks: `[N, H, W]` bool on any device.
            values: `[H, W]` integers 0..255 that split cells further, such as the ground truth.
            parents: `[N]` int64 of masks that may be nested, to be sooner done; see `split_into_cells`.

        Raises:
            ValueError: `masks` is not `[N, H, W]` bool, or `values` of another size.
        """
        if masks.ndim != 3 or masks.dtype != torch.bool:
            raise ValueError(f"masks: got {tuple(masks.shape)} {masks.dtype}, expected [N, H, W] bool")
        if values is not None and values.shape != masks.shape[1:]:
            raise ValueError(f"values: got {tuple(values.shape)}, expected the masks' {tuple(masks.shape[1:])}")
        cell_of, pixels = split_into_cells(masks, values, parents)
        sizes = torch.bincount(cell_of)
        value = pixels.new_zeros(len(sizes)) if values is None else values.flatten().to(masks.device).long()[pixels]
        return cls(masks.flatten(1)[:, pixels].T.cpu().numpy(), sizes.cpu().numpy(), value.cpu().numpy())

    @property
    def areas(self) -> np.ndarray:
        """`[N]` int64, pixels of each mask."""
        # Counts below 2^53 are exact in float64, whatever the order of the sums.
        return (self.cover.T.astype(np.float64) @ self.sizes).astype(np.int64)

    @cached_property
    def shared(self) -> np.ndarray:
        """`[N, N]` int64: pixels that each pair of masks shares; areas on the diagonal."""
        # Counts below 2^53 are exact in float64, whatever the order of the sums.
        cover = self.cover.astype(np.float64)
        return (cover.T @ (cover * self.sizes[:, None])).astype(np.int64)

    @cached_property
    def ious(self) -> np.ndarray:
        """`[N, N]` float64: intersection over union of each pair of masks, 0 if both are empty."""
        areas = self.shared.diagonal()
        return self.shared / np.maximum(areas[:, None] + areas - self.shared, 1)

    def suppress(self, order: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
        """Return the masks of `order` that greedy NMS within each label keeps, in this order.

        Args:
            order: `[K]` indices of masks, best first.
            labels: `[N]` integers.
            iou_threshold: in [0, 1].
        """
        is_suppressed = np.zeros(len(labels), dtype=bool)
        kept = []
        for index in order:
            if not is_suppressed[index]:
                kept.append(index)
                is_suppressed |= (labels == labels[index]) & (self.ious[index] > iou_threshold)
        return np.array(kept, dtype=np.int64)

    def paint(self, order: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return `[U]` int64: the label of the first foreground mask of `order` that covers each cell, else 0.

        Args:
            order: `[K]` indices of masks.
            labels: `[N]` integers, 0 background.
        """
        order = order[labels[order] > 0]
        if not len(order):
            return np.zeros(len(self.sizes), dtype=np.int64)
        hit = self.cover[:, order]
        return np.where(hit.any(1), labels[order][hit.argmax(1)], 0)
