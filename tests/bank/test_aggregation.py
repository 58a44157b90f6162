from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.bank import aggregation
from moduseg.bank.aggregation import aggregate, coverage, harden, id_map_coverage, patch_coverage
from moduseg.structures import TokenMap
from tests import reference

SIZES = [(48, 64, 16), (50, 67, 14), (9, 5, 16), (33, 70, 7), (20, 20, 1), (300, 310, 260)]


def token_map(image_size: tuple[int, int], input_size: tuple[int, int], stride: int, dim: int = 2) -> TokenMap:
    grid = [-(-side // stride) for side in input_size]
    return TokenMap(torch.zeros(*grid, dim), stride, image_size, input_size)


@pytest.mark.parametrize("index", range(4))
def test_golden(index: int, device: torch.device) -> None:
    golden = reference.load_golden(f"aggregation_{index}")
    arrays = reference.tensors(golden, device)
    vectors = aggregate(arrays["tokens"], patch_coverage(arrays["masks"], int(golden["patch_size"])))
    torch.testing.assert_close(vectors, arrays["vectors"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width", "patch_size"), SIZES)
def test_coverage_equals_counting(
    height: int, width: int, patch_size: int, device: torch.device, rng: np.random.Generator
) -> None:
    masks = reference.random_masks(rng, 6, height, width)
    masks[0], masks[1] = False, True
    expected = np.stack([reference.patch_coverage(mask, patch_size) for mask in masks])
    result = patch_coverage(torch.from_numpy(masks).to(device), patch_size)
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.cpu().numpy(), expected)


def test_padding_counts_as_uncovered(device: torch.device) -> None:
    result = patch_coverage(torch.ones((1, 6, 5), dtype=torch.bool, device=device), 4)
    assert result.tolist() == [[[1, 0.25], [0.5, 0.125]]]


def test_masks_of_any_memory_layout(device: torch.device, rng: np.random.Generator) -> None:
    masks = torch.from_numpy(reference.random_masks(rng, 4, 30, 22)).to(device)
    turned = masks.permute(0, 2, 1)
    assert torch.equal(patch_coverage(turned, 8), patch_coverage(turned.contiguous(), 8))


@pytest.mark.parametrize(("height", "width", "patch_size"), SIZES)
def test_native_size_is_the_same_to_the_bit(
    height: int, width: int, patch_size: int, device: torch.device, rng: np.random.Generator
) -> None:
    masks = torch.from_numpy(reference.random_masks(rng, 5, height, width)).to(device)
    native = coverage(masks, token_map((height, width), (height, width), patch_size))
    assert torch.equal(native, patch_coverage(masks, patch_size))


@pytest.mark.parametrize(
    ("size", "input_size", "stride"),
    [
        ((20, 30), (40, 60), 16),  # doubled
        ((20, 30), (10, 15), 4),  # halved
        ((17, 23), (31, 19), 7),  # no common divisor, one axis grown and one shrunk
        ((12, 40), (12, 20), 8),  # one axis native
        ((37, 29), (53, 61), 14),
    ],
)
def test_resized_equals_supersampling(
    size: tuple[int, int],
    input_size: tuple[int, int],
    stride: int,
    device: torch.device,
    rng: np.random.Generator,
) -> None:
    masks = reference.random_masks(rng, 3, *size)
    masks[0] = True
    expected = np.stack([reference.resized_coverage(mask, input_size, stride) for mask in masks])
    result = coverage(torch.from_numpy(masks).to(device), token_map(size, input_size, stride))
    np.testing.assert_allclose(result.cpu().numpy(), expected, atol=1e-6, rtol=0)


def test_resized_keeps_the_area_beyond_float32(device: torch.device) -> None:
    # A patch has (16 * 1009) x (16 * 1013) shared units here, more than float32 counts.
    masks = torch.ones((1, 1009, 1013), dtype=torch.bool, device=device)
    masks[0, 500:] = False
    result = coverage(masks, token_map((1009, 1013), (512, 514), 16))
    assert result.double().sum().item() * 256 == pytest.approx(512 * 514 * 500 / 1009, abs=0.01)
    assert (result <= 1).all()


@pytest.mark.parametrize("size", [(3, 90), (90, 3), (30, 40)])
def test_parts_of_a_strip_are_the_whole(
    size: tuple[int, int], device: torch.device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = torch.from_numpy(reference.random_masks(rng, 5, *size)).to(device)
    masks[1, :, size[1] // 2 :] = masks[2, : size[0] // 2] = False
    tokens = token_map(size, (size[0] * 2, size[1] * 2), 4)
    whole = coverage(masks, tokens)
    monkeypatch.setattr(aggregation, "_MAX_LENGTHS", 200)
    assert torch.equal(coverage(masks, tokens), whole)


def test_id_map_equals_overlapping_path_on_disjoint_masks(device: torch.device, rng: np.random.Generator) -> None:
    for height, width, patch_size in SIZES:
        ids = torch.from_numpy(rng.integers(-1, 7, (height // 5 + 1, width // 5 + 1))).to(device)
        ids = ids.repeat_interleave(5, 0).repeat_interleave(5, 1)[:height, :width]
        masks = ids == torch.arange(8, device=device)[:, None, None]  # id 7 is empty
        for dtype in (torch.int64, torch.int32):
            assert torch.equal(id_map_coverage(ids.to(dtype), 8, patch_size), patch_coverage(masks, patch_size))


def test_id_map_without_masks(device: torch.device) -> None:
    assert id_map_coverage(torch.full((5, 9), -1, device=device), 0, 4).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("soft", "hard"),
    [
        ([[0.6, 0.5], [0.51, 0.1]], [[1, 0], [1, 0]]),  # exactly half does not count
        ([[0.2, 0.5], [0.5, 0.1]], [[0, 1], [0, 0]]),  # none is more than half covered: the first of the largest
        ([[0.0, 0.0], [0.0, 1 / 256]], [[0, 0], [0, 1]]),
        ([[0.0, 0.0], [0.0, 0.0]], [[0, 0], [0, 0]]),
        ([[1.0, 1.0], [1.0, 1.0]], [[1, 1], [1, 1]]),
    ],
)
def test_harden(soft: list[list[float]], hard: list[list[float]], device: torch.device) -> None:
    result = harden(torch.tensor([soft], device=device))
    assert result.dtype == torch.float32
    assert result[0].tolist() == hard


def test_harden_without_masks(device: torch.device) -> None:
    assert harden(torch.zeros((0, 3, 4), device=device)).shape == (0, 3, 4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("height", "width", "patch_size"), SIZES[:4])
def test_pooling_equals_loop(
    normalize: bool, height: int, width: int, patch_size: int, device: torch.device, rng: np.random.Generator
) -> None:
    masks = reference.random_masks(rng, 5, height, width)
    weights = np.stack([reference.patch_coverage(mask, patch_size) for mask in masks])
    tokens = rng.normal(size=(*weights.shape[1:], 9)).astype(np.float32)
    expected = np.stack([reference.pool(tokens, weight, normalize) for weight in weights])
    result = aggregate(torch.from_numpy(tokens).to(device), torch.from_numpy(weights).to(device), normalize)
    np.testing.assert_allclose(result.cpu().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_empty_mask_has_a_zero_vector(normalize: bool, device: torch.device, rng: np.random.Generator) -> None:
    tokens = torch.from_numpy(rng.normal(size=(2, 3, 4))).to(device)
    masks = torch.zeros((2, 8, 12), dtype=torch.bool, device=device)
    masks[1, :4, :4] = True
    vectors = aggregate(tokens, patch_coverage(masks, 4), normalize)
    assert not vectors[0].any()
    assert vectors[1].any()
    assert torch.isfinite(vectors).all()


def test_no_masks(device: torch.device) -> None:
    weights = patch_coverage(torch.zeros((0, 8, 12), dtype=torch.bool, device=device), 4)
    assert weights.shape == (0, 2, 3)
    assert aggregate(torch.zeros((2, 3, 5), device=device), weights).shape == (0, 5)
    resized = coverage(torch.zeros((0, 8, 12), dtype=torch.bool, device=device), token_map((8, 12), (16, 24), 4))
    assert resized.shape == (0, 4, 6)


def test_bad_values() -> None:
    masks = torch.zeros((2, 8, 12), dtype=torch.bool)
    with pytest.raises(ValueError, match="patch_size: got 0"):
        patch_coverage(masks, 0)
    with pytest.raises(ValueError, match=r"expected \[N, H, W\] bool"):
        patch_coverage(masks.float(), 4)
    with pytest.raises(ValueError, match="expected the image's"):
        coverage(masks, token_map((8, 13), (8, 13), 4))
    with pytest.raises(ValueError, match="on the same grid"):
        aggregate(torch.zeros(2, 4, 5), patch_coverage(masks, 4))
    with pytest.raises(ValueError, match="count: got 3"):
        id_map_coverage(torch.full((4, 4), 3), 3, 2)
    with pytest.raises(ValueError, match="id_map: got"):
        id_map_coverage(torch.zeros(4, 4), 3, 2)
    with pytest.raises(ValueError, match="coverage: got"):
        harden(masks)
