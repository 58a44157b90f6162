"""The page in a real browser: drop, click, correct, see the change, undo, redo, draw, save, open again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moduseg import Segmenter
from moduseg.app import serve
from moduseg.app.layout import import_gradio
from moduseg.cli.options import parse
from moduseg.datasets.io import write_rgb_png
from moduseg.errors import MissingError
from moduseg.result import ImagePrediction
from tests.support.app_sessions import NAME
from tests.support.browser import open_or_skip
from tests.support.tagged_world import scene

PATIENCE = 60_000
"""Milliseconds; the machine may be busy."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    """A running browser."""
    yield from open_or_skip()


@pytest.fixture(scope="module")
def address(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served."""
    try:
        import_gradio()
    except MissingError as error:
        pytest.skip(f"gradio is an optional package: {error}")
    saved = tmp_path_factory.mktemp("saved")
    options, overrides = parse(
        [f"bank={bank}", f"save_folder={saved}", "runtime.device=cpu"], serve.DemoOptions, "demo_app"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        blocks = serve.open_page(options, overrides)
        yield serve.launch(blocks, options, wait=False)
        blocks.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    file.write_bytes(write_rgb_png(scene(20).image))
    return file


@pytest.fixture(scope="module")
def predicted(segmenter: Segmenter) -> ImagePrediction:
    """What the page says of the picture at first."""
    return segmenter.predict(scene(20).image)


class Visitor:
    """A person at the page.

    Attributes:
        page: playwright's page.
        errors: of the console, and uncaught exceptions.
        outside: requests to other machines.
    """

    def __init__(
        self, opened: Any, address: str, width: int = 1440, theme: str = "light", *, has_touch: bool = False
    ) -> None:
        size = {"width": width, "height": 1000}
        self.page = opened.new_page(viewport=size, color_scheme=theme, has_touch=has_touch, is_mobile=has_touch)
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._record)
        self.page.goto(address)
        self.button("Name it").wait_for()

    def _record(self, request: Any) -> None:
        if "127.0.0.1" not in request.url and not request.url.startswith(("data:", "blob:")):
            self.outside.append(request.url)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def upload(self, file: Path) -> None:
        self.page.set_input_files("input[type=file]", str(file))
        self.page.locator(".ms-painted").wait_for()

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point of the window, from shares of the picture's sides."""
        frame = self.page.locator(".ms-painted")
        frame.scroll_into_view_if_needed()
        box = frame.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def click(self, x: float, y: float) -> None:
        self.page.mouse.click(*self.place(x, y))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*self.place(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(*end), steps=4)
        self.page.mouse.up()

    def type_name(self, name: str) -> None:
        field = self.page.get_by_label("Name of the region")
        field.fill(name)
        field.press("Enter")

    def legend(self) -> str:
        return str(self.page.locator(".ms-legend").inner_text())

    def wait_for_change(self, text: str) -> None:
        self.page.locator(".ms-change", has_text=text).wait_for()


def an_object(predicted: ImagePrediction) -> tuple[float, float, str]:
    """A place where an object is seen, as shares of the picture's sides, and its class."""
    rows, columns = np.nonzero(predicted.label_map)
    middle = len(rows) // 2
    height, width = predicted.label_map.shape
    name = predicted.classes[int(predicted.label_map[rows[middle], columns[middle]])]
    return (columns[middle] + 0.5) / width, (rows[middle] + 0.5) / height, name


def test_drop_click_correct_undo_save_and_open(
    opened: Any, address: str, picture: Path, predicted: ImagePrediction
) -> None:
    visitor = Visitor(opened, address)
    page = visitor.page
    for name in ("Name it", "Undo", "Redo"):
        assert visitor.button(name).is_disabled()
    page.get_by_text("Name it: drop a picture first.").wait_for()
    visitor.upload(picture)
    page.get_by_text("Name it: click a region first.").wait_for()
    x, y, name = an_object(predicted)
    # The class under the pointer is said, and marked in the legend.
    page.mouse.move(*visitor.place(x, y))
    page.locator(".ms-tip", has_text=name).wait_for()
    assert name in page.locator(".ms-legend .ms-here").inner_text()
    visitor.click(x, y)
    page.locator(".ms-why").wait_for()
    assert page.locator(".ms-why li").count() == 6
    # A correction is seen at once.
    visitor.type_name(NAME)
    visitor.button("Name it").click()
    visitor.wait_for_change(f"→ {NAME}")
    assert NAME in visitor.legend()
    page.mouse.move(*visitor.place(x + 0.001, y))
    page.locator(".ms-tip", has_text=NAME).wait_for()
    visitor.button("Undo").click()
    visitor.wait_for_change("Undone")
    assert NAME not in visitor.legend()
    visitor.button("Redo").click()
    visitor.wait_for_change("Done again")
    assert NAME in visitor.legend()
    # Saved and opened, the bank has learned it.
    page.get_by_text("Save or open a bank").click()
    page.get_by_label("Save as").fill("learned")
    visitor.button("Save").click()
    visitor.wait_for_change("Saved: a bank of")
    visitor.button("Undo").click()
    visitor.wait_for_change("Undone")
    page.get_by_label("Saved banks").click()
    page.get_by_role("option", name="learned").click()
    visitor.button("Open").click()
    visitor.wait_for_change("Opened: learned")
    assert NAME in visitor.legend()
    assert (visitor.errors, visitor.outside) == ([], [])
    page.close()


def test_a_name_two_clicks_and_a_box(opened: Any, address: str, predicted: ImagePrediction) -> None:
    visitor = Visitor(opened, address)
    page = visitor.page
    page.locator(".ms-example").first.click()
    page.locator(".ms-painted").wait_for()
    visitor.type_name(NAME)
    page.get_by_label("Each region that I click gets this name").check()
    visitor.click(0.25, 0.25)
    visitor.wait_for_change(f"{NAME}")
    visitor.click(0.75, 0.75)
    page.wait_for_function("document.querySelectorAll('.ms-why .ms-voted').length > 0")
    page.get_by_label("Each region that I click gets this name").uncheck()
    visitor.drag((0.1, 0.55), (0.45, 0.9))
    visitor.wait_for_change("it looks like")
    assert page.locator(".ms-box").is_hidden()
    assert (visitor.errors, visitor.outside) == ([], [])
    page.close()


def test_keys_choose_a_region_too(opened: Any, address: str, picture: Path, predicted: ImagePrediction) -> None:
    visitor = Visitor(opened, address)
    page = visitor.page
    visitor.upload(picture)
    page.locator(".ms-picture").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    height, width = predicted.label_map.shape
    name = predicted.classes[int(predicted.label_map[int(0.6 * height), int(0.48 * width)])]
    assert page.locator(".ms-tip").inner_text() == name
    assert page.locator(".ms-cross").is_visible()
    page.keyboard.press("Enter")
    page.locator(".ms-why").wait_for()
    assert visitor.errors == []
    page.close()


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (768, "dark"), (390, "light"), (390, "dark")])
def test_the_page_fits_and_keeps_nobody_out(
    opened: Any, address: str, picture: Path, predicted: ImagePrediction, width: int, theme: str
) -> None:
    """At each width nothing runs out to the right, and axe-core finds nothing serious."""
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe
    visitor = Visitor(opened, address, width, theme)
    page = visitor.page
    visitor.upload(picture)
    x, y, _ = an_object(predicted)
    visitor.click(x, y)
    page.locator(".ms-why").wait_for()
    visitor.type_name(NAME)
    visitor.button("Name it").click()
    visitor.wait_for_change(f"→ {NAME}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    serious = [
        f"{rule['id']}: {node['html'][:160]}"
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
    assert serious == []
    page.close()


def test_a_finger_chooses_and_draws(opened: Any, address: str, picture: Path, predicted: ImagePrediction) -> None:
    visitor = Visitor(opened, address, width=390, has_touch=True)
    page = visitor.page
    visitor.upload(picture)
    x, y, _ = an_object(predicted)
    page.touchscreen.tap(*visitor.place(x, y))
    page.locator(".ms-why").wait_for()
    page.get_by_label("Draw boxes by touch").check()
    touch = page.context.new_cdp_session(page)
    places = [visitor.place(0.1 + 0.1 * step, 0.1 + 0.1 * step) for step in range(5)]
    for kind, (left, top) in zip(["touchStart", *3 * ["touchMove"]], places[:4], strict=True):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": left, "y": top}]})
    page.locator(".ms-box").wait_for()
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    visitor.wait_for_change("it looks like")
    assert visitor.errors == []
    page.close()
