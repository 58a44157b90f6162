"""Overlapping masks as one map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.masks import id_maps
from moduseg.masks.id_maps import find_first


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        pytest.param([0, 1, 2], [0, 0, 0, 2, -1], id="the first mask of the order wins"),
        pytest.param([2, 1, 0], [2, 1, 0, 0, -1], id="positions count in the order"),
        pytest.param([1], [-1, 0, 0, -1, -1], id="some masks only"),
        pytest.param([], [-1, -1, -1, -1, -1], id="no mask"),
    ],
)
def test_first_mask_of_each_pixel(order: list[int], expected: list[int], device: torch.device) -> None:
    masks = torch.tensor([[[1, 1, 1, 0, 0]], [[0, 1, 1, 0, 0]], [[0, 0, 1, 1, 0]]], dtype=torch.bool, device=device)
    assert find_first(masks, torch.tensor(order, dtype=torch.int64, device=device)).tolist() == [expected]


@pytest.mark.parametrize("packed", [pytest.param(("cpu",), id="bits"), pytest.param((), id="ranks")])
def test_more_masks_than_a_byte_counts(
    packed: tuple[str, ...], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(id_maps, "PACKED", packed)
    monkeypatch.setattr(id_maps, "_BLOCK", 7000)
    masks = torch.from_numpy(rng.random((700, 9, 70)) < 0.004)
    order = torch.from_numpy(rng.permutation(700)[:600])
    covers = masks[order]
    expected = torch.where(covers.any(0), covers.to(torch.uint8).argmax(0), -1)
    assert int(expected.max()) > 255
    assert torch.equal(find_first(masks, order), expected)
