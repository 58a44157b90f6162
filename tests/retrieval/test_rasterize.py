from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.retrieval import rasterize as module
from moduseg.retrieval.rasterize import rasterize
from tests import reference

A, B, C = [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "labels", "scores", "expected"),
    [
        pytest.param([A, B], [4, 7], [0.5, 0.9], [4, 7, 7, 7, 0], id="the higher score is on top"),
        pytest.param([A, B], [4, 7], [0.5, 0.5], [4, 4, 4, 7, 0], id="equal scores by index"),
        pytest.param([A, B, C], [0, 7, 2], [0.9, 0.2, 0.4], [0, 7, 2, 2, 2], id="background paints nothing"),
        pytest.param([A, B], [0, 0], [0.9, 0.5], [0, 0, 0, 0, 0], id="only background"),
        pytest.param([A, B], [4, 254], [-0.5, -0.9], [4, 4, 4, 254, 0], id="negative scores, largest label"),
        pytest.param([[0] * 5, A], [3, 1], [0.9, 0.1], [1, 1, 1, 0, 0], id="an empty mask"),
        pytest.param([B], [6], [0.1], [0, 6, 6, 6, 0], id="one"),
    ],
)
def test_by_hand(
    rows: list[list[int]], labels: list[int], scores: list[float], expected: list[int], device: torch.device
) -> None:
    masks = torch.tensor(rows, device=device).bool()[:, None]
    result = rasterize(masks, torch.tensor(labels, device=device), torch.tensor(scores, device=device))
    assert result.dtype == torch.uint8
    assert result.tolist() == [expected]


@pytest.mark.parametrize("count", [1, 30, 255, 256, 300])
@pytest.mark.parametrize(("packed", "block"), [(True, 1 << 22), (False, 1 << 22), (False, 1000)])
def test_equals_painting(
    count: int,
    packed: bool,
    block: int,
    device: torch.device,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways on the CPU: as bits, and with the maxima of the other devices."""
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "PACKED", ("cpu",) if packed else ())
    masks = reference.random_masks(rng, count, 33, 41)
    labels, scores = rng.integers(0, 255, count), rng.integers(0, 40, count) / 40
    labels[: count // 5] = 0
    result = rasterize(*(torch.from_numpy(array).to(device) for array in (masks, labels, scores)))
    np.testing.assert_array_equal(result.cpu().numpy(), reference.rasterize(masks, labels, scores))


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_without_masks_or_pixels(shape: tuple[int, int, int], device: torch.device) -> None:
    labels = torch.ones(shape[0], dtype=torch.int64, device=device)
    result = rasterize(torch.zeros(shape, dtype=torch.bool, device=device), labels, labels.float())
    assert result.shape == shape[1:]
    assert result.dtype == torch.uint8
    assert not result.any()


@pytest.mark.parametrize("label", [-1, 255, 256])
def test_labels_out_of_range(label: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.254"):
        rasterize(torch.ones((1, 2, 2), dtype=torch.bool), torch.tensor([label]), torch.ones(1))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"scores: got \(2,\)"):
        rasterize(torch.ones((1, 2, 2), dtype=torch.bool), torch.tensor([1]), torch.ones(2))


def test_id_map_equals_masks(device: torch.device, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(rng.integers(-2, 9, (17, 23))).to(device)
    masks = ids == torch.arange(10, device=device)[:, None, None]  # the last is empty
    labels, scores = torch.from_numpy(rng.integers(0, 255, 10)).to(device), torch.rand(10).to(device)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(module.rasterize_id_map(ids.to(dtype), labels), rasterize(masks, labels, scores))
    with pytest.raises(ValueError, match=r"expected 0\.\.254"):
        module.rasterize_id_map(ids, labels + 255)
