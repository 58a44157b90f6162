"""Seconds spent in forward passes of models, counted where the passes are made.

`Device.autocast` enters `model_pass`, so that whatever casts its model is counted. On CUDA a pass returns before the
device is through with it: `measure(synchronise=True)` waits at both ends, which costs speed and is for measurements.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Spent(threading.local):
    """Of the current thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = 0


_spent = _Spent()
_synchronise = False


def model_seconds() -> float:
    """Seconds that this thread has spent in forward passes so far; differences of it are what counts."""
    return _spent.seconds


@contextmanager
def model_pass(device: torch.device) -> Iterator[None]:
    """Count the time of a forward pass on `device`; a pass inside another is counted once."""
    if _spent.depth:
        yield
        return
    _wait_for(device)
    _spent.depth += 1
    start = time.perf_counter()
    try:
        yield
    finally:
        _wait_for(device)
        _spent.seconds += time.perf_counter() - start
        _spent.depth -= 1


@contextmanager
def measure(synchronise: bool = True) -> Iterator[None]:
    """Inside, passes on CUDA are waited for, so that their seconds are theirs and not those of whoever waits next."""
    global _synchronise
    before, _synchronise = _synchronise, synchronise
    try:
        yield
    finally:
        _synchronise = before


def _wait_for(device: torch.device) -> None:
    if _synchronise and device.type == "cuda":
        torch.cuda.synchronize(device)
