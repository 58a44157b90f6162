"""Lists of the page in a real browser: filters, addresses, the table of images, regions that are marked as wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moduseg.bank.store import Bank
from moduseg.config.command_keys import ApplyOptions
from moduseg.report.page import read_script
from moduseg.tools import bank as bank_tool
from moduseg.tools import report
from tests.support.browser import WatchedPage, list_tiles
from tests.support.synthetic import make_run


def test_few_of_many_images_exist_at_a_time(opened: Any, tmp_path: Path) -> None:
    """A grid of hundreds holds the tiles near the screen, wherever one scrolls."""
    run = make_run(tmp_path, 300, train=4, size=(48, 64), proposals=6)
    index = report.run(str(run))
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images")
    page.wait_for_function("performance.getEntriesByName('first-picture').length > 0")
    assert page.locator(".grid .tile").count() < 200
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("[...document.querySelectorAll('.grid .tile')].some(t => t.dataset.position === '299')")
    assert page.locator(".grid .tile").count() < 200
    assert "val/00000" not in list_tiles(page)
    assert (watched.errors, watched.outside) == ([], [])
    page.close()


def test_the_table_of_differences_comes_before_the_images(opened: Any, compared: Path) -> None:
    page = WatchedPage(opened).open(compared, "#/compare")
    parts = page.locator(".view.compare > *").evaluate_all("all => all.map(e => e.className)")
    assert parts == ["card hero", "card", "toolbar", "grid"]
    page.close()


def test_images_are_filtered_by_class_and_error_and_saved(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images")
    images = read_script(index.parent / "data" / "images.js")
    num_labels = len(read_script(index.parent / "data" / "summary.js")["classes"])
    confused = {}  # image -> labels that take part in a confusion of two objects
    for name, (cells, _) in zip(images["ids"], images["cells"], strict=True):
        pairs = [divmod(cell, num_labels) for cell in cells]
        confused[name] = {label for t, p in pairs if t != p and t > 0 and p > 0 for label in (t, p)}
    label = next(iter(set.union(*confused.values())))
    page.get_by_label("Error").select_option("confused")
    assert sorted(list_tiles(page)) == [name for name in images["ids"] if confused[name]]
    page.get_by_label("Class").select_option(str(label))
    chosen = [name for name in images["ids"] if label in confused[name]]
    assert sorted(list_tiles(page)) == chosen
    # The address alone shows the same.
    address = page.url
    assert "error=confused" in address
    assert f"class={label}" in address
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(".grid .tile")
    assert sorted(list_tiles(page)) == chosen
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    rows = Path(download.value.path()).read_text().splitlines()
    assert rows[0] == "image,miou,wrong_percent,class_iou,classes"
    assert [row.split(",")[0] for row in rows[1:]] == list_tiles(page)
    assert watched.errors == []
    page.close()


def test_an_address_shows_a_region_and_its_neighbour(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images/image/1")
    page.locator(".regions button").first.click()
    page.locator(".trail .region-card").first.click()
    page.wait_for_selector(".region")
    row = page.locator(".region").get_attribute("data-row")
    page.get_by_role("radiogroup", name="Layer").get_by_role("radio", name="truth").click()
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(f".region[data-row='{row}']")
    assert page.locator(".layers [aria-checked=true]").inner_text() == "truth"
    page.keyboard.press("Escape")  # opened here, there is no step to undo: one level up
    page.wait_for_selector(".trail .votes")
    page.keyboard.press("Escape")
    page.wait_for_selector(".regions")
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer", state="hidden")
    assert watched.errors == []
    page.close()


def test_the_keys_are_listed(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index)
    page.keyboard.press("?")
    assert "one step back" in page.locator("#help").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.close()


def test_thumbnails_show_the_prediction_and_the_photograph_on_hover(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index, "#/images")
    tile = page.locator(".grid .tile").first
    tile.locator("canvas:not([hidden])").wait_for()
    assert float(tile.locator("canvas").evaluate("c => getComputedStyle(c).opacity")) > 0.5
    tile.hover()
    page.wait_for_function("getComputedStyle(document.querySelector('.grid .tile canvas')).opacity === '0'")
    page.close()


def test_regions_inside_a_lasso_are_corrected_with_a_file(opened: Any, index: Path, run: Path, tmp_path: Path) -> None:
    """What is marked on the map is what `bank apply` changes."""
    watched = WatchedPage(opened)
    page = watched.open(index, "#/bank")
    page.wait_for_selector(".view[data-ready]")
    page.get_by_role("button", name="Lasso").click()
    box = page.locator(".map-box canvas").bounding_box()
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)]
    page.mouse.move(box["x"] + 0.02 * box["width"], box["y"] + 0.02 * box["height"])
    page.mouse.down()
    for x, y in [*corners[1:], corners[0]]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
    page.mouse.up()
    bank = Bank.load(bank_folder(index))
    page.wait_for_selector(".selection .region-card")
    num_points = page.evaluate("Report.why.open().then(bank => bank.searched.reduce((a, b) => a + b))")
    assert page.locator(".selection .region-card").count() == num_points  # the line goes around all
    first = int(page.locator(".selection .region-card").nth(0).get_attribute("data-row"))
    second = int(page.locator(".selection .region-card").nth(1).get_attribute("data-row"))
    other = next(label for label in range(1, len(bank.classes)) if label != int(bank.labels[first]))
    for row, value in [(first, str(other)), (second, "remove")]:
        page.locator(f".selection .region-card[data-row='{row}']").click()
        page.wait_for_selector(f"#region .region[data-row='{row}']")
        page.locator("#region").get_by_label("Wrong label").select_option(value)
        page.locator("#region .corner").click()
        page.wait_for_selector("#region", state="hidden")
    assert "2 corrections" in page.locator(".corrections").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save corrections.json").click()
    saved = tmp_path / "corrections.json"
    shutil.copy(download.value.path(), saved)
    options = ApplyOptions(str(bank_folder(index)), str(saved), str(tmp_path / "corrected"))
    assert bank_tool.apply(options, []) == 0
    corrected = Bank.load(tmp_path / "corrected")
    expected = bank.labels.clone()
    expected[first] = other
    kept = [row for row in range(len(bank)) if row != second]
    assert corrected.labels.tolist() == expected[kept].tolist()
    assert watched.errors == []
    page.close()


def bank_folder(index: Path) -> Path:
    """The bank of a report's run."""
    outputs = index.resolve().parents[4]
    # The page calls the folder of all artefacts "outputs", whatever its name.
    return outputs.joinpath(*Path(read_script(index.parent / "data" / "bank.js")["path"]).parts[1:])


@pytest.mark.parametrize("part", ["#/", "#/classes", "#/images", "#/bank", "#/images/image/2"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_keeps_anyone_out(opened: Any, index: Path, part: str, theme: str) -> None:
    """Contrast, names of controls and the like, as axe-core finds them in either theme."""
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe
    page = WatchedPage(opened, theme=theme).open(index, part)
    page.wait_for_timeout(300)
    found = Axe().run(page).response["violations"]
    serious = [
        f"{rule['id']}: {node['html'][:120]} ({node['failureSummary'][:200]})"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"][:3]
    ]
    assert serious == []
    page.close()
