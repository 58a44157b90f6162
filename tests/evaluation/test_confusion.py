from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.errors import DataError
from moduseg.evaluation import confusion
from moduseg.evaluation.confusion import ConfusionMatrix, count_pixels, label_counts
from moduseg.evaluation.measures import iou, mean_iou


def _count_slowly(truth: np.ndarray, prediction: np.ndarray, num_labels: int) -> np.ndarray:
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
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
        expected = _count_slowly(truth, prediction, 5)
        truth_on_device = torch.from_numpy(truth).to(device) if shape[0] == 4 else truth
        np.testing.assert_array_equal(matrix.update(truth_on_device, prediction).cpu(), expected)
        total += expected
    np.testing.assert_array_equal(matrix.matrix.cpu(), total)
    assert matrix.matrix.dtype == torch.int64
    assert matrix.matrix.device.type == device.type


def test_label_counts_are_the_margins() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([[0, 1, 2, 2]]), np.array([[0, 1, 1, 2]]))
    expected = [[1, 1, 1], [1, 1, 2], [1, 2, 1]]
    np.testing.assert_array_equal(matrix.label_counts(), expected)
    np.testing.assert_array_equal(label_counts(matrix.matrix.numpy()), expected)


def test_shards_add_up(rng: np.random.Generator) -> None:
    total_matrix, shards = ConfusionMatrix(4), [ConfusionMatrix(4), ConfusionMatrix(4)]
    for i in range(4):
        truth, prediction = rng.integers(0, 4, (2, 5, 5))
        total_matrix.update(truth, prediction)
        shards[i % 2].update(truth, prediction)
    shards[0].add(shards[1].matrix.numpy())
    assert torch.equal(shards[0].matrix, total_matrix.matrix)
    with pytest.raises(ValueError, match=r"got \(3, 3\), expected \(4, 4\)"):
        total_matrix.add(np.zeros((3, 3)))


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
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        label_counts(np.zeros((2, 3)))


def _blocks(rng: np.random.Generator, labels: list[int], shape: tuple[int, int] = (24, 40)) -> np.ndarray:
    """A label map of 8 x 8 blocks, whose runs are long."""
    cells = rng.choice(labels, (shape[0] // 8, shape[1] // 8)).astype(np.uint8)
    return np.kron(cells, np.ones((8, 8), dtype=np.uint8))


@pytest.mark.parametrize("size", [1, 5, 255])
@pytest.mark.parametrize("kind", ["blocks", "noise", "one pixel", "one column", "all ignored"])
def test_bytes_are_counted_as_any_integers_are(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int, kind: str
) -> None:
    shape = {"one pixel": (1, 1), "one column": (9, 1)}.get(kind, (24, 40))
    monkeypatch.setattr(confusion, "EXACT_FLOAT32", 100)  # parts, as of a huge picture
    if kind == "blocks":
        truth, prediction = _blocks(rng, [*range(min(size, 9)), 255]), _blocks(rng, list(range(min(size, 9))))
    else:
        truth, prediction = rng.integers(0, size, shape).astype(np.uint8), rng.integers(0, size, shape).astype(np.uint8)
        truth[rng.random(shape) < 0.2] = 255
    if kind == "all ignored":
        truth[:] = 255
    actual = count_pixels(truth, prediction, size)
    np.testing.assert_array_equal(actual, _count_slowly(truth, prediction, size))
    np.testing.assert_array_equal(actual, count_pixels(truth.astype(np.int32), prediction, size))
    assert actual.dtype == torch.int64


@pytest.mark.parametrize("noise", [False, True])
def test_bytes_out_of_range_are_refused(rng: np.random.Generator, noise: bool) -> None:
    draw = (lambda: rng.integers(0, 3, (24, 40)).astype(np.uint8)) if noise else (lambda: _blocks(rng, [0, 1, 2]))
    for place, value, words in (
        ("truth", 3, "truth has label id 3"),
        ("prediction", 255, "prediction has label id 255"),
    ):
        maps = {"truth": draw(), "prediction": draw()}
        maps["truth"][0, 0] = 255  # even below an ignored pixel
        maps[place][0, 1 if place == "truth" else 0] = value
        with pytest.raises(DataError, match=words):
            count_pixels(maps["truth"], maps["prediction"], 3, "img_7")


def test_iou_agrees_with_torchmetrics(rng: np.random.Generator) -> None:
    """Per class; torchmetrics gives 0 to a class in neither, which ours leaves out as NaN."""
    from torchmetrics.classification import MulticlassJaccardIndex

    theirs = MulticlassJaccardIndex(num_classes=7, average=None, ignore_index=255)
    ours = ConfusionMatrix(7)
    for _ in range(4):
        truth = rng.choice([0, 1, 2, 3, 5, 255], (15, 20)).astype(np.uint8)
        prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.choice([0, 1, 2, 4], truth.shape))
        prediction = np.where(prediction == 255, 0, prediction).astype(np.uint8)
        ours.update(truth, prediction)
        theirs.update(torch.from_numpy(prediction).long(), torch.from_numpy(truth).long())
    expected, actual = 100 * theirs.compute().double().numpy(), iou(ours.label_counts())
    present = np.arange(7) != 6
    np.testing.assert_allclose(actual[present], expected[present], rtol=1e-6)
    assert np.isnan(actual[6])
    assert expected[6] == 0
    assert mean_iou(ours.label_counts()) == pytest.approx(expected[present].mean())
