from __future__ import annotations

import json

import numpy as np
import pytest

from moduseg.errors import DataError
from moduseg.evaluation.bootstrap import paired_bootstrap, paired_bootstrap_of_classes
from moduseg.evaluation.compare import CompareSettings, compare, compare_markdown
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.counts import ImageCounts, SplitCounts
from moduseg.evaluation.measures import iou, mean_iou, single_measures

CLASSES = ("background", "dog", "cat", "owl")


def _runs(rng: np.random.Generator, images: int = 30) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two runs over the same truth: the second is better at dogs; nobody has seen an owl."""
    runs: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(images):
        truth = rng.integers(0, 3, 200)
        for run, misses in zip(runs, ((0.1, 0.5, 0.2), (0.1, 0.2, 0.2)), strict=True):
            wrong = rng.random(200) < np.array(misses)[truth]
            matrix = np.zeros((4, 4), dtype=np.int64)
            np.add.at(matrix, (truth, np.where(wrong, 0, truth)), 1)
            run.append(matrix)
    return runs


def _split(matrices: list[np.ndarray], ids: list[str] | None = None, width: int = 2) -> SplitCounts:
    counts = SplitCounts(4)
    for i, matrix in enumerate(matrices):
        boundary = np.stack([np.diagonal(matrix), matrix.sum(1), matrix.sum(0)]) // 2
        counts.append(f"i{i}" if ids is None else ids[i], ImageCounts(matrix, boundary, width))
    return counts


def test_differences_and_their_intervals(rng: np.random.Generator) -> None:
    first, second = _runs(rng)
    record = compare(_split(first), _split(second), CLASSES, names=("a", "b"), settings=CompareSettings(resamples=300))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    sums = [label_counts(np.sum(run, 0)) for run in (first, second)]
    assert record["miou"]["first"] == pytest.approx(mean_iou(sums[0]))
    assert record["miou"]["difference"] == pytest.approx(mean_iou(sums[1]) - mean_iou(sums[0]))
    for i, name in enumerate(CLASSES[:3]):
        entry = record["classes"][name]
        assert entry["first"] == pytest.approx(iou(sums[0])[i])
        assert entry["difference"] == pytest.approx(iou(sums[1])[i] - iou(sums[0])[i])
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["images"] == 30
    dog, cat, owl = (record["classes"][name] for name in CLASSES[1:])
    assert dog["low"] > 20
    assert dog["share_flipped"] == 0.0
    assert cat["low"] < 0 < cat["high"]
    assert 0 < cat["share_flipped"] < 1
    assert [owl[k] for k in ("first", "second", "difference", "low", "high", "share_flipped")] == [None] * 6
    assert owl["images"] == 0
    assert record["boundary_miou"]["difference"] > 0
    assert record["left_out"] == []


def test_every_measure_of_a_split_is_compared(rng: np.random.Generator) -> None:
    first, second = (_split(run) for run in _runs(rng, 6))
    settings = CompareSettings(resamples=20)
    record = compare(first, second, CLASSES, names=("a", "b"), settings=settings)
    applicable = {measure.name for measure in single_measures() if measure.path[0] != "uncovered"}
    assert set(record["measures"]) == applicable
    accuracy = record["measures"]["pixel_accuracy"]
    matrices = [side.matrix() for side in (first, second)]
    assert accuracy["first"] == pytest.approx(100 * np.trace(matrices[0]) / matrices[0].sum())
    assert accuracy["low"] <= accuracy["difference"] <= accuracy["high"]
    assert record["measures"]["boundary_iou.miou"] == record["boundary_miou"]
    assert "| pixel accuracy " in compare_markdown(record)


def test_draws_are_those_of_the_mean(rng: np.random.Generator) -> None:
    """One class alone in truth and prediction: its interval is the mean's."""
    runs = np.zeros((2, 8, 3, 4), dtype=np.int64)
    runs[:, :, 1, 0] = 100
    runs[:, :, 0, 0] = runs[:, :, 2, 0] = rng.integers(50, 100, (2, 8))
    mean = paired_bootstrap(runs[0], runs[1], 100)
    intervals = paired_bootstrap_of_classes(runs[0], runs[1], 100)
    assert intervals[0] == mean
    assert mean.low < mean.high
    assert np.isnan([intervals[1].value, intervals[1].low, intervals[1].share_above]).all()


def test_the_first_against_itself_differs_in_nothing(rng: np.random.Generator) -> None:
    first, _ = _runs(rng, 5)
    record = compare(_split(first), _split(first), CLASSES, names=("a", "a2"), settings=CompareSettings(resamples=20))
    for entry in (record["miou"], record["classes"]["dog"], record["miou_classes_in_truth"]):
        assert (entry["difference"], entry["low"], entry["high"], entry["share_flipped"]) == (0, 0, 0, None)


def test_the_sign_of_a_difference_does_not_matter_to_its_doubt(rng: np.random.Generator) -> None:
    first, second = (_split(run) for run in _runs(rng))
    forward = compare(first, second, CLASSES, names=("a", "b"), settings=CompareSettings(resamples=200))["classes"][
        "cat"
    ]
    backward = compare(second, first, CLASSES, names=("b", "a"), settings=CompareSettings(resamples=200))["classes"][
        "cat"
    ]
    assert forward["share_flipped"] == pytest.approx(backward["share_flipped"])
    assert forward["low"] == pytest.approx(-backward["high"])


def test_images_of_one_alone_are_left_out(rng: np.random.Generator) -> None:
    first, second = _runs(rng, 6)
    of_all = compare(
        _split(first[:4]), _split(second[:4]), CLASSES, names=("a", "b"), settings=CompareSettings(resamples=20)
    )
    order = [3, 0, 1, 2, 5]  # another order, and an image that the first lacks
    shuffled = _split([second[i] for i in order], [f"i{i}" for i in order])
    of_common = compare(_split(first[:4]), shuffled, CLASSES, names=("a", "b"), settings=CompareSettings(resamples=20))
    assert of_common["left_out"] == ["i5"]
    assert of_common["classes"] == of_all["classes"]
    assert "Left out, scored by one alone: 1." in compare_markdown(of_common)
    assert compare(_split(first, width=3), _split(second), CLASSES, names=("a", "b"))["boundary_miou"] is None


@pytest.mark.parametrize(
    ("ids", "scale", "message"),
    [
        (["x", "y", "z"], 1, "compare: a and b have no image in common, expected two runs over the same split"),
        (None, 2, "compare: image 'i0' has another truth in a than in b, expected the same"),
    ],
)
def test_runs_that_cannot_be_compared(
    rng: np.random.Generator, ids: list[str] | None, scale: int, message: str
) -> None:
    first, second = _runs(rng, 3)
    with pytest.raises(DataError, match=message):
        compare(_split(first), _split([scale * m for m in second], ids), CLASSES, names=("a", "b"))


def test_class_names_have_to_fit(rng: np.random.Generator) -> None:
    first, second = (_split(run) for run in _runs(rng, 2))
    with pytest.raises(ValueError, match="got 4 and 4 labels, expected 2 as class names"):
        compare(first, second, CLASSES[:2], names=("a", "b"))


def test_markdown(rng: np.random.Generator) -> None:
    first, second = (_split(run) for run in _runs(rng))
    text = compare_markdown(compare(first, second, CLASSES, names=("a", "b"), settings=CompareSettings(resamples=100)))
    head, table = text.split("\n\n")
    assert head.startswith("**b against a**: 30 images")
    assert "over 100 paired resamples" in head
    rows = {c[0]: c[1:] for c in ([x.strip() for x in line.strip("|").split("|")] for line in table.splitlines())}
    assert rows[""] == ["a", "b", "difference", "low", "high", "flipped", "images"]
    assert rows["dog"][2].startswith("+")
    assert rows["dog"][5:] == ["0.0 %", "30"]
    assert rows["owl"] == ["-", "-", "-", "-", "-", "-", "0"]
    assert set(rows) >= {"mIoU", "mIoU over classes in the truth", "boundary mIoU"}
