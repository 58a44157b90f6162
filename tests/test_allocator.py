"""Memory that is given back to the system."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from moduseg import allocator
from moduseg.allocator import bound_arenas, look_at_all, pause_collection, release_memory, trim_memory
from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.class_scores import ClassScores
from tests.support.runs import overrides


class Node:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


class Library:
    """Stands for glibc, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def malloc_trim(self, pad: int) -> None:
        self.calls.append((pad,))

    def mallopt(self, name: int, value: int) -> None:
        self.calls.append((name, value))


def test_garbage_is_collected_and_memory_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(allocator, "_load_library", lambda: library)
    monkeypatch.setattr(allocator, "_num_releases", count())
    gc.disable()
    try:
        release_memory()
        node = weakref.ref(Node())
        assert node() is not None
        release_memory()
        assert node() is None
    finally:
        gc.enable()
    bound_arenas()
    trim_memory()
    assert library.calls == [(0,), (0,), (-8, 2), (-3, 1 << 25), (-1, 1 << 26), (0,)]


def test_the_first_stage_of_a_process_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look at every object of every library, and an earlier run's are not there."""
    collections: list[str] = []
    monkeypatch.setattr(allocator, "_load_library", lambda: None)
    monkeypatch.setattr(allocator, "_num_releases", count())
    monkeypatch.setattr(gc, "collect", lambda: collections.append("collected"))
    try:
        for expected in ([], ["collected"], ["collected", "collected"]):
            release_memory()
            assert collections == expected
    finally:
        gc.unfreeze()


def test_what_is_left_is_looked_at_again_in_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_load_library", lambda: None)
    gc.disable()
    try:
        node = Node()
        is_alive = weakref.ref(node)
        release_memory()
        assert gc.get_freeze_count() > 0
        del node
        gc.collect()
        assert is_alive() is not None
        look_at_all()
        gc.collect()
        assert is_alive() is None
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_run_keeps_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator refers to its workspace, so that only a collection frees both."""
    workspaces: list[weakref.ref[Workspace]] = []
    build = Workspace.__init__

    def note(work: Workspace, *arguments: Any, **more: Any) -> None:
        workspaces.append(weakref.ref(work))
        build(work, *arguments, **more)

    monkeypatch.setattr(Workspace, "__init__", note)
    ClassScores.run(compose(overrides(tmp_path, "pseudo_masks=clip_dense", train=1, val=1)))
    gc.collect()
    assert [work() for work in workspaces] == [None]


def test_collection_pauses() -> None:
    assert gc.isenabled()
    with pause_collection():
        assert not gc.isenabled()
        with pause_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator._load_library.__wrapped__() is None
    monkeypatch.setattr(allocator, "_load_library", lambda: None)
    bound_arenas()
    release_memory()
    trim_memory()


def test_stages_do_not_import_what_few_runs_need() -> None:
    """Each of these takes a hundred megabytes or seconds; they are imported where they are used."""
    heavy = ("sklearn", "pandas", "skimage", "transformers", "diffusers", "timm", "torchvision")
    program = f"import sys, moduseg.stages.infer; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
