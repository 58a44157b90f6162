"""Run lengths of masks, held against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from moduseg.masks.bits import PackedMasks
from moduseg.masks.rle import decode_counts, decode_masks, encode_masks


def _make_masks(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return masks with corner pixels, full, empty, a chessboard, a block, and noise of several densities."""
    masks = rng.random((12, *size)) < np.linspace(0, 1, 12)[:, None, None] ** 2
    masks[0], masks[1] = False, True
    masks[2] = np.indices(size).sum(0) % 2
    masks[3:5] = False
    masks[3, 0, 0] = masks[4, -1, -1] = True
    masks[5] = False
    masks[5, size[0] // 3 :, size[1] // 4 :] = True
    return masks


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (7, 64), (8, 65), (37, 130), (300, 400)])
def test_strings_are_those_of_pycocotools(size: tuple[int, int], rng: np.random.Generator) -> None:
    masks = _make_masks(size, rng)
    expected = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    strings = encode_masks(PackedMasks.of(torch.from_numpy(masks)))
    assert strings == [run["counts"].decode() for run in expected]


def test_no_mask_has_no_string() -> None:
    assert encode_masks(PackedMasks.of(torch.zeros(0, 4, 5, dtype=torch.bool))) == []


def test_long_runs_take_six_characters() -> None:
    """2^26 pixels: an empty mask is one run; its number has 27 bits and a sign, at 5 bits a character."""
    masks = torch.zeros(1, 1 << 13, 1 << 13, dtype=torch.bool)
    assert encode_masks(PackedMasks.of(masks)) == [coco.encode(np.asfortranarray(masks[0].byte()))["counts"].decode()]


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (7, 64), (37, 130)])
def test_masks_are_decoded_as_they_were_encoded(size: tuple[int, int], rng: np.random.Generator) -> None:
    masks = _make_masks(size, rng)
    runs = [decode_counts(text) for text in encode_masks(PackedMasks.of(torch.from_numpy(masks)))]
    np.testing.assert_array_equal(decode_masks(runs, size), masks)


@pytest.mark.parametrize(
    ("runs", "columns"),
    [
        pytest.param([6], "000 000", id="no run of ones"),
        pytest.param([0, 6], "111 111", id="all columns in one run"),
        pytest.param([1, 2, 0, 1, 2], "011 100", id="an empty run of zeros between two of ones"),
        pytest.param([1, 0, 4, 1], "000 001", id="an empty run of ones"),
        pytest.param([2, 2, 2], "001 100", id="a run across two columns"),
    ],
)
def test_runs_go_down_the_columns(runs: list[int], columns: str) -> None:
    expected = np.array([[c == "1" for c in column] for column in columns.split()]).T
    masks = decode_masks([np.array([6]), np.array(runs)], (3, 2))
    np.testing.assert_array_equal(masks, [np.zeros((3, 2), bool), expected])


def test_no_runs_are_no_masks() -> None:
    assert decode_masks([], (4, 5)).shape == (0, 4, 5)
