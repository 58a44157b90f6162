from __future__ import annotations

import numpy as np
import pytest

from moduseg.evaluation import boundary as module
from moduseg.evaluation.boundary import boundary_counts, contour_width, near_contour
from tests import reference


@pytest.mark.parametrize(
    ("shape", "share", "expected"),
    [
        ((375, 500), 0.02, 12),  # 12.5, half to even as the paper's own code rounds
        ((300, 400), 0.02, 10),
        ((480, 640), 0.02, 16),
        ((1024, 2048), 0.02, 46),
        ((3, 4), 0.02, 1),
        ((300, 400), 0.005, 2),
    ],
)
def test_width_is_a_share_of_the_diagonal(shape: tuple[int, int], share: float, expected: int) -> None:
    assert contour_width(shape, share) == expected


def test_contours_of_a_square_by_hand() -> None:
    labels = np.zeros((9, 9), dtype=np.uint8)
    labels[2:7, 2:7] = 3
    is_near = near_contour(labels, 1)
    expected = np.zeros((9, 9), dtype=bool)
    expected[[0, -1]] = expected[:, [0, -1]] = True  # the picture's border is a contour of the background
    expected[1:8, 1:8] = True
    expected[3:6, 3:6] = False
    np.testing.assert_array_equal(is_near > 0, expected)


@pytest.mark.parametrize("shape", [(2, 2), (3, 31), (40, 50)])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_counts_match_eroding_class_by_class(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], width: int
) -> None:
    monkeypatch.setattr(module, "EXACT_FLOAT32", 120)
    truth, prediction = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    for labels in (truth, prediction):
        for value, mask in enumerate(reference.random_masks(rng, 4, *shape), start=1):
            labels[mask] = value
    truth[reference.random_masks(rng, 1, *shape)[0]] = 255
    counts = boundary_counts(truth, prediction, 6, width)
    np.testing.assert_array_equal(counts, reference.boundary_counts(truth, prediction, 6, width))
    assert counts.dtype == np.int64


def test_equal_maps_agree_whatever_is_ignored(rng: np.random.Generator) -> None:
    truth = np.zeros((30, 40), dtype=np.uint8)
    for value, mask in enumerate(reference.random_masks(rng, 3, 30, 40), start=1):
        truth[mask] = value
    prediction = truth.copy()
    truth[10:20, 10:20] = 255
    both, true, predicted = boundary_counts(truth, prediction, 4, 2)
    np.testing.assert_array_equal(both, true)
    np.testing.assert_array_equal(both, predicted)


def test_a_shift_costs_more_at_the_contour() -> None:
    truth = np.zeros((100, 100), dtype=np.uint8)
    truth[20:80, 20:80] = 1
    both, true, predicted = boundary_counts(truth, np.roll(truth, 3, 1), 2, 2)
    contour = both[1] / (true[1] + predicted[1] - both[1])
    area = 57 * 60 / (63 * 60)
    assert contour < 0.5 < 0.9 < area
