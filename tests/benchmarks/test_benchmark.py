"""Every figure of the benchmark on hand-sized inputs: both sides agree, and the tables say what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import FIGURES, measure
from benchmarks.common import (
    Row,
    Setting,
    Times,
    as_json,
    describe_machine,
    interleave,
    make_markdown,
    require_faster,
    require_within,
)

CPU = torch.device("cpu")


PROCESSES = ("outside_models", "memory", "shards", "photographs")
"""Whole runs, some in processes of their own: seconds each, however small."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in PROCESSES else ()) for name in FIGURES]
)
def test_figure(name: str) -> None:
    rows = measure(name, Setting(CPU, repeats=1, is_small=True))
    assert rows
    for row in rows:
        assert (row.is_reached is None) == row.result.startswith("not measured: ")
        assert row.target


def test_the_median_decides() -> None:
    times = {"slow": Times([4.0, 6.0, 90.0], [1.0] * 3), "fast": Times([2.0, 2.0, 2.0], [0.5] * 3)}
    row = require_faster("it", 3, times, "slow", "fast", size=7)
    assert row.is_reached is True
    assert row.target == "at least 3x slow"
    assert row.result == "3.00x (2.00 to 45.00; CPU time 2.00x); slow 6.00 s, fast 2.00 s"
    assert row.details["size"] == 7
    assert require_faster("it", 3.1, times, "slow", "fast").is_reached is False
    assert require_within("it", 3, times, "fast", "slow").is_reached is True
    assert require_within("it", 2.9, times, "fast", "slow").is_reached is False


def test_ways_are_interleaved_after_a_round_to_warm_up() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 2, CPU)  # type: ignore[misc]
    assert "".join(calls) == "baabba"
    assert [len(t.wall) for t in times.values()] == [2, 2]


def test_memory_is_what_was_held_at_the_worst() -> None:
    """In a process of its own: in this one other tests may free as much meanwhile."""
    code = """if True:
        import numpy as np, torch
        from benchmarks.common import peak_memory
        for size in (40_000_000, 0):
            with peak_memory(torch.device("cpu")) as growth:
                block = np.ones(size, np.uint8)
                del block
            print(growth[0])
    """
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    held, nothing = (int(line) for line in run.stdout.split())
    assert 30e6 < held < 80e6
    assert nothing < 20e6


def test_tables() -> None:
    rows = [Row("one", "5x", "6x", True, {"a": 1}), Row("two", "5x", "not measured: no CUDA device")]
    about = describe_machine(CPU)
    text = make_markdown(rows, about)
    assert "| one | 5x | 6x | yes |" in text
    assert "| two | 5x | not measured: no CUDA device |  |" in text
    assert json.loads(json.dumps(as_json(rows, about)))["rows"][0]["details"] == {"a": 1}


def test_script(tmp_path: Path) -> None:
    """One figure by itself, in the style of the other scripts and with dashes."""
    script = str(Path(__file__).parents[2] / "scripts" / "benchmark.py")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)

    done = run("only=purification", "repeats=1", "--small", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "| purification, 20 classes, 40x60 |" in (tmp_path / "benchmark.md").read_text()
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["rows"]) == 2
    wrong = run("--only", "everything", "--device", "cpu")
    assert wrong.returncode == 2
    assert "only: got 'everything', expected some of" in wrong.stderr
