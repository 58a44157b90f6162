"""Debian's Chromium, driven by playwright: what the tests of the page share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str | None:
    """The browser's path: `MODUSEG_CHROMIUM`, else what is installed; `None` where there is none."""
    named = os.environ.get("MODUSEG_CHROMIUM")
    return named or next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        try:
            yield opened
        finally:
            opened.close()


class Watched:
    """A page whose errors and requests are kept.

    Attributes:
        page: playwright's page.
        errors: what the console and uncaught exceptions said.
        outside: addresses asked for that are not on this disk.
    """

    def __init__(self, opened: Any, width: int = 1440, height: int = 900, theme: str = "light") -> None:
        self.page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            self.outside.append(request.url)

    def open(self, index: Path, part: str = "#/") -> Any:
        """Open a report from disk at one of its parts."""
        self.page.goto("about:blank")
        self.page.goto(f"{index.resolve().as_uri()}{part}")
        self.page.wait_for_selector("main > .view")
        return self.page


def first_picture(index: Path) -> float:
    """Milliseconds from the navigation to the first photograph of the images' grid."""
    with browser() as opened:
        page = Watched(opened).open(index, "#/images")
        page.wait_for_function("performance.getEntriesByName('first-picture').length > 0")
        return float(page.evaluate("performance.getEntriesByName('first-picture')[0].startTime"))
