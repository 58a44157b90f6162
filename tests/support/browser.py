"""Drive an installed Chromium with playwright, for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of the browser: `MODUSEG_CHROMIUM`, else an installed one; `None` if there is none."""
    return os.environ.get("MODUSEG_CHROMIUM") or next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start a browser, and close it at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=find_chromium(), args=list(ARGUMENTS))
        try:
            yield opened
        finally:
            opened.close()


def open_or_skip() -> Iterator[Any]:
    """Yield a running browser, for a fixture; skip its tests where there is none."""
    pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install playwright")
    if find_chromium() is None:
        pytest.skip("no Chromium found; install one or set MODUSEG_CHROMIUM")
    with open_browser() as running:
        yield running


class WatchedPage:
    """A page of a browser that records its errors and requests.

    Attributes:
        page: playwright's page.
        errors: warnings and errors of the console, uncaught exceptions and failed requests.
        outside: requested addresses that are not on disk.
    """

    def __init__(self, opened: Any, width: int = 1440, height: int = 900, theme: str = "light") -> None:
        self.page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", self._record_request)

    def _record_request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            self.outside.append(request.url)

    def open(self, index: Path, part: str = "#/") -> Any:
        """Open a report from disk at one of its parts."""
        self.page.goto("about:blank")
        self.page.goto(f"{index.resolve().as_uri()}{part}")
        self.page.wait_for_selector("main > .view")
        return self.page


def list_tiles(page: Any) -> list[str]:
    """Return the ids of the tiles of a page's grid in their order."""
    positions = page.locator(".grid .tile").evaluate_all(
        "all => all.map(t => [Number(t.dataset.position), t.querySelector('small').textContent])"
    )
    return [name for _, name in sorted(positions)]


def measure_first_picture(index: Path) -> float:
    """Return the milliseconds from opening the list of images to its first photograph."""
    with open_browser() as opened:
        page = WatchedPage(opened).open(index, "#/images")
        page.wait_for_function("performance.getEntriesByName('first-picture').length > 0")
        return float(page.evaluate("performance.getEntriesByName('first-picture')[0].startTime"))
