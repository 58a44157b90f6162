"""Trees of nested masks, given by the parent of each (`Proposals.parents`); several trees are a forest."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from moduseg.masks.bits import PackedMasks


def order_parents_first(parents: np.ndarray) -> np.ndarray:
    """Return the masks by their depth, so that each comes after its parent; equally deep ones by the parent's place.

    Args:
        parents: `[N]` int64, -1 for a root, without circles.

    Returns:
        `[N]` int64, a permutation.
    """
    children: dict[int, list[int]] = {}
    for index, parent in enumerate(parents.tolist()):
        children.setdefault(parent, []).append(index)
    order = list(children.get(-1, ()))
    for index in order:  # grows on the way
        order.extend(children.get(index, ()))
    return np.array(order, dtype=np.int64)


def measure_depths(parents: np.ndarray) -> np.ndarray:
    """Return `[N]` int64: how many ancestors each mask has; arguments as `order_parents_first`."""
    depths = np.zeros(len(parents) + 1, dtype=np.int64)
    depths[-1] = -1  # what stands above the roots
    for index in order_parents_first(parents):
        depths[index] = depths[parents[index]] + 1
    return depths[:-1]


def are_nested(cover: np.ndarray, parents: np.ndarray) -> bool:
    """Return whether masks are nested as their parents say, and in no other way.

    That is so if each lies within its parent, and no two share a pixel of which none is an ancestor of the other. It
    does not hold for several trees over the same pixels.

    Args:
        cover: `[U, N]` bool, whether a mask covers a pixel, or a cell of pixels that the same masks cover.
        parents: `[N]` int64, -1 for a root, without circles.
    """
    is_child = parents >= 0
    if bool((cover[:, is_child] & ~cover[:, parents[is_child]]).any()):
        return False
    # A pixel's masks hold all ancestors of the deepest one of them, and are nested if there are no others.
    deepest = (cover * (measure_depths(parents) + 1)).max(axis=1, initial=0)
    return bool((cover.sum(axis=1) == deepest).all())


def paint_deepest(masks: Tensor, parents: np.ndarray) -> np.ndarray | None:
    """Return the deepest mask of each pixel, if masks are nested as `are_nested` means it.

    Args:
        masks: `[N, H, W]` bool on the CPU.
        parents: `[N]` int64, -1 for a root, without circles.

    Returns:
        `[H, W]` int64, -1 where no mask is; `None` if the masks are not nested.
    """
    boxes = PackedMasks.of(masks).boxes()
    pixels = masks.numpy()
    deepest = np.full(pixels.shape[1:], -1, dtype=np.int64)
    for index in order_parents_first(parents):
        top, bottom, left, right = boxes[index]
        window, mask = deepest[top:bottom, left:right], pixels[index, top:bottom, left:right]
        # Every pixel of the mask is its parent's as yet: else it leaves its parent, or another child was there.
        if (window[mask] != parents[index]).any():
            return None
        window[mask] = index
    return deepest
