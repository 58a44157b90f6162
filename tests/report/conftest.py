"""A browser and a small run with its report, for the tests of the page, which skip where there is no browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moduseg.config import compose
from moduseg.stages.infer import Infer
from tests.support.browser import find_chromium, open_browser
from tests.support.runs import overrides


@pytest.fixture(scope="package")
def opened() -> Iterator[Any]:
    """A running browser."""
    pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install playwright")
    if find_chromium() is None:
        pytest.skip("no Chromium found; install one or set MODUSEG_CHROMIUM")
    with open_browser() as running:
        yield running


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
