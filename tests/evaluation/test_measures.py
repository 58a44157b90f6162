"""Every measure on matrices counted by hand, and what reads the table of measures."""

from __future__ import annotations

import numpy as np
import pytest

from moduseg.evaluation import measures
from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.measures import (
    MEASURES,
    LabelMapCounts,
    Measure,
    format_value,
    measure_label_maps,
    single_measures,
)
from moduseg.evaluation.tables import ContourWidth, ScoredRun, results_markdown, results_record

HAND = np.array([[6, 1, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
"""Background: 6 of 8 pixels right; class 1: 3 of 4; class 2 in neither; class 3 predicted alone."""
STRICT = np.array([[0, 0, 0, 0], [10, 60, 30, 0], [20, 0, 40, 0], [0, 0, 0, 0]])
"""Label 0 is no class; 10 + 20 pixels of classes 1 and 2 were left uncovered."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("iou", [600 / 9, 60.0, np.nan, 0.0], id="IoU"),
        pytest.param("precision", [600 / 7, 75.0, np.nan, 0.0], id="precision"),
        pytest.param("recall", [75.0, 75.0, np.nan, np.nan], id="recall"),
        pytest.param("dice", [1200 / 15, 75.0, np.nan, 0.0], id="Dice"),
        pytest.param("mean_iou", (600 / 9 + 60 + 0) / 3, id="mIoU"),
        pytest.param("mean_iou_in_truth", (600 / 9 + 60) / 2, id="mIoU over classes in the truth"),
        pytest.param("pixel_accuracy", 75.0, id="pixel accuracy"),
        pytest.param("frequency_weighted_iou", 8 / 12 * 600 / 9 + 4 / 12 * 60, id="frequency-weighted IoU"),
        pytest.param("mean_accuracy", 75.0, id="mean accuracy: classes in the truth"),
        pytest.param("mean_dice", (80 + 75 + 0) / 3, id="mean Dice: classes in truth or prediction"),
    ],
)
def test_measures_counted_by_hand(name: str, expected: float | list[float]) -> None:
    compute = getattr(measures, name)
    np.testing.assert_allclose(compute(label_counts(HAND)), expected)
    # Many splits at once give what one gives.
    np.testing.assert_array_equal(compute(label_counts(np.stack([HAND, HAND])))[1], compute(label_counts(HAND)))


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_nothing_counted_is_nan_not_zero(measure: Measure) -> None:
    assert np.isnan(measure.compute(np.zeros((3, 4), dtype=np.int64))).all()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_measure_has_one_value_or_one_a_class(measure: Measure) -> None:
    shape = measure.compute(label_counts(np.stack([HAND, HAND]))).shape
    assert shape == ((2, 4) if measure.is_per_class else (2,))


def test_names_and_columns_are_unique() -> None:
    assert len({measure.name for measure in MEASURES}) == len(MEASURES)
    assert len({measure.column for measure in MEASURES}) == len(MEASURES)


def test_without_background_uncovered_pixels_are_wrong_or_ignored() -> None:
    wrong, ignored = (label_counts(STRICT, False, rule) for rule in ("wrong", "ignore"))  # type: ignore[arg-type]
    np.testing.assert_allclose(measures.iou(wrong), [np.nan, 60.0, 100 * 40 / 90, np.nan])
    np.testing.assert_allclose(measures.iou(ignored), [np.nan, 100 * 60 / 90, 100 * 40 / 70, np.nan])
    assert measures.mean_iou(wrong) == pytest.approx((60 + 400 / 9) / 2)
    assert measures.pixel_accuracy(wrong) == pytest.approx(100 * 100 / 160)
    assert measures.pixel_accuracy(ignored) == pytest.approx(100 * 100 / 130)
    # With a background, label 0 is a class that was predicted and never right.
    np.testing.assert_allclose(measures.iou(label_counts(STRICT)), [0, 60, 100 * 40 / 90, np.nan])
    stacked = label_counts(np.stack([STRICT, STRICT]), False, "ignore")
    np.testing.assert_array_equal(stacked, [ignored, ignored])


def test_uncovered_figures_where_there_is_no_background_alone() -> None:
    classes = ("background", "a", "b", "c")
    record = measure_label_maps(LabelMapCounts(STRICT, has_background=False), classes)
    assert record["uncovered"] == {
        "share": pytest.approx(100 * 30 / 160),
        "miou_wrong": pytest.approx((60 + 400 / 9) / 2),
        "miou_ignored": pytest.approx((600 / 9 + 400 / 7) / 2),
    }
    assert "uncovered" not in measure_label_maps(LabelMapCounts(STRICT), classes)


def test_precision_and_recall_are_shares() -> None:
    counts = label_counts(STRICT)
    np.testing.assert_allclose(measures.precision(counts), [0, 100, 100 * 40 / 70, np.nan])
    np.testing.assert_allclose(measures.recall(counts), [np.nan, 60, 100 * 40 / 60, np.nan])


def test_a_new_measure_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Measure(name="worst_iou", title="worst IoU", compute=lambda counts: np.nanmin(measures.iou(counts), -1))
    monkeypatch.setattr(measures, "MEASURES", (*MEASURES, worst))
    run = ScoredRun("d", "val", 1, "json", {})
    record = results_record(LabelMapCounts(HAND[:2, :2]), ("background", "a"), run)
    assert record["worst_iou"] == 60.0
    assert "| worst IoU                      |  60.0 |" in results_markdown(record)
    assert worst in single_measures()


def test_a_measure_of_each_class_with_counts_of_its_own_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    contours = np.array([[2, 1], [4, 1], [4, 2]])
    far = Measure(
        name="contours.distance",
        title="distance",
        compute=lambda counts: counts[..., 1, :] / 3,
        counts=measures.count_contours,
        is_per_class=True,
        unit="px",
        decimals=3,
    )
    monkeypatch.setattr(measures, "MEASURES", (*MEASURES, far))
    counts = LabelMapCounts(HAND[:2, :2], contours)
    width = ContourWidth(0.02, [8])
    record = results_record(counts, ("background", "a"), ScoredRun("d", "val", 1, "json", {}), contours=width)
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in results_markdown(record).splitlines()[2:6]]
    assert table[0] == ["class", "IoU", "precision", "recall", "boundary IoU", "distance (px)", "share of pixels"]
    assert table[2][-3:-1] == ["33.3", "1.333"]


@pytest.mark.parametrize("name", ["images", "seconds", "miou_interval", "boundary_iou.width", "confusion.share"])
def test_a_measure_may_not_have_the_name_of_another_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MEASURES", (*MEASURES, Measure(name=name, title="x", compute=measures.mean_iou)))
    counts = LabelMapCounts(HAND[:2, :2], HAND[:3, :2])
    run = ScoredRun("d", "val", 1, "json", {})
    interval, width = Interval(1.0, 0.0, 2.0), ContourWidth(0.02, [8])
    with pytest.raises(
        ValueError, match=f"measures: got {name.split('.')[-1] if 'iou' in name else name.split('.')[0]}"
    ):
        results_record(counts, ("background", "a"), run, interval=interval, contours=width)


def test_results_without_a_measure_have_no_row_of_it() -> None:
    record = results_record(LabelMapCounts(HAND[:2, :2]), ("background", "a"), ScoredRun("d", "val", 1, "json", {}))
    del record["mean_dice"], record["precision"]
    text = results_markdown(record)
    assert "mean Dice" not in text
    assert "precision" not in text
    assert "mean accuracy" in text


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        pytest.param(None, "", "-", id="no value"),
        pytest.param(float("nan"), "", "-", id="nan"),
        pytest.param(2.25, "+", "+2.2", id="signed"),
        pytest.param(-0.5, "", "-0.5", id="negative"),
    ],
)
def test_values_as_text(value: float | None, sign: str, expected: str) -> None:
    assert format_value(value, sign) == expected
