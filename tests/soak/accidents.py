"""What happens to a run: each takes a `Scene`, and says what it did in a few words."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.processes import STAGES, start

DIGESTED = ("masks", "maps", "labels", "vectors", "panels")
"""Folders whose files' bytes are checked against digests, where that is asked for."""
PATIENCE = 300.0
"""Seconds after which a process counts as hanging."""


@dataclass
class Scene:
    """One folder of outputs, the settings that it is made with, and the random numbers.

    Attributes:
        outputs: the folder.
        arguments: overrides of the default configuration.
        draw: random numbers.
        log: what the processes say.
        seconds: the longest run of each stage so far.
        ended: exit codes of the processes that were not killed.
    """

    outputs: Path
    arguments: tuple[str, ...]
    draw: random.Random
    log: Path
    seconds: dict[str, float]
    ended: list[int]

    def start(self, stage: str, *more: str) -> BaseProcess:
        return start(stage, [*self.arguments, *more], self.log)

    def run_limited(self, stage: str, file_limit: int) -> int:
        """Return the exit code of a stage whose files may not grow beyond a size; what it says goes through a pipe,
        for which the limit does not hold.
        """
        pipe = self.log.with_suffix(".pipe")
        os.mkfifo(pipe)
        reader = threading.Thread(target=self._copy_log, args=(pipe,), daemon=True)
        reader.start()
        code = self.finish(start(stage, self.arguments, pipe, file_limit))
        reader.join(10)
        pipe.unlink()
        return code

    def _copy_log(self, pipe: Path) -> None:
        said = pipe.read_bytes()
        with self.log.open("ab") as log:
            log.write(said)

    def finish(self, process: BaseProcess) -> int:
        """Return the exit code of a process, which is waited for.

        Raises:
            TimeoutError: it hangs.
        """
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a process did not end in {PATIENCE:.0f} s")
        self.ended.append(process.exitcode)
        return process.exitcode

    def files(self, *folders: str) -> list[Path]:
        """Files of the artefacts, those in `folders` if any are given."""
        found = (path for path in sorted((self.outputs / "miniature").glob("*/*/**/*")) if path.is_file())
        # `latest` is a link to one of the others.
        found = (path for path in found if "latest" not in path.parts)
        return [path for path in found if not folders or path.parent.name in folders]


def run(scene: Scene) -> str:
    """Nothing happens."""
    stage = scene.draw.choice(list(STAGES))
    begun = time.perf_counter()
    code = scene.finish(scene.start(stage))
    scene.seconds[stage] = max(time.perf_counter() - begun, scene.seconds.get(stage, 0.0))
    return f"{stage} ends with {code}"


def kill(scene: Scene) -> str:
    """SIGKILL at a random moment."""
    stage = scene.draw.choice(list(STAGES))
    moment = scene.draw.uniform(0, scene.seconds.get(stage, 10.0))
    process = scene.start(stage)
    process.join(moment)
    if process.exitcode is not None:
        scene.ended.append(process.exitcode)
        return f"{stage} ended with {process.exitcode} before it was killed"
    process.kill()
    process.join()
    return f"{stage} killed after {moment:.1f} s"


def run_twice(scene: Scene) -> str:
    """Two stages, mostly the same one, at once; one of them may be killed."""
    first = scene.draw.choice(list(STAGES))
    second = first if scene.draw.random() < 0.7 else scene.draw.choice(list(STAGES))
    one, other = scene.start(first), scene.start(second)
    if scene.draw.random() < 0.4:
        one.join(scene.draw.uniform(0, scene.seconds.get(first, 10.0)))
        if one.exitcode is None:
            one.kill()
            one.join()
            return f"{first} killed beside {second}, which ends with {scene.finish(other)}"
    return f"{first} and {second} at once end with {scene.finish(one)} and {scene.finish(other)}"


def fill_disk(scene: Scene) -> str:
    """Files may not grow beyond a size, which is what a quota does: writing stops in the middle."""
    stage, limit = scene.draw.choice(list(STAGES)), int(2 ** scene.draw.uniform(6, 15))
    return f"{stage} with files of at most {limit} bytes ends with {scene.run_limited(stage, limit)}"


def mount_small_disk(scene: Scene) -> str:
    """The outputs lie on a file system that is nearly full, and are taken back from it."""
    disk = scene.outputs.with_name(scene.outputs.name + "-disk")
    disk.mkdir()
    size = sum(path.stat().st_size for path in scene.outputs.rglob("*") if path.is_file() and not path.is_symlink())
    room = size // 1024 + 4 * len(list(scene.outputs.rglob("*"))) + scene.draw.randrange(20, 400)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        disk.rmdir()
        return f"no small disk: {mounted.stderr.strip()}"
    try:
        shutil.copytree(scene.outputs, disk / "outputs", symlinks=True)
        stage = scene.draw.choice(list(STAGES))
        code = scene.finish(scene.start(stage, f"runtime.outputs={disk / 'outputs'}"))
        shutil.rmtree(scene.outputs)
        shutil.copytree(disk / "outputs", scene.outputs, symlinks=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()
    return f"{stage} on a disk with {room} kB ends with {code}"


def truncate(scene: Scene) -> str:
    """Files of artefacts lose their ends."""
    paths = scene.files()
    chosen = scene.draw.sample(paths, min(len(paths), scene.draw.randrange(1, 6)))
    for path in chosen:
        size = path.stat().st_size
        os.truncate(path, scene.draw.randrange(size) if size else 0)
    return f"truncated {_name(chosen)}"


def remove(scene: Scene) -> str:
    """Files of artefacts are gone."""
    paths = scene.files()
    chosen = scene.draw.sample(paths, min(len(paths), scene.draw.randrange(1, 6)))
    for path in chosen:
        path.unlink()
    return f"removed {_name(chosen)}"


def flip_bits(scene: Scene) -> str:
    """A bit of a stored file changes; the next run is told to compare digests."""
    paths = [path for path in scene.files(*DIGESTED) if path.stat().st_size]
    chosen = scene.draw.sample(paths, min(len(paths), 3))
    for path in chosen:
        data = bytearray(path.read_bytes())
        data[scene.draw.randrange(len(data))] ^= 1 << scene.draw.randrange(8)
        path.write_bytes(data)
    code = scene.finish(scene.start("evaluate", "runtime.verify=true"))
    return f"flipped a bit in {_name(chosen)}; evaluate with runtime.verify ends with {code}"


def change_clock(scene: Scene) -> str:
    """Files get times of modification years ahead or back, as after a change of the clock or a copy."""
    shift = scene.draw.choice([-1, 1]) * scene.draw.uniform(60, 10 * 365 * 86400)
    paths = [path for path in scene.outputs.rglob("*") if scene.draw.random() < 0.5 and not path.is_symlink()]
    for path in paths:
        os.utime(path, (max(0.0, time.time() + shift),) * 2)
    return f"{len(paths)} files and folders moved in time by {shift / 86400:+.1f} days"


ACCIDENTS: Sequence[tuple[Callable[[Scene], str], float]] = (
    (run, 2.0),
    (kill, 4.0),
    (run_twice, 2.0),
    (fill_disk, 2.0),
    (mount_small_disk, 1.0),
    (truncate, 2.0),
    (remove, 1.0),
    (flip_bits, 1.0),
    (change_clock, 1.0),
)
"""Each with its weight."""


def _name(paths: Sequence[Path]) -> str:
    return ", ".join("/".join(path.parts[-3:]) for path in paths) or "nothing"
