"""The learning rate at each step of a training."""

from __future__ import annotations

import math

from moduseg.training.options import TrainingOptions


def compute_rate(step: int, options: TrainingOptions) -> float:
    """Return the factor of the learning rate at a step.

    Over the `W = warmup` first steps it is `(step + 1) / W`. After them, with `t = (step - W) / (steps - W)` and
    `m = min_rate`, it is

        cosine:    m + (1 - m) * (1 + cos(pi * t)) / 2
        poly:      m + (1 - m) * (1 - t) ** power
        constant:  1

    Args:
        step: number of the steps made before, 0 to `options.steps - 1`.
        options: schedule and length.

    Returns:
        A factor in [0, 1].
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    is_cosine = options.schedule == "cosine"
    share = (1 + math.cos(math.pi * progress)) / 2 if is_cosine else (1 - progress) ** options.power
    return options.min_rate + (1 - options.min_rate) * share
