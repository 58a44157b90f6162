from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.bank.purification import class_regions, purify
from tests import reference


def blocks(rng: np.random.Generator, height: int, width: int, cell: int, values: list[int]) -> np.ndarray:
    """A label map of square cells, so that erosion leaves something of most classes."""
    grid = rng.choice(values, (height // cell + 1, width // cell + 1))
    return np.kron(grid, np.ones((cell, cell), int))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("index", range(3))
def test_golden(index: int, device: torch.device) -> None:
    golden = reference.load_golden(f"purification_{index}")
    arrays = reference.tensors(golden, device)
    pure = purify(arrays["label_map"], int(golden["kernel_size"]), int(golden["iterations"]))
    class_ids, masks = class_regions(pure, int(golden["min_area"]))
    order = arrays["class_ids"].argsort()  # listed there with the background last
    assert torch.equal(class_ids, arrays["class_ids"][order])
    assert torch.equal(masks, arrays["masks"][order])


@pytest.mark.parametrize(("kernel_size", "iterations"), [(3, 1), (3, 4), (5, 2), (3, 20), (1, 7), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("size", [(61, 83), (30, 17), (1, 9)])
def test_equals_erosion_class_by_class(
    kernel_size: int,
    iterations: int,
    dtype: torch.dtype,
    size: tuple[int, int],
    device: torch.device,
    rng: np.random.Generator,
) -> None:
    label_map = blocks(rng, *size, cell=11, values=[0, 0, 1, 2, 7, 255])
    pure = purify(torch.from_numpy(label_map).to(device, dtype), kernel_size, iterations)
    assert pure.dtype == dtype
    assert pure.device.type == device.type
    np.testing.assert_array_equal(pure.cpu().numpy(), reference.purify(label_map, kernel_size, iterations))


@pytest.mark.parametrize(("kernel_size", "iterations"), [(3, 1), (5, 2), (3, 20)])
@pytest.mark.parametrize("size", [(61, 83), (30, 17), (1, 9)])
@pytest.mark.parametrize("offset", [-40, 70000])
def test_ids_beyond_a_byte(
    kernel_size: int,
    iterations: int,
    size: tuple[int, int],
    offset: int,
    device: torch.device,
    rng: np.random.Generator,
) -> None:
    label_map = blocks(rng, *size, cell=11, values=[0, 0, 1, 2, 7]).astype(np.int64) + offset
    pure = purify(torch.from_numpy(label_map).to(device), kernel_size, iterations, ignore_index=-1)
    np.testing.assert_array_equal(pure.cpu().numpy(), reference.purify(label_map, kernel_size, iterations, -1))


def test_border_does_not_erode(device: torch.device) -> None:
    label_map = torch.full((20, 30), 3, dtype=torch.uint8, device=device)
    assert torch.equal(purify(label_map, 3, 20), label_map)


def test_ignore_erodes_its_neighbours_and_stays(device: torch.device) -> None:
    label_map = torch.ones((9, 9), dtype=torch.uint8, device=device)
    label_map[4, 4] = 255
    expected = label_map.clone()
    expected[2:7, 2:7] = 255
    assert torch.equal(purify(label_map, 3, 2), expected)


def test_the_input_is_left_alone(device: torch.device) -> None:
    label_map = torch.zeros((4, 4), dtype=torch.uint8, device=device)
    purify(label_map, 3, 0)[0, 0] = 9
    assert not label_map.any()


def test_empty_map(device: torch.device) -> None:
    label_map = torch.zeros((0, 5), dtype=torch.uint8, device=device)
    assert purify(label_map, 3, 2).shape == (0, 5)
    class_ids, masks = class_regions(label_map, 0)
    assert class_ids.shape == (0,)
    assert masks.shape == (0, 0, 5)


def test_minimum_area_is_inclusive(device: torch.device) -> None:
    label_map = torch.full((30, 40), 255, dtype=torch.uint8, device=device)
    label_map.view(-1)[:300] = 2
    label_map.view(-1)[300:599] = 1
    label_map.view(-1)[599:900] = 0
    class_ids, masks = class_regions(label_map, 300)
    assert class_ids.tolist() == [0, 2]
    assert masks.flatten(1).sum(1).tolist() == [301, 300]
    assert class_regions(label_map, 299)[0].tolist() == [0, 1, 2]
    assert class_regions(label_map, 302)[1].shape == (0, 30, 40)


@pytest.mark.parametrize("ignore_index", [0, 7, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_regions_of_every_byte(
    ignore_index: int, dtype: torch.dtype, device: torch.device, rng: np.random.Generator
) -> None:
    label_map = rng.permutation(np.repeat(np.arange(256), rng.integers(0, 9, 256)))[:900].reshape(30, 30)
    class_ids, masks = class_regions(torch.from_numpy(label_map).to(device, dtype), 3, ignore_index)
    expected = [value for value in range(256) if (label_map == value).sum() >= 3 and value != ignore_index]
    assert class_ids.tolist() == expected
    for value, mask in zip(expected, masks.cpu().numpy(), strict=True):
        np.testing.assert_array_equal(mask, label_map == value)


@pytest.mark.parametrize(
    ("kernel_size", "iterations", "match"),
    [(2, 1, "kernel_size: got 2"), (0, 1, "kernel_size: got 0"), (-3, 1, "odd number"), (3, -1, "iterations: got -1")],
)
def test_bad_values(kernel_size: int, iterations: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        purify(torch.zeros((4, 4), dtype=torch.uint8), kernel_size, iterations)


def test_bad_maps() -> None:
    with pytest.raises(ValueError, match="label_map: got"):
        purify(torch.zeros(4, 4), 3, 1)
    with pytest.raises(ValueError, match="label_map: got"):
        class_regions(torch.zeros((1, 4, 4), dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="min_area: got -1"):
        class_regions(torch.zeros((4, 4), dtype=torch.uint8), -1)
    with pytest.raises(ValueError, match="ignore_index: got 300"):
        purify(torch.zeros((4, 4), dtype=torch.uint8), 3, 1, ignore_index=300)
