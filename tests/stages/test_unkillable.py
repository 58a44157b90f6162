"""Killed at any moment, out of disk, run twice at once, damaged between runs: the end is the same, byte for byte."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.stages import evaluate
from tests.support.processes import STAGES, start
from tests.support.runs import overrides, result_bytes

SETTINGS = ("pseudo_masks=cam", "runtime.workers=2")
"""Class activation maps: the one generator that is fitted, so that the fit is killed as well."""


def arguments(outputs: Path, *more: str) -> list[str]:
    return overrides(outputs, *SETTINGS, *more)


def results(outputs: Path) -> dict[str, bytes]:
    """By name, but for the figures of `evaluate`, whose folder is named by records of times."""
    return {k: v for k, v in result_bytes(outputs).items() if "/evaluate/" not in k}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an undisturbed run, the first of the processes that start at once."""
    outputs = tmp_path_factory.mktemp("finished")
    process = start("evaluate", arguments(outputs), outputs / "log")
    process.join(100)
    assert process.exitcode == 0, (outputs / "log").read_text()
    return outputs


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_stage_is_killed_at_random_moments(kills: int, finished: Path, tmp_path: Path) -> None:
    """The moments are drawn anew on every run; a stage that ends before its moment is started again from nothing."""
    seed = random.SystemRandom().randrange(10**9)
    draw, log = random.Random(seed), tmp_path / "log"
    outputs = tmp_path / "outputs"
    caught = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        before = tmp_path / "before"
        if outputs.exists():
            shutil.copytree(outputs, before, symlinks=True)
        begun = time.perf_counter()
        process = start(stage, arguments(outputs), log)
        process.join(60)
        assert process.exitcode == 0, log.read_text()
        duration = time.perf_counter() - begun
        _restore(before, outputs)
        for _ in range(10 * kills):
            process = start(stage, arguments(outputs), log)
            process.join(draw.uniform(0, duration))
            if process.exitcode is None:
                process.kill()
                process.join()
                caught[stage] += process.exitcode == -signal.SIGKILL
            else:
                _restore(before, outputs)
            if caught[stage] == kills:
                break
        process = start(stage, arguments(outputs), log)
        process.join(60)
        assert process.exitcode == 0, (seed, log.read_text())
        shutil.rmtree(before, ignore_errors=True)
    assert caught == dict.fromkeys(STAGES, kills)
    assert results(outputs).keys() == results(finished).keys(), seed
    assert results(outputs) == results(finished), seed
    assert list(outputs.rglob("*.tmp")) == [], seed
    assert "Traceback" not in log.read_text(), seed


def _restore(before: Path, outputs: Path) -> None:
    shutil.rmtree(outputs)
    if before.exists():
        shutil.copytree(before, outputs, symlinks=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not allowed here ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, finished: Path, tmp_path: Path
) -> None:
    sizes, full = ("250k", "400k", "600k", "50m"), 0
    for size in sizes:
        log = tmp_path / f"log-{size}"
        process = start("infer", arguments(small_disk / "outputs", f"dataset.root={finished}/world-6-4"), log)
        process.join(100)
        text = log.read_text()
        assert "Traceback" not in text
        if process.exitcode:
            full += 1
            assert process.exitcode == 2
            lines = [line for line in text.splitlines() if "error" in line]
            assert len(lines) == 1
            assert "No space left on device); free some space and run again, finished images are kept" in lines[0]
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
    process = start("infer", arguments(small_disk / "outputs", f"dataset.root={finished}/world-6-4"), tmp_path / "log")
    process.join(100)
    assert process.exitcode == 0
    assert full >= 2
    assert results(small_disk / "outputs") == results(finished)
    assert list(small_disk.rglob("*.tmp")) == []


def test_a_limit_on_file_sizes_ends_in_one_line_and_the_run_goes_on_without(finished: Path, tmp_path: Path) -> None:
    """What a quota does where no small disk can be mounted: writing stops in the middle of a file."""
    outputs, stopped = tmp_path / "outputs", 0
    root = f"dataset.root={finished}/world-6-4"
    for limit in (300, 1500, 4000, 9000, None):
        log = tmp_path / f"log-{limit}"
        process = start("infer", arguments(outputs, root), log, limit)
        process.join(100)
        text = log.read_text()
        assert "Traceback" not in text
        if process.exitcode:
            stopped += 1
            assert process.exitcode == 2
            assert text.count("File too large); raise the limit on file sizes (ulimit -f)") == 1, text
    assert process.exitcode == 0
    assert stopped >= 2
    assert results(outputs) == results(finished)


def test_two_runs_at_once_do_each_other_no_harm(finished: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    runs = [start("evaluate", arguments(outputs), tmp_path / f"log-{i}") for i in range(2)]
    for index, run in enumerate(runs):
        run.join(100)
        assert run.exitcode == 0, (tmp_path / f"log-{index}").read_text()
    assert results(outputs) == results(finished)
    assert list(outputs.rglob("*.tmp")) == []


def test_any_file_truncated_between_runs_is_made_again(finished: Path, tmp_path: Path) -> None:
    """One file of each kind: of single images, of records, of what was merged, of manifests."""
    outputs = tmp_path / "outputs"
    shutil.copytree(finished, outputs, symlinks=True)
    cut = _one_of_each_kind(outputs)
    assert {p.name for p in cut} >= {
        "manifest.json",
        "results.json",
        "bank.json",
        "bank.safetensors",
        "fit.safetensors",
    }
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    evaluate.run(compose(arguments(outputs)))
    assert results(outputs) == results(finished)
    for path in cut:
        assert path.stat().st_size >= (finished / path.relative_to(outputs)).stat().st_size * 0.9, path


def test_bytes_changed_in_place_are_found_where_digests_are_asked_for(finished: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(finished, outputs, symlinks=True)
    for path in _one_of_each_kind(outputs):
        if path.suffix in (".png", ".safetensors", ".z", ".json") and path.name != "manifest.json":
            data = bytearray(path.read_bytes())
            if path.parent.name in ("masks", "labels", "vectors", "maps", "panels") or path.suffix == ".safetensors":
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
    assert results(outputs) != results(finished)
    evaluate.run(compose(arguments(outputs, "runtime.verify=true")))
    assert results(outputs) == results(finished)


def _one_of_each_kind(outputs: Path) -> list[Path]:
    """The first file of each folder and ending, and every file that is merged."""
    kinds: dict[tuple[Path, str], Path] = {}
    for path in sorted((outputs / "miniature").glob("*/*/**/*")):
        if path.is_file() and "evaluate" not in path.parts and path.stat().st_size > 20:
            merged = path.parent.parent.parent == outputs / "miniature"
            kinds.setdefault((path.parent, path.name if merged else path.suffix), path)
    return list(kinds.values())
