from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.errors import DataError
from moduseg.evaluation.confusion import ConfusionMatrix, frequency_weighted_iou, iou, miou, pixel_accuracy


def _slow(truth: np.ndarray, prediction: np.ndarray, size: int) -> np.ndarray:
    counts = np.zeros((size, size), dtype=np.int64)
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t != 255:
            counts[t, p] += 1
    return counts


def test_counts_match_a_plain_loop(device: torch.device, rng: np.random.Generator) -> None:
    matrix = ConfusionMatrix(5, device)
    total = np.zeros((5, 5), dtype=np.int64)
    for shape in ((7, 9), (1, 1), (4, 3)):
        truth = rng.choice([0, 1, 2, 3, 4, 255], shape).astype(np.uint8)
        prediction = rng.integers(0, 5, shape).astype(np.uint8)
        expected = _slow(truth, prediction, 5)
        given = torch.from_numpy(truth).to(device) if shape[0] == 4 else truth
        np.testing.assert_array_equal(matrix.update(given, prediction).cpu(), expected)
        total += expected
    np.testing.assert_array_equal(matrix.matrix.cpu(), total)
    assert matrix.matrix.dtype == torch.int64
    assert matrix.matrix.device.type == device.type


def test_measures_on_a_hand_made_matrix() -> None:
    # background 6 of 8 right, class 1 3 of 4, class 2 in neither, class 3 predicted only.
    matrix = np.array([[6, 1, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    expected = [100 * 6 / 9, 100 * 3 / 5, np.nan, 0.0]
    np.testing.assert_allclose(iou(matrix), expected)
    assert miou(matrix) == pytest.approx((100 * 6 / 9 + 60 + 0) / 3)
    assert miou(matrix, "truth") == pytest.approx((100 * 6 / 9 + 60) / 2)
    assert pixel_accuracy(matrix) == pytest.approx(75.0)
    assert frequency_weighted_iou(matrix) == pytest.approx(8 / 12 * 100 * 6 / 9 + 4 / 12 * 60)
    assert miou(torch.from_numpy(matrix)) == miou(matrix)


def test_methods_agree_with_functions() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([[0, 1, 2, 2]]), np.array([[0, 1, 1, 2]]))
    np.testing.assert_allclose(matrix.iou(), [100, 50, 50])
    assert matrix.miou() == pytest.approx(200 / 3)
    assert matrix.pixel_accuracy() == 75
    assert matrix.frequency_weighted_iou() == pytest.approx(62.5)


def test_nothing_counted_is_nan_not_zero() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.full((2, 2), 255), np.zeros((2, 2), dtype=np.uint8))
    values = (matrix.miou(), matrix.miou("truth"), matrix.pixel_accuracy(), matrix.frequency_weighted_iou())
    assert np.isnan(values).all()


def test_shards_add_up(rng: np.random.Generator) -> None:
    whole, parts = ConfusionMatrix(4), [ConfusionMatrix(4), ConfusionMatrix(4)]
    for i in range(4):
        truth, prediction = rng.integers(0, 4, (2, 5, 5))
        whole.update(truth, prediction)
        parts[i % 2].update(truth, prediction)
    parts[0].add(parts[1].matrix.numpy())
    assert torch.equal(parts[0].matrix, whole.matrix)
    with pytest.raises(ValueError, match=r"got \(3, 3\), expected \(4, 4\)"):
        whole.add(np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        ([[0, 1]], [[0, 255]], "prediction has label id 255.*labels every pixel"),
        ([[0, 255]], [[0, 255]], "prediction has label id 255"),
        ([[0, 1]], [[0, 3]], "prediction has label id 3, expected 0..2"),
        ([[0, 1]], [[0, -1]], "prediction has label id -1"),
        ([[0, 7]], [[0, 1]], "truth has label id 7"),
        ([[0, 1]], [[0, 1, 1]], r"prediction is \(1, 3\), expected the truth's \(1, 2\)"),
        ([[0, 1]], [[0], [1]], r"prediction is \(2, 1\)"),
    ],
)
def test_bad_predictions_name_the_image(truth: list, prediction: list, words: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(DataError, match=rf"'img_7'.*{words}"):
        matrix.update(np.array(truth), np.array(prediction), "img_7")
    assert int(matrix.matrix.sum()) == 0


def test_arguments() -> None:
    for size in (0, 256):
        with pytest.raises(ValueError, match=f"got {size}"):
            ConfusionMatrix(size)
    with pytest.raises(ValueError, match="classes: got 'all'"):
        miou(np.eye(2), "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        iou(np.zeros((2, 3)))
