"""What the trainings share: settings, schedule, optimiser steps, measurements, log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moduseg.errors import ConfigError


@dataclass
class TrainingSettings:
    """Settings of every training; the README of the miniature has those of the shipped weights.

    Args:
        steps, minutes: length of the training, as `Schedule` reads them.
        batch: inputs of 128 pixels in a step.
        learning_rate, weight_decay: settings of AdamW.
        scenes: scenes drawn before the training.
        seed: seed of the weights, the order and all other choices.
        device: device of the training.
        bfloat16: train in mixed precision.
        check_every: steps between two measurements of quality, each followed by a save.
        check_scenes: scenes in a measurement, of each split if two are used.
        start: weights to start from; random ones if omitted.
    """

    steps: int = 5_000
    minutes: float | None = None
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    scenes: int = 4_000
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    check_every: int = 200
    check_scenes: int = 80
    start: str | None = None


@dataclass
class Schedule:
    """Steps of a training: linear warm-up times a cosine that ends at one percent.

    Args:
        steps: number of optimiser steps; the schedule follows them, so equal settings give equal weights.
        minutes: if set, stop after this long and let the schedule follow the clock instead (not reproducible).
        warmup: steps of the linear rise.

    Raises:
        ConfigError: a number that is not positive.
    """

    steps: int
    minutes: float | None = None
    warmup: int = 150
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.minutes is not None and self.minutes <= 0):
            raise ConfigError(
                f"steps, minutes: got {self.steps}, {self.minutes}, expected positive numbers; try steps=1000"
            )

    @property
    def seconds(self) -> float:
        """Seconds since the first step."""
        return time.perf_counter() - self.started

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        """Yield `(step, progress in [0, 1), learning-rate factor in (0, 1])`."""
        return self.resume(0, 0.0)

    def resume(self, step: int, seconds: float) -> Iterator[tuple[int, float, float]]:
        """Yield what `__iter__` yields, from `step` on, as if the steps before it had taken `seconds`."""
        self.started = time.perf_counter() - seconds
        while True:
            progress = step / self.steps if self.minutes is None else self.seconds / (60.0 * self.minutes)
            if progress >= 1.0:
                return
            ramp = min(1.0, (step + 1) / self.warmup)
            yield step, progress, ramp * (0.5 * (1.0 + math.cos(math.pi * progress)) + 0.01)
            step += 1


class TrainingLoop:
    """Optimiser steps of one training, with learning rate, measurements, saves and a log of one JSON object a line.

    Args:
        settings: length, learning rate and how often to measure.
        model: the model that is trained.
        groups: parameter groups of the optimiser.
        log_path: file of the log; its lines are printed too.
        measure: returns the quality of the model, which is in evaluation mode meanwhile.
        save: writes the weights; called after every measurement.
        last_group_rate: factor on the learning rate of the last group.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        model: nn.Module,
        groups: list[dict[str, Any]],
        *,
        log_path: Path,
        measure: Callable[[], Mapping[str, float]],
        save: Callable[[], object],
        last_group_rate: float = 1.0,
    ) -> None:
        self.settings, self.model = settings, model
        self._measure, self._save, self._last_group_rate = measure, save, last_group_rate
        self._optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
        self._schedule = Schedule(settings.steps, settings.minutes)
        self._averages: dict[str, float] = {}
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log_path
        self._state_path: Path | None = None

    def keep_state(self, path: Path) -> TrainingLoop:
        """Keep the state of the training in a file, which is written before every measurement, and return the loop.

        A training that finds the file goes on from there. If its batches depend on the step alone, it ends with the
        weights of a training that nothing interrupted.
        """
        self._state_path = path
        return self

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yield `(step, progress in [0, 1))`; the caller ends each step with `update`."""
        first, seconds = self._load_state()
        step = first - 1
        self._keep_log(first)
        self.model.train()
        for step, progress, factor in self._schedule.resume(first, seconds):
            if step % self.settings.check_every == 0:
                self._save_state(step)
                self._check(step)
            for group in self._optimiser.param_groups:
                group["lr"] = self.settings.learning_rate * factor
            self._optimiser.param_groups[-1]["lr"] *= self._last_group_rate
            yield step, progress
        self._save_state(step + 1)
        self._check(step + 1)

    def update(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Make one optimiser step.

        Args:
            loss: scalar to descend.
            parts: scalars whose running averages the log shows.
        """
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        for name, part in parts.items():
            value = float(part.detach())
            self._averages[name] = 0.98 * self._averages.get(name, value) + 0.02 * value

    def _load_state(self) -> tuple[int, float]:
        """Return the first step to make and the seconds that the steps before it took, 0 and 0 at the start."""
        if self._state_path is None or not self._state_path.is_file():
            return 0, 0.0
        state = torch.load(self._state_path, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._averages = state["averages"]
        return state["step"], state["seconds"]

    def _save_state(self, step: int) -> None:
        """Write the state before `step`, to a temporary name that is then renamed."""
        if self._state_path is None:
            return
        state = {
            "step": step,
            "seconds": self._schedule.seconds,
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "averages": self._averages,
        }
        temporary = self._state_path.with_name(f".{self._state_path.name}.{os.getpid()}.tmp")
        torch.save(state, temporary)
        temporary.replace(self._state_path)

    def _keep_log(self, first: int) -> None:
        """Drop the lines of the log from step `first` on; the training writes them again."""
        lines = self._log_path.read_text(encoding="utf-8").splitlines() if first else []
        kept = [line + "\n" for line in lines if json.loads(line)["step"] < first]
        self._log_path.write_text("".join(kept), encoding="utf-8")

    def _check(self, step: int) -> None:
        self.model.eval()
        values = {"step": step, **self._measure(), **self._averages, "seconds": self._schedule.seconds}
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
        self._save()
        self.model.train()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups: matrices decay; biases, norms and embeddings of positions do not."""
    decayed: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "pos_embed" not in name and "cls_token" not in name
        (decayed if is_matrix else constant).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]
