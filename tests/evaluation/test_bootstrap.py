from __future__ import annotations

import numpy as np
import pytest

from moduseg.evaluation.bootstrap import PairedInterval, bootstrap, image_counts, paired_bootstrap
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.measures import Compute, mean_accuracy, mean_iou, mean_iou_in_truth


def _images(rng: np.random.Generator, n: int, right: float) -> np.ndarray:
    """Confusion matrices of `n` images of 400 pixels, about a share `right` of them correct."""
    matrices = np.zeros((n, 3, 3), dtype=np.int32)
    for matrix in matrices:
        truth = rng.integers(0, 3, 400)
        wrong = rng.random(400) > np.clip(right + rng.normal(0, 0.1), 0, 1)
        np.add.at(matrix, (truth, np.where(wrong, rng.integers(0, 3, 400), truth)), 1)
    return matrices


def test_counts_are_the_margins(rng: np.random.Generator) -> None:
    matrices = _images(rng, 3, 0.7)
    counts = image_counts(list(matrices))
    np.testing.assert_array_equal(counts[1], [np.diag(matrices[1]), matrices[1].sum(1), matrices[1].sum(0)])


@pytest.mark.parametrize("compute", [mean_iou, mean_iou_in_truth, mean_accuracy])
def test_interval_matches_a_plain_loop(rng: np.random.Generator, compute: Compute) -> None:
    matrices = _images(rng, 12, 0.7)
    matrices[0, 2] = matrices[0, :, 2] = 0
    interval = bootstrap(image_counts(list(matrices)), 600, seed=3, compute=compute)
    again = np.random.default_rng(3)
    drawn = []
    for size in (250, 250, 100):
        for weights in np.ceil(4096 * again.standard_exponential((size, 12))):
            drawn.append(compute(label_counts(np.tensordot(weights, matrices, 1))))
    np.testing.assert_allclose((interval.low, interval.high), np.quantile(drawn, [0.025, 0.975]))
    assert interval.value == compute(label_counts(matrices.sum(0)))


def test_a_rare_class_is_in_every_draw() -> None:
    matrices = np.zeros((10, 2, 2), dtype=np.int64)
    matrices[:, 0, 0] = 100
    matrices[3] = [[50, 0], [50, 0]]  # the only image of class 1, none of whose pixels is right
    interval = bootstrap(image_counts(list(matrices)), 500)
    assert interval.value == pytest.approx(100 * 0.5 * 950 / 1000)
    assert interval.high <= 50


def test_intervals_are_as_wide_as_those_of_drawn_images(rng: np.random.Generator) -> None:
    matrices = _images(rng, 80, 0.7)
    interval = bootstrap(image_counts(list(matrices)), 2000)
    weights = rng.multinomial(80, np.full(80, 1 / 80), size=2000)
    drawn = [mean_iou(label_counts(np.tensordot(row, matrices, 1))) for row in weights]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.1)


def test_seed_decides(rng: np.random.Generator) -> None:
    counts = image_counts(list(_images(rng, 10, 0.7)))
    assert bootstrap(counts, 100) == bootstrap(counts, 100)
    assert bootstrap(counts, 100).low != bootstrap(counts, 100, seed=1).low


def test_interval_narrows_with_images_and_widens_with_confidence(rng: np.random.Generator) -> None:
    few, many = (image_counts(list(_images(rng, n, 0.7))) for n in (10, 160))

    def width(counts: np.ndarray, confidence: float = 0.95) -> float:
        estimate = bootstrap(counts, 500, confidence=confidence)
        assert estimate.low < estimate.value < estimate.high
        return estimate.high - estimate.low

    assert width(many) < 0.5 * width(few)
    assert width(few, 0.5) < width(few, 0.99)


def test_one_image_has_no_spread(rng: np.random.Generator) -> None:
    estimate = bootstrap(image_counts(list(_images(rng, 1, 0.7))), 50)
    assert estimate.low == estimate.value == estimate.high


def test_paired_runs(rng: np.random.Generator) -> None:
    truth = rng.integers(0, 3, (40, 300))

    def run(right: float) -> np.ndarray:
        # An image is as hard for one run as for the other.
        hard = np.random.default_rng(5).random((40, 1)) * 0.6
        wrong = rng.random(truth.shape) > right - hard
        prediction = np.where(wrong, rng.integers(0, 3, truth.shape), truth)
        matrices = np.zeros((40, 3, 3), dtype=np.int64)
        for i in range(40):
            np.add.at(matrices[i], (truth[i], prediction[i]), 1)
        return image_counts(list(matrices))

    worse, better = run(0.85), run(0.92)
    estimate = paired_bootstrap(worse, better, 500)
    assert 0 < estimate.low < estimate.value < estimate.high
    assert estimate.share_above == 1.0
    assert estimate.value == pytest.approx(bootstrap(better, 1).value - bootstrap(worse, 1).value)
    alone = bootstrap(worse, 500)
    assert estimate.high - estimate.low < 0.6 * (alone.high - alone.low)
    same = paired_bootstrap(worse, worse, 50)
    assert (same.value, same.low, same.high, same.share_above) == (0, 0, 0, 0.5)
    with pytest.raises(ValueError, match="expected the same images"):
        paired_bootstrap(worse, better[::-1], 50)


@pytest.mark.parametrize(
    ("shape", "resamples", "confidence"),
    [((0, 3, 4), 10, 0.9), ((2, 4, 4), 10, 0.9), ((2, 3), 10, 0.9), ((2, 3, 4), 0, 0.9), ((2, 3, 4), 10, 1.0)],
)
def test_arguments(shape: tuple[int, ...], resamples: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="got"):
        bootstrap(np.ones(shape, dtype=np.int64), resamples, confidence=confidence)


@pytest.mark.parametrize(
    ("value", "share_above", "expected"),
    [(2.0, 0.9, 0.1), (-2.0, 0.1, 0.1), (2.0, 0.4, 0.6), (0.0, 0.5, None), (float("nan"), 0.5, None)],
)
def test_share_of_flipped_signs(value: float, share_above: float, expected: float | None) -> None:
    estimate = PairedInterval(value, -1.0, 3.0, share_above=share_above).share_flipped
    assert estimate == (None if expected is None else pytest.approx(expected))
