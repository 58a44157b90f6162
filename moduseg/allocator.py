"""What the C library keeps of freed memory: bounded, and given back between the steps of a run.

A run allocates and frees masks and activations of many megabytes in several threads. glibc keeps what was freed, for
each thread's arena by itself, so that a process seems to grow from step to step. Elsewhere both functions do nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

_ARENA_MAX = -8
"""`M_ARENA_MAX` of glibc's `mallopt`."""
_NUM_ARENAS = 2
"""One for the thread that computes, one for those that read, encode and write."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""`M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`."""
_LARGEST_BLOCK = 1 << 25
"""Bytes of the largest block that is taken from an arena, which is as large as glibc allows."""
_MOST_KEPT = 1 << 26
"""Bytes that an arena keeps at its end between two calls of `trim_memory`. glibc gives back more than twice a block at
once, so that a model's next pass has it filled with zeros again: a seventh of the time of SAM's proposals."""
_num_releases = count()
"""Of this process so far."""


def bound_arenas() -> None:
    """Let the threads of this process share two arenas; threads that have one keep it, so call it early."""
    library = _load_library()
    if library is not None:
        library.mallopt(_ARENA_MAX, _NUM_ARENAS)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def release_memory() -> None:
    """Collect garbage, and give free memory back to the system.

    What is left, half a million objects of libraries above all, is not looked at again until `look_at_all`: a stage
    would else begin with a third of a second of that. So would the first one of a process, which imports and newly made
    models leave no garbage to.
    """
    if next(_num_releases):
        gc.collect()
    gc.freeze()
    trim_memory()


@contextmanager
def pause_collection() -> Iterator[None]:
    """Collect no garbage inside: imports make many objects that stay, and a fifth of their time is looking at these."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def look_at_all() -> None:
    """Let the next collection look at what earlier ones have left: at both ends of a run, since its models end."""
    gc.unfreeze()


def trim_memory() -> None:
    """Give free memory back to the system: once a batch, since what is used again has to be fetched again.

    Images of many sizes leave holes that the next one does not fit into, so that a model's passes would take more and
    more.
    """
    library = _load_library()
    if library is not None:
        library.malloc_trim(0)


# What is not looked at when the interpreter ends would be reported as leaked by libraries in C++.
atexit.register(gc.unfreeze)


@cache
def _load_library() -> Any | None:
    """Return the C library of this process; `None` unless it is glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no such handle, as on Windows
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
