"""Fixtures that several stages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from tests.support.runs import overrides


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes are drawn, once."""
    outputs = tmp_path_factory.mktemp("world")
    assert len(Workspace(compose(overrides(outputs))).dataset("val").ids) == 4
    return outputs
