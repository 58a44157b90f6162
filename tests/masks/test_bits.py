from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.masks import bits
from moduseg.masks.bits import PackedMasks
from tests import reference


@pytest.mark.parametrize("width", [2, 7, 8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("counting", ["numpy 2", "numpy 1"])
def test_counts_boxes_and_paint(
    width: int, counting: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if counting == "numpy 1":
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    masks = reference.random_masks(rng, 12, 21, width)
    masks[2], masks[3] = False, True
    packed = PackedMasks.of(torch.from_numpy(masks))
    assert packed.areas.tolist() == masks.sum((1, 2)).tolist()
    first, second = np.nonzero(np.ones((12, 12)))
    expected = (masks[:, None] & masks[None]).sum((2, 3))
    np.testing.assert_array_equal(packed.shared(first, second).reshape(12, 12), expected)
    for mask, box in zip(masks, packed.boxes().tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert box == [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
        else:
            assert box == [21, 0, width, 0]
    labels = rng.integers(1, 255, 12).astype(np.uint8)
    np.testing.assert_array_equal(
        packed.paint(labels, np.arange(12)), reference.rasterize(masks, labels, -np.arange(12))
    )
    order = rng.permutation(12)[:7]
    painted = reference.rasterize(masks[order], labels[:7], -np.arange(7))
    np.testing.assert_array_equal(packed.paint(labels[:7], order), painted)
    np.testing.assert_array_equal(packed.select(order).areas, packed.areas[order])


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0)])
def test_masks_of_any_memory_layout(order: tuple[int, int, int], rng: np.random.Generator) -> None:
    turned = torch.from_numpy(reference.random_masks(rng, 64, 64, 64)).permute(order)
    np.testing.assert_array_equal(PackedMasks.of(turned).words, PackedMasks.of(turned.contiguous()).words)


def test_disjoint_or_not() -> None:
    masks = torch.zeros((3, 2, 70), dtype=torch.bool)
    masks[0, 0, :65], masks[1, 0, 65:] = True, True
    assert PackedMasks.of(masks).are_disjoint
    masks[2, 0, 64] = True
    assert not PackedMasks.of(masks).are_disjoint
    assert PackedMasks.of(masks[:0]).are_disjoint


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_without_masks_or_pixels(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (1 << 16, 1):
        monkeypatch.setattr(bits, "_PAIR_WORDS", words)
        packed = PackedMasks.of(torch.zeros(shape, dtype=torch.bool))
        assert packed.areas.tolist() == [0] * shape[0]
        assert packed.paint(np.ones(shape[0], np.uint8), np.arange(shape[0])).shape == shape[1:]
        assert packed.boxes().shape == (shape[0], 4)


@pytest.mark.parametrize("words", [1 << 16, 1])
def test_pixels_shared_with_other_masks(words: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "_PAIR_WORDS", words)
    masks, others = reference.random_masks(rng, 5, 11, 70), reference.random_masks(rng, 3, 11, 70)
    counts = PackedMasks.of(torch.from_numpy(masks)).shared_with(PackedMasks.of(torch.from_numpy(others)))
    np.testing.assert_array_equal(counts, (masks[:, None] & others[None]).sum((2, 3)))
