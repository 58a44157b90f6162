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
from torch import nn


class _Spent(threading.local):
    """Of the current thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.depth = 0
        self.begun = 0.0
        self.cpu_begun = 0.0


_spent = _Spent()
_synchronise = False


def model_seconds() -> float:
    """Seconds that this thread has spent in forward passes so far; differences of it are what counts."""
    return _spent.seconds


def model_cpu_seconds() -> float:
    """The same in seconds that the thread computed: what other programs on the machine leave alone."""
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
    """Count the forward passes of a module that somebody else's code calls."""
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
        _spent.seconds += time.perf_counter() - _spent.begun
        _spent.cpu_seconds += time.thread_time() - _spent.cpu_begun


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
