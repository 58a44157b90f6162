"""A browser and a small run with its report, for the tests of the page, which skip where there is no browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moduseg.config import compose
from moduseg.stages.infer import Infer
from moduseg.tools import report
from tests.support.browser import open_or_skip
from tests.support.runs import overrides


@pytest.fixture(scope="package")
def opened() -> Iterator[Any]:
    """A running browser."""
    yield from open_or_skip()


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the miniature whose K is 5, so that votes have runners-up."""
    outputs = tmp_path_factory.mktemp("outputs")
    return Infer.run(
        compose(overrides(outputs, "retrieval.top_k=5", "evaluation.report=true", "bank.min_area=30", train=14, val=9))
    )


@pytest.fixture(scope="package")
def index(run: Path) -> Path:
    """Its page."""
    return run / "report" / "index.html"


@pytest.fixture(scope="package")
def compared(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run beside one that lost an image's upper half."""
    other = tmp_path_factory.mktemp("other") / "theirs"
    shutil.copytree(run / "labels", other)
    changed = np.zeros_like(np.asarray(Image.open(other / "val_00003.png")))
    Image.fromarray(changed).save(other / "val_00003.png")
    return report.run(str(run), ["evaluation.bootstrap=20"], against=str(other))
