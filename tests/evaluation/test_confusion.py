from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.errors import DataError
from moduseg.evaluation import confusion
from moduseg.evaluation.confusion import (
    ConfusionMatrix,
    count_pixels,
    frequency_weighted_iou,
    iou,
    label_counts,
    miou,
    pixel_accuracy,
    share_of_counts,
)


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
    found = count_pixels(truth, prediction, size)
    np.testing.assert_array_equal(found, _slow(truth, prediction, size))
    np.testing.assert_array_equal(found, count_pixels(truth.astype(np.int32), prediction, size))
    assert found.dtype == torch.int64


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
    expected, found = 100 * theirs.compute().double().numpy(), ours.iou()
    present = np.arange(7) != 6
    np.testing.assert_allclose(found[present], expected[present], rtol=1e-6)
    assert np.isnan(found[6])
    assert expected[6] == 0
    assert ours.miou() == pytest.approx(expected[present].mean())


STRICT = np.array(  # label 0 is no class; 10 + 20 pixels of classes 1 and 2 were left uncovered
    [[0, 0, 0, 0], [10, 60, 30, 0], [20, 0, 40, 0], [0, 0, 0, 0]]
)


def test_without_background_uncovered_pixels_are_wrong_or_ignored() -> None:
    wrong, ignored = (label_counts(STRICT, False, rule) for rule in ("wrong", "ignore"))  # type: ignore[arg-type]
    np.testing.assert_allclose(confusion.iou_of_counts(*wrong), [np.nan, 60.0, 100 * 40 / 90, np.nan])
    np.testing.assert_allclose(confusion.iou_of_counts(*ignored), [np.nan, 100 * 60 / 90, 100 * 40 / 70, np.nan])
    assert confusion.mean_iou_of_counts(*wrong) == pytest.approx((60 + 400 / 9) / 2)
    assert confusion.pixel_accuracy_of_counts(*wrong) == pytest.approx(100 * 100 / 160)
    assert confusion.pixel_accuracy_of_counts(*ignored) == pytest.approx(100 * 100 / 130)
    # With a background, label 0 is a class that was predicted and never right.
    np.testing.assert_allclose(iou(STRICT), [0, 60, 100 * 40 / 90, np.nan])
    stacked = label_counts(np.stack([STRICT, STRICT]), False, "ignore")
    np.testing.assert_array_equal(stacked, [ignored, ignored])


def test_precision_and_recall_are_shares() -> None:
    hits, in_truth, predicted = label_counts(STRICT)
    np.testing.assert_allclose(share_of_counts(hits, predicted), [0, 100, 100 * 40 / 70, np.nan])
    np.testing.assert_allclose(share_of_counts(hits, in_truth), [np.nan, 60, 100 * 40 / 60, np.nan])
