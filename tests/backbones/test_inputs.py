"""Images become batches: equal keys share one, padding is black, sizes are multiples of the patch."""

from __future__ import annotations

import pytest
import torch

from moduseg.backbones.inputs import batch_equal, pad_and_stack, round_up


@pytest.mark.parametrize(("keys", "batch_size", "expected"), [
    pytest.param("", 2, [], id="nothing"),
    pytest.param("abab", 8, [("a", [0, 2]), ("b", [1, 3])], id="equal keys share a batch"),
    pytest.param("aaaba", 2, [("a", [0, 1]), ("a", [2, 4]), ("b", [3])], id="a batch is limited"),
])  # fmt: skip
def test_equal_keys_are_batched(keys: str, batch_size: int, expected: list[tuple[str, list[int]]]) -> None:
    assert list(batch_equal(keys, batch_size)) == expected


@pytest.mark.parametrize(("size", "expected"), [
    pytest.param((16, 24), (16, 24), id="multiples stay"),
    pytest.param((1, 17), (8, 24), id="the rest is rounded up"),
])  # fmt: skip
def test_sizes_are_rounded_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert round_up(size, 8) == expected


def test_padding_is_at_bottom_and_right(device: torch.device) -> None:
    batch = pad_and_stack([torch.ones(3, 1, 2, device=device), torch.ones(3, 2, 1, device=device)], (2, 3))
    assert batch[:, 0].tolist() == [[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [1, 0, 0]]]
