from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evaluation as speed
from moduseg.errors import DataError
from moduseg.evaluation.pairs import count_pairs
from tests import reference

IDS = [str(i) for i in range(53)]


def _pair(image_id: str) -> tuple[np.ndarray, np.ndarray] | None:
    rng = np.random.default_rng(int(image_id))
    if image_id == "40":
        return None
    return rng.choice([0, 1, 2, 255], (9, 8)).astype(np.uint8), rng.integers(0, 3, (9, 8)).astype(np.uint8)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_any_number_of_workers_gives_the_same_in_order(workers: int) -> None:
    counted = list(count_pairs(IDS, _pair, 3, boundary_width=0.1, workers=workers))
    assert [image_id for image_id, _ in counted] == IDS
    for image_id, counts in counted:
        pair = _pair(image_id)
        if pair is None or counts is None:
            assert pair is counts
            continue
        truth, prediction = pair
        kept = truth != 255
        expected = np.zeros((3, 3), dtype=np.int64)
        np.add.at(expected, (truth[kept], prediction[kept]), 1)
        np.testing.assert_array_equal(counts.confusion, expected)
        assert counts.width == 1
        np.testing.assert_array_equal(counts.boundary, reference.boundary_counts(truth, prediction, 3, 1))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_in_order_ends_it(workers: int) -> None:
    before = threading.active_count()

    def load(image_id: str) -> tuple[np.ndarray, np.ndarray]:
        truth = np.zeros((2, 2), dtype=np.uint8)
        return truth, truth + np.uint8(9 if int(image_id) >= 20 else 0)

    seen = []

    def run() -> None:
        for image_id, counts in count_pairs(IDS, load, 3, workers=workers):
            assert counts is not None
            assert counts.boundary is None
            seen.append(image_id)

    with pytest.raises(DataError, match=r"image '20': prediction has label id 9, expected 0\.\.2"):
        run()
    assert seen == IDS[: len(seen)]
    assert threading.active_count() == before


def test_no_image() -> None:
    assert list(count_pairs([], _pair, 3, workers=2)) == []


def test_files_are_counted_as_the_plain_way_counts_them(tmp_path: Path) -> None:
    pairs = speed.write_pairs(tmp_path, 5, 60, 80)
    expected = reference.confusion_of_files(pairs, speed.NUM_LABELS)
    assert expected.sum() > 0
    np.testing.assert_array_equal(speed.count_files(pairs, 1).matrix(), expected)
    np.testing.assert_array_equal(speed.count_files(pairs, 2).matrix(), expected)
