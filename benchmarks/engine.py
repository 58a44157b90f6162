"""The loop over images: its cost beside the models, its memory, and the gain of a second process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from benchmarks.common import Row, Setting, make_unmeasured_row, summarise
from moduseg.clock import measure, model_cpu_seconds, model_seconds
from moduseg.config import compose
from moduseg.pipeline.manifests import steps_by_folder
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose

OUTSIDE_MS = 30.0
MEMORY_MB = 50.0
SHARE = 0.6
ORACLES = ("proposer=ground_truth", "pseudo_masks=ground_truth", "backbone=miniature")


def outside_models(setting: Setting) -> list[Row]:
    """Measure the milliseconds per image that the demo spends outside models' forward passes.

    `build_bank` and `infer` run as in the demo, with a quarter of its images and of its pictures, each round in a
    process of its own. Merging, scoring and drawing count; starting Python and loading weights do not.
    """
    train, val = (8, 4) if setting.is_small else (40, 20)
    runs: list[dict[str, float]] = []
    steps: dict[str, Any] = {}
    for _ in range(1 if setting.is_small else min(setting.repeats, 3)):
        with make_scratch() as folder:
            demo = [
                *(f"runtime.{k}={v}" for k, v in (("outputs", folder), ("device", setting.device))),
                f"dataset.train={train}",
                f"dataset.val={val}",
                "evaluation.panels=3",
            ]
            seconds, steps = in_process(_run_demo, [str(torch.get_num_threads()), *demo])
        runs.append(
            {
                "outside": 1000 / (train + val) * (seconds["wall"] - seconds["model"]),
                "cpu": 1000 / (train + val) * (seconds["cpu"] - seconds["model_cpu"]),
                "share": seconds["model"] / seconds["wall"],
            }
        )
    outside, cpu_outside, share = (summarise([run[key] for run in runs]) for key in ("outside", "cpu", "share"))
    text = (
        f"{outside['median']:.1f} ms ({outside['min']:.1f} to {outside['max']:.1f}; CPU time of all threads "
        f"{cpu_outside['median']:.1f} ms); forward passes take {100 * share['median']:.0f} % of the time"
    )
    figure, target = f"time outside forward passes, demo, an image of {train + val}", f"at most {OUTSIDE_MS:g} ms"
    details = {"milliseconds": outside, "cpu_milliseconds": cpu_outside, "model_share": share, "steps": steps}
    # The second row leaves out what a proposer does with its model's masks: it shows the loop and the other stages.
    other_steps = [s for name, s in steps.items() if not name.startswith("propose/")]
    rest = 1000 / (train + val) * sum(s["wall"] - s["model"] for s in other_steps)
    return [
        Row(figure, target, text, outside["median"] <= OUTSIDE_MS, details),
        Row(f"{figure}, proposals apart", target, f"{rest:.1f} ms (last round)", rest <= OUTSIDE_MS),
    ]


def memory(setting: Setting) -> list[Row]:
    """Measure the peak memory of `infer` on many images over that on a tenth of them, each in its own process."""
    few, many = (4, 40) if setting.is_small else (400, 4000)
    figure, target = f"peak memory of infer, {many} images over {few}", f"at most +{MEMORY_MB:g} MB"
    if not sys.platform.startswith("linux"):
        return [make_unmeasured_row(figure, target, "a process's peak memory is read as Linux writes it")]
    with make_scratch() as folder:
        peaks = [_peak(folder / str(images), images) for images in (few, many)]
    more = peaks[1] - peaks[0]
    text = f"{more:+.1f} MB ({peaks[0]:.0f} to {peaks[1]:.0f} MB)"
    return [Row(figure, target, text, more <= MEMORY_MB, {"megabytes": dict(zip((few, many), peaks, strict=True))})]


def shards(setting: Setting) -> list[Row]:
    """Measure the time of two shards on a core each over that of one process on one core, without start-up."""
    figure, target = "two shards over one process, a core each", f"at most {SHARE:g} of the time"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return [make_unmeasured_row(figure, target, "fewer than two cores to put processes on")]
    images = 8 if setting.is_small else 64
    times: dict[int, list[float]] = {1: [], 2: []}
    computed: dict[int, list[float]] = {1: [], 2: []}
    with make_scratch() as folder:
        for round_ in range(1 if setting.is_small else min(setting.repeats, 3)):
            for count in (1, 2) if round_ % 2 else (2, 1):
                shutil.rmtree(folder / "miniature" / "propose", ignore_errors=True)
                wall, cpu = _time_shards(folder, images, cores[:count])
                times[count].append(wall)
                computed[count].append(cpu)
    ratios, cpus = (
        summarise([two_shards / single for single, two_shards in zip(t[1], t[2], strict=True)])
        for t in (times, computed)
    )
    text = (
        f"{ratios['median']:.2f} ({ratios['min']:.2f} to {ratios['max']:.2f}; CPU time of the slower shard "
        f"{cpus['median']:.2f}); one {summarise(times[1])['median']:.1f} s"
    )
    seconds = {str(count): summarise(values) for count, values in times.items()}
    details = {"ratio": ratios, "cpu_ratio": cpus, "seconds": seconds}
    return [Row(figure, target, text, ratios["median"] <= SHARE, details)]


@contextmanager
def make_scratch() -> Iterator[Path]:
    """Yield a temporary folder, with the log reduced to errors."""
    log = logging.getLogger("moduseg")
    level = log.level
    log.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            log.setLevel(level)


def _warm_up(work: Workspace) -> None:
    """Draw the world, load every model, and run it once."""
    val, train = (work.dataset(split) for split in (work.eval_split, work.train_split))
    with torch.inference_mode():
        sample = val.load(val.ids[0], truth=work.proposer.needs_truth)
        work.backbone.tokens([sample.image])
        proposals = work.proposer.propose(sample)
        labelled = train.load(train.ids[0])
        work.generator.generate(
            labelled, labelled.labels or (1,), proposals if work.generator.needs_proposals else None
        )


def _peak(folder: Path, images: int) -> float:
    """Return the peak memory of a process that runs `infer`, in megabytes."""
    # Another process draws the world, so that the memory of drawing does not hide the rest.
    arguments = [
        *ORACLES,
        f"runtime.outputs={folder}",
        "runtime.device=cpu",
        "dataset.train=40",
        f"dataset.val={images}",
    ]
    in_process(_draw, arguments)
    return float(in_process(_infer, arguments))


def in_process(job: Any, arguments: Sequence[str]) -> Any:
    """Run `job(pipe, arguments)` in a new process, and return what it sends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=job, args=(theirs, list(arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _run_demo(pipe: Connection, arguments: list[str]) -> None:
    """Send the seconds of `build_bank` and `infer`, in models and altogether, and those of their steps."""
    num_threads, *overrides = arguments
    torch.set_num_threads(int(num_threads))
    logging.getLogger("moduseg").setLevel(logging.ERROR)
    cfg = compose(overrides)
    work = Workspace(cfg)
    _warm_up(work)
    begun, cpu = time.perf_counter(), time.process_time()
    spent, cpu_spent = model_seconds(), model_cpu_seconds()
    with measure():
        BuildBank.run(cfg, work)
        path = Infer.run(cfg, work)
    seconds = {
        "wall": time.perf_counter() - begun,
        "model": model_seconds() - spent,
        "cpu": time.process_time() - cpu,
        "model_cpu": model_cpu_seconds() - cpu_spent,
    }
    pipe.send((seconds, steps_by_folder(path)))


def _draw(pipe: Connection, arguments: list[str]) -> None:
    work = Workspace(compose(arguments))
    pipe.send(len(work.dataset(work.eval_split).ids))


def _infer(pipe: Connection, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("moduseg").setLevel(logging.ERROR)
    watch = MemoryWatch()
    Infer.run(compose(arguments))
    pipe.send(watch.peak_megabytes)


class MemoryWatch:
    """Looks at the memory of this process 50 times a second from now on.

    What Linux keeps as the peak will not do: stages restart it for their own records, and a process inherits
    `ru_maxrss` from its parent.
    """

    def __init__(self) -> None:
        self._peak = self._read()
        Thread(target=self._look, daemon=True).start()

    @property
    def peak_megabytes(self) -> float:
        """The most that was resident so far."""
        self._peak = max(self._peak, self._read())
        return self._peak

    def _look(self) -> None:
        while True:
            self._peak = max(self._peak, self._read())
            time.sleep(0.02)

    @staticmethod
    def _read() -> float:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _time_shards(folder: Path, images: int, cores: Sequence[int]) -> tuple[float, float]:
    """Return the seconds that one shard per core takes for the proposals of a split, and the largest CPU time."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in cores]
    arguments = [f"runtime.outputs={folder}", "runtime.device=cpu", "runtime.batch_size=4", f"dataset.val={images}"]
    processes = [
        context.Process(target=_shard, args=(theirs, core, index, len(cores), [*arguments, "dataset.train=2"]))
        for index, (core, (_, theirs)) in enumerate(zip(cores, pairs, strict=True))
    ]
    for process in processes:
        process.start()
    for ours, _ in pairs:
        ours.recv()
    begun = time.perf_counter()
    for ours, _ in pairs:
        ours.send("go")
    computed = [float(ours.recv()) for ours, _ in pairs]
    taken = time.perf_counter() - begun
    for process in processes:
        process.join()
    return taken, max(computed)


def _shard(pipe: Connection, core: int, index: int, count: int, arguments: list[str]) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    logging.getLogger("moduseg").setLevel(logging.ERROR)
    cfg = compose([*arguments, f"runtime.shard.index={index}", f"runtime.shard.count={count}"])
    work = Workspace(cfg)
    _warm_up(work)
    runner = Propose(work).runner()
    pipe.send("ready")
    pipe.recv()
    begun = time.process_time()
    runner.run_shard()
    pipe.send(time.process_time() - begun)
