"""What all figures share: interleaved repeats, rows with their target, the tables."""

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
        device: where our side runs; the plain side is numpy and OpenCV on the CPU.
        repeats: rounds, in each of which every way has its turn.
        small: hand-sized inputs, to see that both sides agree; the times then say nothing.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 7
    small: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        figure: what was measured.
        target: what was asked for, in words.
        found: what was found, in words; `not measured` and why where it was not.
        reached: whether the target is reached; `None` where it was not measured.
        details: times and sizes, for the JSON file.
    """

    figure: str
    target: str
    found: str
    reached: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def not_measured(figure: str, target: str, why: str) -> Row:
    """A row that this machine cannot fill."""
    return Row(figure, target, f"not measured: {why}")


@dataclass(frozen=True)
class Times:
    """Seconds of one way, round by round.

    Attributes:
        wall: on the clock; on CUDA between two events.
        cpu: that the process spent computing, all threads together: what other programs on the machine leave alone.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Median, least and most of both."""
        return {"wall": summary(self.wall), "cpu": summary(self.cpu)}


def interleave(
    ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, Times]:
    """The times of every way in every round, after one round that is not counted.

    The order is turned around from round to round, so that no way always follows the same one.
    """
    times = {name: Times() for name in ways}
    for round_ in range(0 if warm_up else 1, repeats + 1):
        for name in list(ways)[:: 1 if round_ % 2 else -1]:
            wall, cpu = _timed(ways[name], device)
            if round_:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def _timed(way: Callable[[], object], device: torch.device) -> tuple[float, float]:
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
    """One number: by how many bytes the most that was held inside exceeds what was held at the beginning.

    On the CPU it is the process's resident memory, whose mark Linux lets one set back; elsewhere what the process held
    at its worst before hides that much.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(int(torch.cuda.max_memory_allocated(device)) - before)
        return
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        mark.write_text("5", encoding="ascii")
    before = _resident()
    yield found
    found.append(_resident() - before)


def _resident() -> int:
    """Most bytes that the process held since the mark was set back."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def faster(figure: str, least: float, times: Mapping[str, Times], slow: str, fast: str, **details: Any) -> Row:
    """A row that asks for `fast` to be at least `least` times as fast as `slow`: the median over rounds counts."""
    ratio, text = _compared(times, slow, fast)
    details = {"ratio": ratio, "seconds": {name: value.as_dict() for name, value in times.items()}, **details}
    return Row(figure, f"at least {least:g}x {slow}", text, ratio["median"] >= least, details)


def within(figure: str, most: float, times: Mapping[str, Times], base: str, ours: str, **details: Any) -> Row:
    """A row that asks for `ours` to take at most `most` times what `base` takes."""
    ratio, text = _compared(times, ours, base)
    details = {"ratio": ratio, "seconds": {name: value.as_dict() for name, value in times.items()}, **details}
    return Row(figure, f"within {most:g}x {base}", text, ratio["median"] <= most, details)


def _compared(times: Mapping[str, Times], above: str, below: str) -> tuple[dict[str, float], str]:
    """The ratio of two ways, and what a table says of it."""
    ratio = summary([a / b for a, b in zip(times[above].wall, times[below].wall, strict=True)])
    cpu = median(times[above].cpu) / max(median(times[below].cpu), 1e-9)
    each = ", ".join(f"{name} {_short(median(times[name].wall))}" for name in (above, below))
    return ratio, f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}; CPU time {cpu:.2f}x); {each}"


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
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


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = ["| figure | target | found | reached |", "|---|---|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    lines += [f"| {row.figure} | {row.target} | {row.found} | {words[row.reached]} |" for row in rows]
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    return "\n".join([*lines, "", f"Ratios are medians over rounds (least to most). Measured with {facts}.", ""])


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "machine": dict(about),
        "rows": [
            {
                "figure": row.figure,
                "target": row.target,
                "found": row.found,
                "reached": row.reached,
                "details": dict(row.details),
            }
            for row in rows
        ],
    }
