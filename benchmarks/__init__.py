"""Figures of `scripts/benchmark.py` by name. A new figure is a function and a line in `FIGURES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from benchmarks.common import Row, Setting

FIGURES: dict[str, str] = {
    "steps": "benchmarks.steps:overlapping",
    "steps_disjoint": "benchmarks.steps:disjoint",
    "after_models": "benchmarks.after_models:after_models",
    "search": "benchmarks.search:search",
    "purification": "benchmarks.purification:purification",
    "regions": "benchmarks.purification:regions",
    "evaluation": "benchmarks.evaluation:evaluation",
    "sam_miniature": "benchmarks.models:sam_miniature",
    "sam_vit_h": "benchmarks.models:sam_vit_h",
    "inference": "benchmarks.models:inference",
    "outside_models": "benchmarks.engine:outside_models",
    "memory": "benchmarks.engine:memory",
    "shards": "benchmarks.engine:shards",
    "photographs": "benchmarks.photographs:photographs",
}
"""Name -> `module:function`, imported when it is measured; the function takes a `Setting` and returns its rows."""


def measure(name: str, setting: Setting) -> list[Row]:
    """Measure one figure and return its rows."""
    module, function = FIGURES[name].split(":")
    return cast(Callable[[Setting], list[Row]], getattr(importlib.import_module(module), function))(setting)
