"""Images become batches: equal keys share one, padding is black, sizes are multiples of the patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.backbones.inputs import batch_equal, fit_input, pad_and_stack, round_up, to_inputs


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


@pytest.mark.parametrize(("size", "short_side", "expected"), [
    pytest.param((480, 640), 336, (336, 448), id="a photograph"),
    pytest.param((1600, 400), 336, (1344, 336), id="as long as a photograph may be"),
    pytest.param((50, 40), None, (50, 40), id="its own size"),
    pytest.param((3, 5), None, (3, 5), id="a picture of a few pixels"),
    pytest.param((500, 2100), 336, (192, 806), id="a strip by a little"),
    pytest.param((20, 30_000), None, (20, 30_000), id="a strip at its own size"),
    pytest.param((40, 2000), 224, (32, 1600), id="a strip is whole patches thick"),
    pytest.param((2000, 40), 224, (1600, 32), id="a strip that stands"),
    pytest.param((20, 30_000), 224, (3, 4704), id="a strip that is thinner than a patch"),
    pytest.param((3, 200_000), None, (1, 56_250), id="a thread at its own size"),
    pytest.param((1, 80_000_000), 224, (1, 4704), id="the longest thread"),
])  # fmt: skip
def test_strips_cost_as_much_as_squares(
    size: tuple[int, int], short_side: int | None, expected: tuple[int, int]
) -> None:
    assert fit_input(size, short_side, stride=16) == expected
    padded = round_up(expected, 16)
    if max(size) > 4 * min(size):
        assert padded[0] * padded[1] <= 1.61 * (size[0] * size[1] if short_side is None else short_side**2)


def test_a_strip_is_resized_to_that_size() -> None:
    (pixels,) = to_inputs([np.full((2, 900, 3), 51, np.uint8)], 16, torch.device("cpu"), stride=4)
    assert pixels.shape == (3, *fit_input((2, 900), 16, stride=4))
    assert torch.allclose(pixels, torch.tensor(0.2))
