from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from moduseg.errors import ArtefactError
from moduseg.evaluation import counts as module
from moduseg.evaluation.bootstrap import image_counts
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.counts import ImageCounts, SplitCounts


def _matrices(rng: np.random.Generator, n: int, size: int = 5) -> np.ndarray:
    return rng.integers(0, 90_000_000, (n, size, size)) * (rng.random((n, size, size)) < 0.2)


def _split(matrices: np.ndarray, boundary: np.ndarray | None = None) -> SplitCounts:
    counts = SplitCounts(matrices.shape[1])
    for i, matrix in enumerate(matrices):
        counts.append(f"a/{i}", ImageCounts(matrix, None if boundary is None else boundary[i], 7 + i))
    return counts


@pytest.mark.parametrize("has_boundary", [False, True])
def test_nothing_is_lost_on_the_way_to_a_file_and_back(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, has_boundary: bool
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    matrices, boundary = _matrices(rng, 8), rng.integers(0, 9, (8, 3, 5))
    matrices[4] = 0
    counts = _split(matrices, boundary if has_boundary else None)
    data = counts.to_bytes()
    again = SplitCounts.from_bytes(data, "file")
    assert again.to_bytes() == data
    for one in (counts, again):
        assert one.ids == [f"a/{i}" for i in range(8)]
        assert one.widths == list(range(7, 15))
        np.testing.assert_array_equal(one.matrix(), matrices.sum(0))
        np.testing.assert_array_equal(one.label_counts(), image_counts(list(matrices)))
        np.testing.assert_array_equal(one.label_counts(False, "ignore"), label_counts(matrices, False, "ignore"))
        assert one.has_boundary is has_boundary
        if has_boundary:
            np.testing.assert_array_equal(one.boundary_counts(), boundary)
            assert (one.boundary_counts(False)[..., 0] == 0).all()
            np.testing.assert_array_equal(one.boundary_counts(False)[..., 1:], boundary[..., 1:])
        else:
            with pytest.raises(ValueError, match=r"without contours; set evaluation\.boundary_width"):
                one.boundary_counts()


def test_the_file_is_small(rng: np.random.Generator) -> None:
    matrices = np.zeros((200, 81, 81), dtype=np.int64)
    for matrix in matrices:
        matrix[rng.integers(0, 81, 8), rng.integers(0, 81, 8)] = 1000
    assert len(_split(matrices).to_bytes()) / 200 < 80


def test_no_image_at_all() -> None:
    counts = SplitCounts.from_bytes(SplitCounts(3).to_bytes(), "file")
    assert (len(counts), counts.matrix().sum(), counts.label_counts().shape) == (0, 0, (0, 3, 3))


def test_select(rng: np.random.Generator) -> None:
    matrices, boundary = _matrices(rng, 4), rng.integers(0, 9, (4, 3, 5))
    chosen = _split(matrices, boundary).select(["a/2", "a/0"])
    assert (chosen.ids, chosen.widths) == (["a/2", "a/0"], [9, 7])
    np.testing.assert_array_equal(chosen.label_counts(), image_counts(list(matrices[[2, 0]])))
    np.testing.assert_array_equal(chosen.boundary_counts(), boundary[[2, 0]])


def test_what_does_not_fit_is_refused(rng: np.random.Generator) -> None:
    counts = _split(_matrices(rng, 1))
    with pytest.raises(ValueError, match=r"counts of 'b': got \(4, 4\), expected \(5, 5\)"):
        counts.append("b", ImageCounts(np.zeros((4, 4), dtype=np.int64)))
    with pytest.raises(ValueError, match="contours for some images alone"):
        counts.append("b", ImageCounts(np.zeros((5, 5), dtype=np.int64), np.zeros((3, 5), dtype=np.int64), 1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"size": np.array([0])}, id="no label"),
        pytest.param({"size": np.array([300])}, id="too many labels"),
        pytest.param({"size": np.array([2, 3])}, id="two sizes"),
        pytest.param({"ids": np.frombuffer(b'"a"', np.uint8)}, id="ids are no list"),
        pytest.param({"ids": np.frombuffer(b"[1, 2, 3]", np.uint8)}, id="ids are numbers"),
        pytest.param({"ids": np.frombuffer(b"{", np.uint8)}, id="ids are no JSON"),
        pytest.param({"ids": np.frombuffer(json.dumps(["a", "a", "b"]).encode(), np.uint8)}, id="an id twice"),
        pytest.param({"widths": np.zeros(2, np.int64)}, id="widths"),
        pytest.param({"confusion.lengths": np.array([9, 9, 9], np.uint32)}, id="lengths"),
        pytest.param({"confusion.cells": np.zeros(0, np.uint16)}, id="cells"),
        pytest.param({"confusion.values": np.zeros(3, np.float32)}, id="kind of values"),
        pytest.param({"confusion.lengths": None}, id="missing"),
    ],
)
def test_a_damaged_file_is_one_line(rng: np.random.Generator, change: dict[str, np.ndarray | None]) -> None:
    arrays = {**load_arrays(_split(_matrices(rng, 3)).to_bytes()), **change}
    data = save_arrays({name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ArtefactError, match=r"x/counts: not readable as counts \(.*remove the file and run") as caught:
        SplitCounts.from_bytes(data, "x/counts")
    assert "\n" not in str(caught.value)


def test_cells_out_of_range_and_bytes_that_are_no_file(rng: np.random.Generator) -> None:
    arrays = load_arrays(_split(_matrices(rng, 3)).to_bytes())
    arrays["confusion.cells"] = arrays["confusion.cells"] + np.uint16(25)
    for data in (save_arrays(arrays), b"", b"x" * 100):
        with pytest.raises(ArtefactError, match="not readable as counts"):
            SplitCounts.from_bytes(data, "x")
