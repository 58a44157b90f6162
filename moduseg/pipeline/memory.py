"""The most memory that this process and its GPU have held since a moment."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from moduseg.allocator import release_memory

try:
    import resource
except ImportError:  # no such module on Windows
    resource = None  # type: ignore[assignment]

PeakMemory = dict[str, int]
"""Bytes: `process`, resident in the main memory, and `gpu`, in tensors on the GPU that holds most, if one is in use."""

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""What Linux takes as the request to forget the peak of the resident memory."""


def restart_peaks() -> None:
    """Forget the peaks, so that `read_peaks` tells of what follows.

    What nothing holds any more goes back to the system first. Where the system cannot forget the process's peak, it
    stays that of the process's whole life.
    """
    release_memory()
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def read_peaks() -> PeakMemory:
    """Return the most memory held since `restart_peaks`; empty where the system does not say."""
    peaks: PeakMemory = {}
    if (process := _read_process_peak()) is not None:
        peaks["process"] = process
    if torch.cuda.is_initialized():
        # The current GPU is the first one, whichever `runtime.device` or torchrun's rank names.
        peaks["gpu"] = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return peaks


def join_peaks(first: PeakMemory, second: PeakMemory) -> PeakMemory:
    """Return the larger peak of each kind."""
    return {kind: max(first.get(kind, 0), second.get(kind, 0)) for kind in sorted({**first, **second})}


def _read_process_peak() -> int | None:
    """Return the peak of the resident memory in bytes; `None` where the system does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    if resource is None:
        return None
    # macOS counts bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
