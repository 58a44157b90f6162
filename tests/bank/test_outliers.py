from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.bank.outliers import nearest_to_centre
from tests import reference


@pytest.mark.parametrize("index", range(5))
def test_golden(index: int, device: torch.device) -> None:
    golden = reference.load_golden(f"outliers_{index}")
    arrays = reference.tensors(golden, device)
    assert torch.equal(nearest_to_centre(arrays["vectors"], float(golden["drop_ratio"])), arrays["kept"])


@pytest.mark.parametrize("drop_ratio", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 57])
def test_equals_sorting(count: int, drop_ratio: float, device: torch.device, rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(count, 6)).astype(np.float32)
    kept = nearest_to_centre(torch.from_numpy(vectors).to(device), drop_ratio)
    assert kept.dtype == torch.int64
    assert kept.tolist() == reference.nearest_to_centre(vectors, drop_ratio)


def test_the_mean_is_not_normalised(device: torch.device) -> None:
    # From the mean (0.45, 0) the second is farthest; from the mean's direction (1, 0) it is the nearest.
    vectors = torch.tensor([[0.0, 0], [1, 0], [0.35, 0]], device=device)
    assert nearest_to_centre(vectors, 0.34).tolist() == [0, 2]


def test_equally_far_vectors_go_by_index(device: torch.device) -> None:
    vectors = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], device=device)
    assert nearest_to_centre(vectors, 0.25).tolist() == [0, 1, 2]
    assert nearest_to_centre(vectors, 0.75).tolist() == [0]


def test_one_outlier(device: torch.device) -> None:
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0.1]], device=device)
    assert nearest_to_centre(vectors, 0.25).tolist() == [0, 2, 3]


@pytest.mark.parametrize("drop_ratio", [-0.1, 1.1, float("nan")])
def test_bad_ratio(drop_ratio: float) -> None:
    with pytest.raises(ValueError, match="drop_ratio: got"):
        nearest_to_centre(torch.zeros(3, 2), drop_ratio)


def test_bad_shape() -> None:
    with pytest.raises(ValueError, match="vectors: got"):
        nearest_to_centre(torch.zeros(3), 0.25)
