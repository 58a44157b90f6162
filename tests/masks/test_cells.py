"""Cells of overlapping masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.masks.cells import split_into_cells
from tests import reference


@pytest.mark.parametrize("count", [pytest.param(36, id="as bits of a number"), pytest.param(90, id="as hashes")])
@pytest.mark.parametrize("size", [(1, 1), (1, 65), (40, 1), (23, 70)])
def test_any_order_has_the_same_cells(count: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    masks = rng.random((count, *size)) < rng.random((count, 1, 1)) ** 2
    masks[1], masks[2], masks[4] = False, True, masks[3]
    tensors = torch.from_numpy(masks)
    cell_of, cell_pixels = split_into_cells(tensors, in_any_order=True)
    _, expected = np.unique(masks.reshape(count, -1), axis=1, return_inverse=True)
    pairs = set(zip(cell_of.tolist(), expected.reshape(-1).tolist(), strict=True))
    assert len(pairs) == len(cell_pixels) == int(expected.max()) + 1
    assert cell_of[cell_pixels].tolist() == list(range(len(cell_pixels)))


def test_hashes_that_coincide_are_noticed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak:
        """Numbers of which the first line tells nothing."""

        def integers(self, *arguments: object, size: tuple[int, int], **more: object) -> np.ndarray:
            return np.arange(size[0])[:, None].astype(np.uint64) * (np.uint64(1) << np.arange(size[1], dtype=np.uint64))

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Weak())
    masks = torch.from_numpy(reference.random_masks(rng, 50, 9, 20))
    found, expected = split_into_cells(masks, in_any_order=True), split_into_cells(masks)
    assert torch.equal(found[0], expected[0])
