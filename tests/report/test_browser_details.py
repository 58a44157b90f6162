"""Details of the page in a real browser: words, colours, narrow screens, what a cell or a swatch says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moduseg.report.page import read_script
from tests.support.browser import WatchedPage

PARTS = ["#/", "#/classes", "#/images", "#/bank", "#/images/image/2", "#/compare"]
NO_WORDS = re.compile(r"\b(false|true|undefined|null|NaN|Infinity|painted|proposer's own|\[object)\b")
"""Values and words of the program that say nothing to a reader."""


def read_words(page: Any, place: str) -> str:
    """Return the text of a part of the page without the configuration, whose values are the program's."""
    return str(
        page.evaluate(
            """place => { const copy = document.querySelector(place).cloneNode(true);
            copy.querySelectorAll('pre').forEach(part => part.remove());
            return copy.textContent; }""",
            place,
        )
    )


@pytest.mark.parametrize("part", PARTS)
def test_words_are_those_of_people(opened: Any, compared: Path, part: str) -> None:
    page = WatchedPage(opened).open(compared, part)
    page.wait_for_timeout(250)
    place = "#viewer" if "image/" in part else "main"
    text = read_words(page, place)
    assert len(text) > 50
    assert NO_WORDS.findall(text) == []
    page.close()


def test_the_reason_of_a_label_is_told_in_plain_words(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index, "#/images/image/1")
    count = page.locator(".regions button").count()
    texts = []
    for number in range(count):
        page.locator(".regions button").nth(number).click()
        page.wait_for_selector(".trail .votes")
        texts.append(read_words(page, ".trail"))
        page.locator(".back").click()
        page.wait_for_selector(".regions button")
    assert all(NO_WORDS.search(text) is None for text in texts)
    assert all("in the label map" in text or "background, so nothing is drawn" in text for text in texts)
    page.close()


@pytest.mark.parametrize("selection", ["nms", "margin"])
def test_only_suppression_is_told_by_scores(opened: Any, index: Path, selection: str) -> None:
    """A set of regions is chosen as a whole: what is not in it may have the highest score of the image."""
    page = WatchedPage(opened).open(index, "#/images")
    page.evaluate("selection => { Report.get('summary').retrieval.selection = selection; }", selection)
    texts = page.evaluate(
        """async () => {
          const texts = [];
          for (let image = 0; image < Report.get("images").ids.length; image++) {
            const content = await Report.load(`why/${Report.numbered(image)}`);
            if (!content.label) continue;
            for (let proposal = 0; proposal < content.label.length; proposal++)
              texts.push((await Report.why.proposal(content, proposal, () => null)).textContent);
          }
          return texts;
        }"""
    )
    assert len(texts) > 3
    by_score = [text for text in texts if "of the same label" in text or "no region of this image" in text]
    assert bool(by_score) == (selection == "nms")
    page.close()


@pytest.mark.parametrize("part", ["#/", "#/classes", "#/bank"])
def test_no_card_of_a_single_run_is_empty(opened: Any, index: Path, part: str) -> None:
    page = WatchedPage(opened).open(index, part)
    page.wait_for_timeout(250)
    cards = page.locator("main .card").evaluate_all(
        "all => all.filter(c => c.offsetParent).map("
        "c => [c.innerText.trim().length, c.querySelectorAll('*').length, c.clientHeight])"
    )
    assert len(cards) >= 2
    assert all(letters > 10 and parts > 3 and height > 50 for letters, parts, height in cards)
    page.close()


@pytest.mark.parametrize(("theme", "is_light"), [("light", True), ("dark", False)])
def test_the_ground_beside_a_picture_is_that_of_the_theme(opened: Any, index: Path, theme: str, is_light: bool) -> None:
    page = WatchedPage(opened, theme=theme).open(index, "#/images/image/2")
    page.wait_for_selector(".layers button")
    for place in (".image-canvas", ".viewer-left", ".viewer-tools"):
        values = page.locator(place).first.evaluate(
            "e => { while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
            " return getComputedStyle(e).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number); }"
        )
        assert (min(values) > 200) if is_light else (max(values) < 80), place
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_points_of_the_map_have_the_colours_of_the_legend(opened: Any, index: Path, theme: str) -> None:
    page = WatchedPage(opened, theme=theme).open(index, "#/bank")
    page.wait_for_selector(".view[data-ready]")
    legend = page.evaluate(
        """() => Report.why.open().then(bank => {
            const shown = new Set([...bank.labels].filter((_, row) => bank.searched[row]));
            return [...shown].map(label => Report.colour(label)); })"""
    )
    painted = page.evaluate(
        """() => { const c = document.querySelector('.map-box canvas');
            const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });
            copy.drawImage(c, 0, 0);
            const data = copy.getImageData(0, 0, c.width, c.height).data, found = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255)
                found.add('#' + [0, 1, 2].map(k => data[i + k].toString(16).padStart(2, '0')).join(''));
            return [...found]; }"""
    )
    assert len(legend) > 3
    assert set(legend) <= set(painted)
    page.close()


def test_the_picture_stays_in_sight_on_a_telephone(opened: Any, index: Path) -> None:
    page = WatchedPage(opened, 390, 844).open(index, "#/images/image/1")
    page.locator(".regions button").first.click()
    page.wait_for_selector(".trail .votes")
    scrolled = page.locator(".viewer-body").evaluate("e => { e.scrollTop = e.scrollHeight; return e.scrollTop; }")
    assert scrolled > 200
    box = page.locator(".image-canvas").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] < 0.6 * 844
    last = page.locator(".trail .region-card").last.bounding_box()
    assert last["y"] > box["y"] + box["height"]  # what is read lies below it
    page.close()


@pytest.mark.parametrize(
    ("part", "names"), [("#/classes", ".bars .bar-name span"), ("#/compare", ".difference .bar-name span")]
)
def test_names_are_whole_on_a_telephone(opened: Any, compared: Path, part: str, names: str) -> None:
    page = WatchedPage(opened, 390, 844).open(compared, part)
    cut = page.locator(names).evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert page.locator(names).count() > 5
    assert cut == []
    tabs = page.locator(".tabs").evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert tabs[0] <= tabs[1]
    page.close()


def test_a_cell_of_the_confusion_opens_its_images_with_their_errors(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/classes")
    canvas = page.locator("canvas[tabindex='0']")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    names = read_script(index.parent / "data" / "summary.js")["classes"]
    line = page.locator(".confusion-line").inner_text()
    assert names[0] in line
    assert names[1] in line
    page.keyboard.press("Enter")
    page.wait_for_selector(".view.images")
    assert page.get_by_role("radio", name="errors").get_attribute("aria-checked") == "true"
    assert page.locator("#errors-legend").is_visible()
    assert "extra" in page.locator("#errors-legend").inner_text()
    assert watched.errors == []
    page.close()


def test_a_swatch_and_a_cell_say_their_class(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index, "#/images")
    names = read_script(index.parent / "data" / "summary.js")["classes"]
    titles = page.locator(".tile .swatch").evaluate_all("all => all.map(e => e.title)")
    assert len(titles) > 5
    assert set(titles) <= set(names)
    page.goto(page.url.split("#")[0] + "#/classes")
    canvas = page.locator("canvas[tabindex='0']")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"])
    page.wait_for_selector("#tip:not([hidden])")
    assert sum(name in page.locator("#tip").inner_text() for name in names) >= 1
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_serious_keeps_anyone_out_of_two_runs(opened: Any, compared: Path, theme: str, width: int) -> None:
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe
    page = WatchedPage(opened, width, theme=theme).open(compared, "#/compare")
    page.wait_for_timeout(300)
    found = Axe().run(page).response["violations"]
    assert [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")] == []
    page.close()
