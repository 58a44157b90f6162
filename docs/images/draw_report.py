"""Draw the pictures of a finished run: docs/images/miniature.png, report_why.png and report_bank.png.

`python docs/images/draw_report.py`, after `python scripts/infer.py`; another run is named by its folder. It needs
playwright (`pip install -e '.[dev]'`) and an installed Chromium, or the path of one in `MODUSEG_CHROMIUM`.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGE = "val_00024"
"""The image whose region is asked why: one whose neighbours disagree."""
PANEL = "val_00064"
"""The image whose panel is shown."""
SIZE = {"width": 1280, "height": 840}


def save_screen(page: Any, target: Path) -> None:
    """Save what the page shows."""
    with Image.open(io.BytesIO(page.screenshot())) as screen:
        screen.convert("RGB").save(target, optimize=True)


def show_why(page: Any, index: str) -> None:
    """Open an image, and ask why of the region whose votes are most divided."""
    page.goto(f"{index}#/images?name={IMAGE}")
    page.locator(".grid .tile").first.click()
    page.wait_for_selector(".regions button")
    # The winner's share of the votes of each region that a button names; the smallest is the most divided.
    number = page.evaluate(
        """async () => { const position = Report.get('images').ids.indexOf(ID);
        const why = await Report.load('why/' + Report.numbered(position));
        const shares = [...document.querySelectorAll('.regions button')].map(button => {
            const votes = why.votes[Number(button.dataset.proposal)];
            return votes.length ? votes[0][1] / votes.reduce((sum, vote) => sum + vote[1], 0) : 1; });
        return shares.indexOf(Math.min(...shares)); }""".replace("ID", f"'{IMAGE}'")
    )
    page.locator(".regions button").nth(number).click()
    page.wait_for_selector(".trail .region-card")
    page.mouse.move(10, 10)


def show_bank(page: Any, index: str) -> None:
    """Open the part of the bank."""
    page.goto("about:blank")
    page.goto(f"{index}#/bank")
    page.wait_for_selector(".view[data-ready]")
    page.evaluate("scrollTo(0, 200)")


def main(run: Path, folder: Path) -> None:
    """Draw the three pictures of a run into a folder."""
    shutil.copyfile(run / "panels" / f"{PANEL}.png", folder / "miniature.png")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = os.environ.get("MODUSEG_CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)
    index = (run / "report" / "index.html").resolve().as_uri()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, show, theme in (("report_why", show_why, "light"), ("report_bank", show_bank, "dark")):
            page = opened.new_page(viewport=SIZE, color_scheme=theme)
            show(page, index)
            page.wait_for_timeout(500)  # pictures of regions are loaded when they come into sight
            save_screen(page, folder / f"{name}.png")
        opened.close()


if __name__ == "__main__":
    latest = Path("outputs") / "miniature" / "infer" / "latest"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else latest, Path(__file__).parent)
