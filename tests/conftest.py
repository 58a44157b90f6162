"""Shared fixtures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Two workers share the machine: more threads than cores only slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command's log goes to the standard output of its test, which is closed after it."""
    before = logging.root.handlers[:], logging.root.level, logging.getLogger("moduseg").level
    yield
    logging.root.handlers[:], level, own = before
    logging.root.setLevel(level)
    logging.getLogger("moduseg").setLevel(own)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that tensors may live on; absent ones are skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device present")
    return torch.device(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(42)


def external_folder(variable: str) -> Path:
    """The folder that an environment variable names, or a skip that says what to set."""
    value = os.environ.get(variable, "")
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} names no folder (got {value!r}); set it to run this test")
    return Path(value)
