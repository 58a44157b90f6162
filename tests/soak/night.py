"""Accidents one after the other, and after each dozen of them a check against an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from types import TracebackType

from tests.soak.accidents import ACCIDENTS, Scene
from tests.support.processes import STAGES
from tests.support.runs import overrides, result_bytes

VARIANTS: dict[str, tuple[str, ...]] = {
    "class activation maps": ("pseudo_masks=cam", "runtime.workers=2"),
    "true masks, several records": ("retrieval.top_k=3", "runtime.record_size=3"),
    "superpixels": ("proposer=superpixels", "pseudo_masks=cam"),
    "parts of classes": ("bank.parts=2", "retrieval.selection=shares"),
}
"""Settings of a round, over those of `tests.support.runs`."""
PER_ROUND = 12
"""Accidents between two checks."""


class Night:
    """Rounds of accidents in a folder, with a log of what happened.

    Args:
        folder: emptied first. `log.txt` in it is kept, as are the outputs of a round that failed.
        seed: of the accidents.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._draw = folder, seed, random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._begun = time.monotonic()
        self._clean: dict[str, dict[str, bytes]] = {}
        self._num_accidents = 0
        self.faults: list[str] = []

    def __enter__(self) -> Night:
        self._log = (self._folder / "log.txt").open("w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def run(self, seconds: float) -> int:
        """Let accidents happen for a while.

        Args:
            seconds: no round begins later.

        Returns:
            0, or 1 if something was not as after an undisturbed run.
        """
        self._say(f"seed {self._seed}")
        rounds = 0
        while rounds == 0 or time.monotonic() - self._begun < seconds:
            name = self._draw.choice(list(VARIANTS))
            self._play(name, self._folder / f"round-{rounds}")
            rounds += 1
        verdict = "no fault" if not self.faults else f"{len(self.faults)} faults: " + "; ".join(self.faults)
        self._say(f"{rounds} rounds, {self._num_accidents} accidents: {verdict}")
        return int(bool(self.faults))

    def _play(self, name: str, folder: Path) -> None:
        """One round: accidents, then a run to the end that has to give what an undisturbed one gives."""
        clean, before = self._undisturbed(name), len(self.faults)
        scene = self._scene(name, folder)
        self._say(f"round {folder.name}, {name}")
        for _ in range(PER_ROUND):
            accident = self._draw.choices([each for each, _ in ACCIDENTS], [weight for _, weight in ACCIDENTS])[0]
            self._num_accidents += 1
            try:
                self._say(f"  {accident.__name__}: {accident(scene)}")
            except TimeoutError as error:
                self._fault(f"{folder.name}, {accident.__name__}: {error}")
        code = scene.finish(scene.start("evaluate", "runtime.verify=true"))
        if code:
            self._fault(f"{folder.name}: the last run ends with {code}")
        if unexpected := sorted(set(scene.ended) - {0, 2}):
            self._fault(f"{folder.name}: exit codes {unexpected}, expected 0 or 2")
        self._compare(folder, scene, clean)
        if len(self.faults) == before:
            shutil.rmtree(folder)

    def _compare(self, folder: Path, scene: Scene, clean: dict[str, bytes]) -> None:
        found = _results(scene.outputs)
        for path in sorted(clean.keys() | found.keys()):
            if clean.get(path) != found.get(path):
                kind = "is missing" if path not in found else "is unknown" if path not in clean else "differs"
                self._fault(f"{folder.name}: {path} {kind}")
        if left := [str(path.relative_to(folder)) for path in scene.outputs.rglob("*.tmp")]:
            self._fault(f"{folder.name}: left behind: {', '.join(left)}")
        if "Traceback" in scene.log.read_text(errors="replace"):
            self._fault(f"{folder.name}: a traceback in {scene.log.name}")

    def _undisturbed(self, name: str) -> dict[str, bytes]:
        """The results of an undisturbed run, made once."""
        if name not in self._clean:
            scene = self._scene(name, self._folder / f"clean-{len(self._clean)}")
            for stage in STAGES:
                begun = time.perf_counter()
                if code := scene.finish(scene.start(stage)):
                    raise RuntimeError(f"{name}: {stage} ends with {code}: {scene.log.read_text()}")
                self._say(f"undisturbed, {name}: {stage} {time.perf_counter() - begun:.1f} s")
            self._clean[name] = _results(scene.outputs)
            shutil.rmtree(scene.outputs.parent)
        return self._clean[name]

    def _scene(self, name: str, folder: Path) -> Scene:
        outputs = folder / "outputs"
        outputs.mkdir(parents=True)
        arguments = overrides(outputs, *VARIANTS[name], world=self._folder)
        return Scene(outputs, tuple(arguments), self._draw, folder / "processes.txt", {}, [])

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        self._say(f"FAULT: {text}")

    def _say(self, text: str) -> None:
        line = f"{time.monotonic() - self._begun:7.1f} s  {text}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()


def _results(outputs: Path) -> dict[str, bytes]:
    """What has to be the same; the folder of figures is named by records of times."""
    return {path: data for path, data in result_bytes(outputs).items() if "/evaluate/" not in path}
