"""The page in a real browser, opened from disk: it says what the results say, and every part of it works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moduseg.config import compose
from moduseg.pipeline.manifests import StageFolder
from moduseg.report.page import read_script
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.tools import report
from tests.support.browser import WatchedPage, list_tiles
from tests.support.runs import overrides


@pytest.mark.parametrize("part", ["#/", "#/classes", "#/images", "#/bank", "#/images/image/2"])
@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_every_part_opens_from_disk(opened: Any, index: Path, part: str, width: int, theme: str) -> None:
    watched = WatchedPage(opened, width, 850, theme)
    page = watched.open(index, part)
    page.wait_for_timeout(250)
    assert (watched.errors, watched.outside) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing runs out of a narrow screen
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.close()


def test_the_head_and_the_theme(opened: Any, index: Path, run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    watched = WatchedPage(opened)
    page = watched.open(index)
    assert f"{results['miou']:.1f}" in page.locator(".hero .big").inner_text()
    assert "top_k: 5" in page.locator("pre").inner_text()
    assert page.locator(".time").count() == len(read_script(index.parent / "data" / "summary.js")["seconds"])
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    page.wait_for_selector("main > .view")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # the choice is kept
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.locator("pre").scroll_into_view_if_needed()
    page.get_by_role("button", name="Copy").click()
    page.wait_for_selector("text=Copied")
    assert watched.errors == []
    page.close()


def test_images_are_sorted_filtered_and_found(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images")
    ids = [f"val_0000{i}" for i in range(9)]
    assert list_tiles(page) == ids
    scores = page.evaluate("Report.scores.all().map(s => [s.miou, s.wrong])")
    sort = page.get_by_label("Sort by")
    sort.select_option("low")
    assert list_tiles(page) == [ids[i] for i in np.argsort([m for m, _ in scores], kind="stable")]
    sort.select_option("error")
    assert list_tiles(page) == [ids[i] for i in np.argsort([-w for _, w in scores], kind="stable")]
    label = page.evaluate("Report.scores.present(0).find(([label]) => label > 0)[0]")
    page.get_by_label("Class").select_option(str(label))
    has = page.evaluate(
        f"Report.get('images').ids.filter((_, i) => Report.scores.present(i).some(([l]) => l === {label}))"
    )
    assert sorted(list_tiles(page)) == has
    page.get_by_label("Class").select_option("")
    page.get_by_label("Find by name").fill("00004")
    assert list_tiles(page) == ["val_00004"]
    page.get_by_label("Find by name").fill("")
    page.get_by_role("radio", name="errors").click()
    page.wait_for_function("document.querySelectorAll('.grid canvas:not([hidden])').length === 9")
    page.locator(".grid .tile").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.position") == "1"
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")
    assert watched.errors == []
    page.close()


def test_the_slider_the_layers_and_the_zoom(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images/image/0")
    page.wait_for_selector(".layers button")
    canvas = page.locator(".image-canvas canvas.layer").first
    page.get_by_label("Opacity of the layer").fill("20")
    assert canvas.evaluate("c => c.style.opacity") == "0.2"
    layers = page.get_by_role("radiogroup", name="Layer")
    layers.get_by_role("radio", name="photograph").click()
    assert canvas.is_hidden()
    layers.get_by_role("radio", name="proposals").click()
    assert canvas.is_visible()
    outlines = page.get_by_role("button", name="Outlines of the proposals")
    outlines.click()
    assert page.locator(".image-canvas canvas.lines").is_visible()
    outlines.click()
    assert page.locator(".image-canvas canvas.lines").is_hidden()
    scale = "new DOMMatrix(getComputedStyle(document.querySelector('.plane')).transform).a"
    assert page.evaluate(scale) == 1
    page.get_by_role("button", name="Zoom in").click()
    assert page.evaluate(scale) == pytest.approx(1.5)
    box = page.locator(".image-canvas").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.wheel(0, -300)
    assert page.evaluate(scale) > 1.5
    page.locator(".layers [aria-checked=true]").focus()
    page.keyboard.press("0")
    assert page.evaluate(scale) == 1
    assert watched.errors == []
    page.close()


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pseudo masks from the attention of the miniature diffusion model, with their report."""
    settings = overrides(tmp_path_factory.mktemp("attended"), "pseudo_masks=iseg_miniature", train=3, val=2)
    path = PseudoMasks.run(compose(settings))
    report.run(str(path))
    return path


def test_attention_is_a_layer_with_a_map_for_each_class(opened: Any, attended: Path) -> None:
    folder = StageFolder(attended).inputs["scores"]
    stored = [folder.scores(image_id) for image_id in read_script(attended / "report" / "data" / "images.js")["ids"]]
    index = max(range(len(stored)), key=lambda i: len(stored[i].class_ids))
    scores = stored[index]
    assert len(scores.class_ids) > 1
    watched = WatchedPage(opened)
    page = watched.open(attended / "report" / "index.html", f"#/images/image/{index}")
    page.wait_for_selector(".layers button")
    classes = page.get_by_role("radiogroup", name="Class of the scores")
    assert classes.is_hidden()
    page.get_by_role("radiogroup", name="Layer").get_by_role("radio", name="attention").click()
    # A copy is read, since the browser warns of a canvas of the page that is read several times.
    brightness = """() => { const c = document.querySelector('.image-canvas canvas.layer');
        const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });
        copy.drawImage(c, 0, 0);
        const data = copy.getImageData(0, 0, c.width, c.height).data;
        return Array.from({ length: data.length / 4 }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]); }"""
    for button, each in zip(classes.get_by_role("radio").all(), scores.scores.numpy(), strict=True):
        button.click()
        painted = np.array(page.evaluate(brightness)).reshape(each.shape)
        # The colours grow brighter with the score: pixels in the order of one are in that of the other.
        order = np.argsort(each, axis=None, kind="stable")
        assert (np.diff(painted.ravel()[order]) >= -3).all()
        assert painted[each == each.max()].min() > 600 > 100 > painted[each == each.min()].max()
    page.get_by_role("radiogroup", name="Layer").get_by_role("radio", name="truth").click()
    assert classes.is_hidden()
    assert watched.errors == []
    page.close()


def test_keys_step_through_the_images_as_they_are_sorted(opened: Any, index: Path) -> None:
    page = WatchedPage(opened).open(index, "#/images")
    page.get_by_label("Sort by").select_option("high")
    order = list_tiles(page)
    page.locator(".grid .tile").first.click()
    title = page.locator(".viewer-title b")
    assert title.inner_text() == order[0]
    for name in order[1:3]:
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"document.querySelector('.viewer-title b').textContent === '{name}'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"document.querySelector('.viewer-title b').textContent === '{order[1]}'")
    page.keyboard.press("Escape")
    assert page.locator("#viewer").is_hidden()
    assert page.get_by_label("Sort by").input_value() == "high"
    assert list_tiles(page) == order
    page.close()


@pytest.mark.parametrize("part", ["#/", "#/classes", "#/images?sort=low"])
def test_closing_an_image_leads_back_to_where_it_was_opened(opened: Any, index: Path, part: str) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, part)
    view = page.locator("main > .view").get_attribute("class")
    page.locator("main .tile").first.click()
    page.wait_for_selector("#viewer[open]")
    page.keyboard.press("Escape")
    assert page.locator("#viewer").is_hidden()
    assert page.locator("main > .view").get_attribute("class") == view
    page.locator("main .tile").nth(1).click()
    page.wait_for_selector("#viewer[open]")
    page.go_back()
    page.wait_for_function("!document.getElementById('viewer').open")
    assert page.locator("main > .view").get_attribute("class") == view
    page.locator("[data-tab=classes]").click()
    page.wait_for_selector(".view.classes")
    page.go_back()
    page.wait_for_function(f"document.querySelector('main > .view').className === {view!r}")
    assert watched.errors == []
    page.close()


def test_why(opened: Any, index: Path) -> None:
    """A click on a region names its label, votes and neighbours; a neighbour leads on to its own, and back."""
    watched = WatchedPage(opened)
    page = watched.open(index, "#/images/image/1")
    page.wait_for_selector(".regions button")
    why = read_script(index.parent / "data" / "why" / "000001.js")
    classes = read_script(index.parent / "data" / "summary.js")["classes"]
    page.evaluate(
        """() => { window.picked = new Promise(resolve => document.getElementById('viewer')
            .addEventListener('chosen', event => resolve(event.detail), { once: true })); }"""
    )
    box = page.locator(".plane").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    chosen = page.evaluate("window.picked")
    text = page.locator(".trail").inner_text()
    assert f"Proposal {chosen + 1} of {len(why['label'])}" in text
    assert classes[why["label"][chosen]] in text
    assert f"{why['score'][chosen]:.3f}" in text
    assert f"{why['votes'][chosen][0][1]} of 5" in text
    assert ("runner-up" in text) == (len(why["votes"][chosen]) > 1)
    cards = page.locator(".trail .region-card")
    assert cards.count() == 5
    page.wait_for_function(
        "[...document.querySelectorAll('.trail .region-card img')].every(i => i.complete && i.naturalWidth)"
    )
    row = cards.nth(1).get_attribute("data-row")
    cards.nth(1).click()
    region = page.locator(f".region[data-row='{row}']")
    assert "training image" in region.inner_text()
    assert region.locator(".region-card").count() == 12
    following = region.locator(".region-card").first.get_attribute("data-row")
    assert following != row
    region.locator(".region-card").first.click()
    page.wait_for_selector(f".region[data-row='{following}']")
    page.locator(".back").click()
    page.wait_for_selector(f".region[data-row='{row}']")
    page.keyboard.press("Escape")
    page.wait_for_selector(".trail .votes")
    assert "Proposal" in page.locator(".trail").inner_text()
    page.go_back()
    button = page.locator(".regions button").first
    button.focus()
    page.keyboard.press("Enter")  # the same without a pointer
    page.wait_for_selector(".votes")
    assert watched.errors == []
    page.close()


def test_classes_bars_and_confusion(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/classes")
    record = read_script(index.parent / "data" / "summary.js")["record"]
    shown = [float(t) for t in page.locator(".bar-row .number").all_inner_texts() if t != "–"]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == pytest.approx(max(v for v in record["iou"].values() if v is not None), abs=0.06)
    page.get_by_role("radio", name="list").click()
    assert page.locator(".bar-row .bar-name").first.inner_text() == "background"
    known = next(i for i, name in enumerate(record["recall"]) if i and record["recall"][name] is not None)
    page.locator(".bar-row").nth(known).click()
    assert page.locator(".bar-row").nth(known).get_attribute("aria-selected") == "true"
    assert page.locator(".class-detail .tile").count() > 0
    page.locator("canvas[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    line = page.locator(".confusion-line").inner_text()
    assert re.search(r"background\s+labelled", line)
    page.locator(".most-row").first.click()
    page.wait_for_selector(".view.images")
    assert "labelled" in page.locator("[data-key=sort] option:checked").inner_text()
    assert len(list_tiles(page)) > 0
    assert "px" in page.locator(".grid .figure").first.inner_text()
    assert watched.errors == []
    page.close()


def test_the_bank_its_map_and_those_that_mislead(opened: Any, index: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(index, "#/bank")
    page.wait_for_selector(".view[data-ready]")
    bank = read_script(index.parent / "data" / "bank.js")
    assert f"{bank['rows']} regions" in page.locator("main").inner_text()
    cards = page.locator(".region-grid.large .region-card")
    assert cards.count() == min(32, len(bank["worst"]))
    assert cards.first.get_attribute("data-row") == str(bank["worst"][0]["row"])
    cards.first.click()
    region = page.locator(f"#region .region[data-row='{bank['worst'][0]['row']}']")
    assert "What it labelled wrong" in region.inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#region").is_hidden()
    canvas = page.locator(".map-box canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for step in range(400):  # somewhere along the way lies a point
        page.mouse.move(
            box["x"] + 10 + (step * 37) % (box["width"] - 20), box["y"] + 10 + (step * 23) % (box["height"] - 20)
        )
        if page.locator("#tip").is_visible():
            break
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip img").count() == 1
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#region[open]")
    page.locator("#region .corner").click()
    page.get_by_label("Class on the map").select_option("0")
    assert watched.errors == []
    page.close()


def test_two_runs_side_by_side(opened: Any, compared: Path) -> None:
    watched = WatchedPage(opened)
    page = watched.open(compared, "#/compare")
    page.evaluate("document.querySelector('.grid').scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('.grid canvas:not([hidden])').length === 18")
    page.get_by_role("radio", name="largest change").click()
    assert list_tiles(page)[0] == "val_00003"
    head = read_script(compared.parent / "data" / "summary.js")["compare"]
    assert f"{abs(head['miou']['difference']):.1f}" in page.locator(".hero .big").inner_text()
    rows = page.locator(".differences .difference:not(.head)")
    assert rows.count() == len(head["measures"]) + sum(e["difference"] is not None for e in head["classes"].values())
    # The colour says which way is better: for a measure that is to be small, less is.
    is_better = head["miou"]["difference"] > 0
    dot = rows.first.locator(".dot")
    colours = [dot.get_attribute("class")]
    page.evaluate(
        "Report.get('summary').measures.find(m => m.name === 'miou').is_larger_better = false;"
        "location.hash = '#/images'"
    )
    page.wait_for_selector(".differences", state="detached")
    page.evaluate("location.hash = '#/compare'")
    page.wait_for_selector(".differences")
    assert [*colours, dot.get_attribute("class")] == (["dot up", "dot down"] if is_better else ["dot down", "dot up"])
    page.evaluate("document.querySelector('.grid').scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('.grid canvas:not([hidden])').length === 18")
    page.locator(".grid .tile").first.click()
    page.wait_for_selector(".layers button")
    assert page.locator(".image-canvas").count() == 2
    both = page.locator(".image-canvas canvas.layer:not(.lines)").evaluate_all(
        "all => all.map(c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)"
    )
    assert both[1] < both[0]  # the second run says background everywhere
    page.get_by_role("button", name="Zoom in").click()
    planes = page.locator(".plane").evaluate_all("all => all.map(p => p.style.transform)")
    assert planes[0] == planes[1]
    assert "scale(1.5)" in planes[0]
    assert (watched.errors, watched.outside) == ([], [])
    page.close()
