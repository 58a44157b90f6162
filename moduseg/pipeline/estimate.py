"""How long a stage, and a run of several stages, will take: said after the first images, and after each stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

log = logging.getLogger("moduseg")

StageName = tuple[str, str]
"""What a stage is called in a workspace: its `cache_name` and its split."""
_MIN_SECONDS = 60
"""What takes less is not worth a line."""
_SLOW_BATCH = 300.0
"""Seconds of a first batch that is an estimate by itself; one that is faster was slowed by loading the models."""


@dataclass(frozen=True)
class StageWork:
    """What a stage of a run has to do.

    Attributes:
        name: of the stage.
        title: of the stage and its split, for people.
        cost: equal for stages that take about the same time for an image.
        num_left: images to process.
    """

    name: StageName
    title: str
    cost: Hashable
    num_left: int


class RunEstimate:
    """How long the stages of a run will take that are not finished, as far as it is known.

    A stage is known when it has processed images, or when another one of the same cost has. Scores and pages, which
    follow the stages, are not counted.

    Args:
        stages: in the order in which they run.
    """

    def __init__(self, stages: Iterable[StageWork] = ()) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._seconds_per_image: dict[Hashable, float] = {}
        self._last_said = ""

    def measure(self, name: StageName, seconds_per_image: float, num_left: int) -> None:
        """Note how fast a stage is, and how many of its images are left."""
        if stage := self._stages.get(name):
            self._stages[name] = replace(stage, num_left=num_left)
            self._seconds_per_image[stage.cost] = seconds_per_image

    def finish(self, name: StageName) -> None:
        """Note that a stage is complete, and say how long the others take."""
        stage = self._stages.pop(name, None)
        if stage is not None and stage.cost in self._seconds_per_image:
            self.say()

    def say(self, running: StageName | None = None) -> None:
        """Log how long the run will take, if that is at least a minute and was not said just before.

        Args:
            running: a stage whose own time is said already: if no other is left, nothing more is.
        """
        others = [stage for name, stage in self._stages.items() if name != running and stage.num_left]
        text = self.describe() if others else ""
        if text and text != self._last_said:
            log.info("%s", text)
            self._last_said = text

    def describe(self) -> str:
        """Return how long the stages that are left will take; an empty text if that is less than a minute."""
        left = [stage for stage in self._stages.values() if stage.num_left]
        unknown = [stage.title for stage in left if stage.cost not in self._seconds_per_image]
        seconds = sum(self._seconds_per_image.get(stage.cost, 0.0) * stage.num_left for stage in left)
        if seconds < _MIN_SECONDS:
            return ""
        if not unknown:
            return f"all stages: about {format_duration(seconds)} left"
        verb = "is" if len(unknown) == 1 else "are"
        return f"all stages: at least {format_duration(seconds)} left; {', '.join(unknown)} {verb} not measured yet"


class TimeEstimate:
    """Says once how long the images of a stage will take, and with them the run.

    Args:
        title: of the stage.
        num_images: images to process.
        run: the run that the stage is part of.
        name: of the stage in the run.
    """

    def __init__(self, title: str, num_images: int, run: RunEstimate | None = None, name: StageName = ("", "")) -> None:
        self._title, self._num_left = title, num_images
        self._run, self._name = run or RunEstimate(), name
        self._start = time.monotonic()
        self._num_batches, self._num_measured, self._is_said = 0, 0, False

    def update(self, num_images: int) -> None:
        """Note that a batch is done."""
        now = time.monotonic()
        seconds = now - self._start
        self._num_left -= num_images
        self._num_batches += 1
        if self._num_batches == 1:
            # Loading the models may have taken most of the first batch; it counts until there is a second one.
            self._run.measure(self._name, seconds / max(num_images, 1), self._num_left)
            if seconds < _SLOW_BATCH:
                self._start = now
                return
        self._num_measured += num_images
        per_image = seconds / max(self._num_measured, 1)
        self._run.measure(self._name, per_image, self._num_left)
        if self._is_said:
            return
        self._is_said = True
        if per_image * self._num_left >= _MIN_SECONDS:
            log.info(
                "%s: %.2f s an image, about %s for the %d that are left",
                self._title,
                per_image,
                format_duration(per_image * self._num_left),
                self._num_left,
            )
        self._run.say(self._name)


def format_duration(seconds: float) -> str:
    """Return a duration as `3 min` or `5 h 20 min`."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
