"""Every figure of `scripts/benchmark.py`, by name: a new one is a function and a line in `FIGURES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from tests.speed.common import Row, Setting

FIGURES: dict[str, str] = {
    "steps": "tests.speed.steps:overlapping",
    "steps_disjoint": "tests.speed.steps:disjoint",
    "search": "tests.speed.search:search",
    "purification": "tests.speed.purification:purification",
    "evaluation": "tests.speed.evaluation:evaluation",
    "sam_miniature": "tests.speed.models:sam_miniature",
    "sam_vit_h": "tests.speed.models:sam_vit_h",
    "inference": "tests.speed.models:inference",
    "outside_models": "tests.speed.engine:outside_models",
    "memory": "tests.speed.engine:memory",
    "shards": "tests.speed.engine:shards",
}
"""Name -> `module:function`, imported when it is measured; the function takes a `Setting` and returns its rows."""


def measure(name: str, setting: Setting) -> list[Row]:
    """The rows of one figure."""
    module, function = FIGURES[name].split(":")
    return cast(Callable[[Setting], list[Row]], getattr(importlib.import_module(module), function))(setting)
