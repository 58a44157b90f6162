"""Seconds spent in forward passes of models.

`Device.autocast` enters `model_pass`, so that every model that runs under it is counted. On CUDA a pass returns before
the device has finished it: `measure(synchronise=True)` waits at both ends, which costs speed and is for measurements.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class _Spent(threading.local):
    """Per-thread totals of the time spent in model forward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.depth = 0
        self.begun = 0.0
        self.cpu_begun = 0.0


_spent = _Spent()
_synchronise = False


def model_seconds() -> float:
    """Return the seconds that this thread has spent in forward passes so far; take differences of it."""
    return _spent.seconds


def model_cpu_seconds() -> float:
    """Return the CPU seconds of this thread's forward passes so far, which other programs do not lengthen."""
    return _spent.cpu_seconds


@contextmanager
def model_pass(device: torch.device) -> Iterator[None]:
    """Count the time of a forward pass on `device`; a pass inside another is counted once."""
    _begin(device)
    try:
        yield
    finally:
        _end(device)


def count_passes(module: nn.Module, device: torch.device) -> None:
    """Count the forward passes of a module that a library calls."""
    module.register_forward_pre_hook(lambda *_: _begin(device))
    module.register_forward_hook(lambda *_: _end(device), always_call=True)


def _begin(device: torch.device) -> None:
    _spent.depth += 1
    if _spent.depth == 1:
        _wait_for(device)
        _spent.begun, _spent.cpu_begun = time.perf_counter(), time.thread_time()


def _end(device: torch.device) -> None:
    _spent.depth -= 1
    if _spent.depth == 0:
        _wait_for(device)
        # The clock of the wall is read first in _begin and last here, so that it covers what the CPU's clock counts.
        _spent.cpu_seconds += time.thread_time() - _spent.cpu_begun
        _spent.seconds += time.perf_counter() - _spent.begun


@contextmanager
def measure(synchronise: bool = True) -> Iterator[None]:
    """Synchronise CUDA around each pass, so that its time is not charged to the next synchronisation point."""
    global _synchronise
    before, _synchronise = _synchronise, synchronise
    try:
        yield
    finally:
        _synchronise = before


def _wait_for(device: torch.device) -> None:
    if _synchronise and device.type == "cuda":
        torch.cuda.synchronize(device)
