"""Shared fixtures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import overrides

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Use one thread: test workers share the machine, and more threads than cores slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Undo a command's logging, which goes to the standard output of its test and is closed after it."""
    handlers, root_level, level = logging.root.handlers[:], logging.root.level, logging.getLogger("moduseg").level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(root_level)
    logging.getLogger("moduseg").setLevel(level)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that tensors may be on; absent ones are skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device present")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an undisturbed run of the whole pipeline on a few scenes."""
    from moduseg.config import compose
    from moduseg.stages.infer import Infer

    outputs = tmp_path_factory.mktemp("finished")
    Infer.run(compose(overrides(outputs)))
    return outputs


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """The folder of the miniature's tokenizer, the number of its tokens and the id of the last one."""
    from moduseg.miniature.models.clip import build_tokenizer

    folder = tmp_path_factory.mktemp("words")
    tokenizer = build_tokenizer(folder)
    return folder, len(tokenizer), int(tokenizer.eos_token_id)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(42)


def external_folder(variable: str) -> Path:
    """Return the folder that an environment variable names, or skip the test and say what to set."""
    value = os.environ.get(variable, "")
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} names no folder (got {value!r}); set it to run this test")
    return Path(value)
