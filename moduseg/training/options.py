"""Settings of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

BOOKS = ("save_minutes", "log_every", "workers", "tensorboard")
"""Settings that decide no weight, and are in no key."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Length, optimiser, schedule and books of a training.

    Attributes:
        steps: optimiser steps, 1 or more.
        batch: items of an optimiser step, over all processes and passes together.
        accumulation: passes that a process divides its share of the batch into, for models whose batch does not fit
            into memory; `batch` is a multiple of it times the number of processes.
        optimiser: `adamw`, or `sgd` with Nesterov's momentum off.
        learning_rate: largest learning rate, above 0.
        weight_decay: of matrices and filters; biases, norms and what `fit` is told to leave out do not decay.
        betas: of AdamW.
        momentum: of SGD.
        schedule: what the learning rate does after the warm-up; `moduseg.training.schedule` has the formulas.
        warmup: steps of the linear rise, 0 or more.
        min_rate: share of the learning rate that `cosine` and `poly` end at, in [0, 1].
        power: of `poly`.
        clip_norm: longer gradients are scaled to this length; `null` leaves them.
        ema: decay of the weights' moving average, in [0, 1), which is then the result; `null` makes none.
        precision: of forward passes: `auto` is that of the device; `float32`, `bfloat16` or `float16`, the last on CUDA
            only, with its losses scaled.
        seed: of the order of the items and of everything drawn on the way.
        save_minutes: minutes between two checkpoints; 0 saves after every step.
        log_every: steps between two lines of the log.
        measure_every: steps between two measurements; `null` measures at the end alone.
        workers: threads that load batches ahead; 0 loads each when it is needed.
        tensorboard: whether events for TensorBoard are written too (extra `tensorboard`).

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 1000
    batch: int = 16
    accumulation: int = 1
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    warmup: int = 100
    min_rate: float = 0.0
    power: float = 0.9
    clip_norm: float | None = 1.0
    ema: float | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    save_minutes: float = 5.0
    log_every: int = 10
    measure_every: int | None = None
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more; try 10")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number above 0; try 0.001")
        for name in ("weight_decay", "momentum", "warmup", "power", "save_minutes", "workers", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more; leave it out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers from 0 to below 1; try [0.9, 0.999]")
        if not 0 <= self.min_rate <= 1:
            raise ValueError(f"min_rate: got {self.min_rate}, expected 0 to 1; try 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: got {self.clip_norm}, expected a number above 0, or null; try 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema}, expected 0 to below 1, or null; try 0.999")
        if self.measure_every is not None and self.measure_every < 1:
            raise ValueError(f"measure_every: got {self.measure_every}, expected 1 or more, or null; try 100")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation: got {self.accumulation} passes for a batch of {self.batch}, expected a divisor; "
                f"try batch={self.batch - self.batch % self.accumulation + self.accumulation}"
            )

    def key_parts(self) -> dict[str, Any]:
        """Return the settings that decide the weights, as JSON values, for keys and for checkpoints."""
        values = {name: value for name, value in asdict(self).items() if name not in BOOKS}
        return {**values, "betas": list(self.betas)}
