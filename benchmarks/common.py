"""Shared by all figures: interleaved repeats, rows with their targets, tables."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch


@dataclass(frozen=True)
class Setting:
    """How figures are measured.

    Attributes:
        device: where this package runs; the reference is numpy and OpenCV on the CPU.
        repeats: number of rounds; every way runs once in each.
        is_small: tiny inputs, to check that both sides agree; the times then mean nothing.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 7
    is_small: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        figure: what was measured.
        target: what is required, in words.
        result: what was measured, in words; `not measured` and the reason if it was not.
        is_reached: whether the target is reached; `None` if it was not measured.
        details: times and sizes, for the JSON file.
    """

    figure: str
    target: str
    result: str
    is_reached: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def make_unmeasured_row(figure: str, target: str, reason: str) -> Row:
    """Return a row for a figure that this machine cannot measure."""
    return Row(figure, target, f"not measured: {reason}")


@dataclass(frozen=True)
class Times:
    """Seconds of one way, round by round.

    Attributes:
        wall: on the clock; on CUDA between two events.
        cpu: CPU time of all threads together, which other programs on the machine disturb less.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return median, minimum and maximum of both."""
        return {"wall": summarise(self.wall), "cpu": summarise(self.cpu)}


def interleave(
    ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, Times]:
    """Time every way in every round, after one round that is not counted.

    The order is reversed from round to round, so that no way always follows the same one.
    """
    times = {name: Times() for name in ways}
    for round_ in range(0 if warm_up else 1, repeats + 1):
        for name in list(ways)[:: 1 if round_ % 2 else -1]:
            wall, cpu = _time_once(ways[name], device)
            if round_:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def _time_once(way: Callable[[], object], device: torch.device) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    if device.type != "cuda":
        way()
        return time.perf_counter() - start, time.process_time() - cpu
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    way()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, time.process_time() - cpu


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Measure by how many bytes memory grew at its peak inside the block; the list gets one number at its end.

    On the CPU it is the process's resident memory, whose peak can be reset on Linux. Elsewhere an earlier, higher peak
    of the process hides growth below it.
    """
    growth: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield growth
        growth.append(int(torch.cuda.max_memory_allocated(device)) - before)
        return
    reset_file = Path("/proc/self/clear_refs")
    if reset_file.exists():
        reset_file.write_text("5", encoding="ascii")
    before = _read_peak()
    yield growth
    growth.append(_read_peak() - before)


def _read_peak() -> int:
    """Return the peak of the process's resident memory since it was reset, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def require_faster(
    figure: str, min_ratio: float, times: Mapping[str, Times], slow: str, fast: str, **details: Any
) -> Row:
    """Return a row that requires `fast` to be at least `min_ratio` times as fast as `slow`, by the median of rounds."""
    ratio, text = _compare(times, slow, fast)
    details = {"ratio": ratio, "seconds": {name: value.as_dict() for name, value in times.items()}, **details}
    return Row(figure, f"at least {min_ratio:g}x {slow}", text, ratio["median"] >= min_ratio, details)


def require_within(
    figure: str, max_ratio: float, times: Mapping[str, Times], base: str, ours: str, **details: Any
) -> Row:
    """Return a row that requires `ours` to take at most `max_ratio` times as long as `base`."""
    ratio, text = _compare(times, ours, base)
    details = {"ratio": ratio, "seconds": {name: value.as_dict() for name, value in times.items()}, **details}
    return Row(figure, f"within {max_ratio:g}x {base}", text, ratio["median"] <= max_ratio, details)


def _compare(times: Mapping[str, Times], above: str, below: str) -> tuple[dict[str, float], str]:
    """Return the ratio of two ways, and its text for the table."""
    ratio = summarise([a / b for a, b in zip(times[above].wall, times[below].wall, strict=True)])
    cpu = median(times[above].cpu) / max(median(times[below].cpu), 1e-9)
    each = ", ".join(f"{name} {_format_seconds(median(times[name].wall))}" for name in (above, below))
    return ratio, f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}; CPU time {cpu:.2f}x); {each}"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the times depend on."""
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def make_markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return the rows as a table for people."""
    lines = ["| figure | target | found | reached |", "|---|---|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    lines += [f"| {row.figure} | {row.target} | {row.result} | {words[row.is_reached]} |" for row in rows]
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([*lines, "", f"Ratios are medians over rounds (least to most). Measured with {facts}.", ""])


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows as JSON values."""
    return {
        "machine": dict(about),
        "rows": [
            {
                "figure": row.figure,
                "target": row.target,
                "found": row.result,
                "reached": row.is_reached,
                "details": dict(row.details),
            }
            for row in rows
        ],
    }
