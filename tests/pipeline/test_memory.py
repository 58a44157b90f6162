"""The most memory that a process has held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.pipeline import memory
from moduseg.pipeline.memory import join_peaks, read_peaks, restart_peaks

SIZE = 200 << 20


def test_a_peak_outlives_what_made_it() -> None:
    restart_peaks()
    before = read_peaks()["process"]
    np.ones(SIZE, np.uint8)
    assert read_peaks()["process"] >= before + SIZE * 0.9


def test_a_restart_forgets_the_peak() -> None:
    if not memory._CLEAR.exists():
        pytest.skip("the system cannot forget the peak of a process")
    np.ones(SIZE, np.uint8)
    before = read_peaks()["process"]
    restart_peaks()
    assert read_peaks()["process"] <= before - SIZE * 0.9


def test_systems_without_a_status_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_peaks()["process"]
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "gone" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "gone" / "status")
    restart_peaks()
    # The peak of the whole life, which a restart may have forgotten in the status file.
    assert read_peaks()["process"] >= expected * 0.9
    monkeypatch.setattr(memory, "resource", None)
    assert read_peaks() == {}


def test_every_gpu_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the second one holds nothing on the first."""
    held = [0, 70]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: held[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=0: held.__setitem__(device, 5))
    assert read_peaks()["gpu"] == 70
    restart_peaks()
    assert held == [5, 5]


@pytest.mark.parametrize(("first", "second", "expected"), [
    pytest.param({}, {"process": 3}, {"process": 3}, id="an earlier version recorded none"),
    pytest.param({"process": 5, "gpu": 1}, {"process": 3, "gpu": 2}, {"gpu": 2, "process": 5}, id="each kind alone"),
])  # fmt: skip
def test_larger_peaks_stay(first: dict[str, int], second: dict[str, int], expected: dict[str, int]) -> None:
    assert join_peaks(first, second) == expected
