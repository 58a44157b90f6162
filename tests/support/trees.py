"""Nested masks at random."""

from __future__ import annotations

import itertools

import numpy as np
import torch


def random_tree(rng: np.random.Generator, num_leaves: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks `[2 * num_leaves - 1, H, W]` and parents: columns of random widths, merged two by two, shuffled."""
    height, width = size
    edges = np.r_[0, np.sort(rng.choice(np.arange(1, width), num_leaves - 1, replace=False)), width].astype(int)
    spans = [(int(start), int(end)) for start, end in itertools.pairwise(edges)]
    parents = [-1] * (2 * num_leaves - 1)
    open_masks = list(range(num_leaves))
    while len(open_masks) > 1:
        place = int(rng.integers(len(open_masks) - 1))
        left, right = open_masks[place : place + 2]
        parents[left] = parents[right] = len(spans)
        open_masks[place : place + 2] = [len(spans)]
        spans.append((spans[left][0], spans[right][1]))
    masks = torch.zeros((len(spans), height, width), dtype=torch.bool)
    for mask, (start, end) in zip(masks, spans, strict=True):
        mask[:, start:end] = True
    order = rng.permutation(len(spans))
    positions = np.argsort(order)
    shuffled = [int(positions[parents[row]]) if parents[row] >= 0 else -1 for row in order]
    return masks[torch.from_numpy(order)], torch.tensor(shuffled)
