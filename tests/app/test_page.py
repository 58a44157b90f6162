"""The page's events without a browser, what it shows, and the page served on this machine."""

from __future__ import annotations

import importlib.util
import io
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moduseg import Segmenter
from moduseg.app import markup, serve
from moduseg.app.changes import WhatChanged
from moduseg.app.examples import write_examples
from moduseg.app.layout import MIN_GRADIO, import_gradio
from moduseg.app.page import Page, read_pointer
from moduseg.app.picture import choose_size, draw_picture
from moduseg.app.session import Session
from moduseg.cli.options import parse
from moduseg.datasets.io import write_rgb_png
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.miniature.world.scenes import CLASSES
from moduseg.result import Change
from tests.support.app_sessions import NAME, label_of, some_object
from tests.support.tagged_world import scene


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../escaped", id="parent folder"),
        pytest.param("/tmp/escaped", id="absolute path"),
        pytest.param(".", id="the folder itself"),
        pytest.param("a\0b", id="NUL byte"),
        pytest.param("link/escaped", id="through a link"),
    ],
)
def test_the_page_saves_below_one_folder(session: Session, tmp_path: Path, name: str) -> None:
    session.correct(some_object(session), NAME)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"save: got .*, expected the name of a folder below"):
        Page(lambda: session, save_folder=folder).save(session, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    assert [path.name for path in folder.iterdir()] == ["link"]


def test_a_page_that_is_open_to_others_saves_nothing(session: Session) -> None:
    session.correct(some_object(session), NAME)
    with pytest.raises(ConfigError, match="save: the page is open to others"):
        Page(lambda: session).save(session, "learned")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", False), ("127.8.9.1", False), ("::1", False), ("[::1]", False), ("localhost", False),
        ("0.0.0.0", True), ("::", True), ("192.168.1.7", True), ("", True), ("example.org", True),
    ],
)  # fmt: skip
def test_only_a_loopback_address_is_private(host: str, expected: bool) -> None:
    assert serve.DemoOptions("bank", host=host).is_public == expected


def test_a_large_picture_is_refused_before_it_is_decoded(session: Session, tmp_path: Path) -> None:
    header = io.BytesIO()
    Image.new("1", (5000, 4000)).save(header, "PNG")
    (tmp_path / "large.png").write_bytes(header.getvalue()[:60])  # the header alone
    page = Page(lambda: session)
    with pytest.raises(DataError, match="picture: got 5000 x 4000 pixels, expected at most 16000000"):
        page.drop(session, str(tmp_path / "large.png"))
    (tmp_path / "scene.png").write_bytes(write_rgb_png(scene(20).image))
    with pytest.raises(DataError, match="expected at most 100"):
        Page(lambda: session, max_pixels=100).drop(session, str(tmp_path / "scene.png"))


def test_the_events_of_the_page(segmenter: Segmenter, tmp_path: Path) -> None:
    page = Page(
        lambda: Session(segmenter), save_folder=tmp_path / "saved", open_bank=lambda f: Session.open_bank(f, "cpu")
    )
    (tmp_path / "scene.png").write_bytes(write_rgb_png(scene(20).image))
    session, view = page.drop(None, str(tmp_path / "scene.png"))
    assert (view.proposal, view.refusals["correct"]) == (None, "click a region first")
    assert "background" in view.legend
    rows, columns = np.nonzero(session.prediction.proposals.masks[some_object(session)].numpy())
    height, width = session.prediction.label_map.shape
    x, y = (float(columns[0]) + 0.5) / width, (float(rows[0]) + 0.5) / height
    view = page.point(session, (x, y, x, y), None)
    assert view.proposal is not None
    assert view.label == label_of(session, view.proposal)
    assert view.explanation.count("<li") == 6
    assert "had no vote" in view.explanation
    assert page.correct(session, None, NAME).change == markup.show_change(None, "Click a region first.")
    view = page.correct(session, view.proposal, NAME)
    assert f"<b>{NAME}</b>" in view.change
    assert NAME in view.legend
    assert (view.label, view.classes[-1], view.refusals["save"]) == (NAME, NAME, "")
    shown = view.picture
    assert page.list_saved() == []
    for name in (None, "", " ", "..", "."):
        with pytest.raises(ConfigError, match=r"save: got .*, expected the name of a folder below"):
            page.save(session, name)
    assert "Saved: a bank of" in page.save(session, "learned").change
    assert page.list_saved() == ["learned"]
    assert NAME not in page.undo(session, NAME).legend
    assert "Nothing to undo." in page.undo(session, NAME).change
    assert NAME in page.redo(session, NAME).legend
    opened, view = page.open(session, "learned", NAME)
    assert opened is not session
    assert "Opened: learned" in view.change
    assert NAME in view.legend
    assert shown.split("ms-labels")[1] == view.picture.split("ms-labels")[1]
    assert page.drop(opened, None)[1].picture == markup.NO_PICTURE


def test_each_click_names_a_region(session: Session) -> None:
    page, (height, width) = Page(lambda: session), session.prediction.label_map.shape
    objects = [int(i) for i in session.prediction.kept if int(session.prediction.labels[i]) > 0][:2]
    for proposal in objects:
        rows, columns = np.nonzero(session.prediction.proposals.masks[proposal].numpy())
        x, y = (float(columns[0]) + 0.5) / width, (float(rows[0]) + 0.5) / height
        view = page.point(session, (x, y, x, y), NAME, names_at_once=True)
        assert f"<b>{NAME}</b>" in view.change
    assert len(session.named) == 2


def test_a_box_is_drawn_and_said(session: Session) -> None:
    view = Page(lambda: session).point(session, (0.1, 0.1, 0.5, 0.6), None)
    assert view.proposal is not None
    assert f"it looks like {label_of(session, view.proposal)}." in view.change


def test_a_box_around_a_region_draws_none(session: Session) -> None:
    page, box = Page(lambda: session), (0.1, 0.1, 0.5, 0.6)
    first = page.point(session, box, None)
    again = page.point(session, box, None)
    assert again.proposal == first.proposal
    assert "was drawn" in first.change
    assert again.change == first.change.replace("A region was drawn", "That region was there already")


def test_a_saved_bank_has_the_settings_that_the_page_was_started_with(
    session: Session, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.correct(some_object(session), NAME)
    session.save(tmp_path / "learned")
    monkeypatch.setattr(serve, "import_gradio", lambda: None)
    monkeypatch.setattr(serve, "build_page", lambda page, classes: page)
    options = serve.DemoOptions(str(bank), save_folder=str(tmp_path))
    page: Page = serve.open_page(options, ["runtime.device=cpu", "retrieval.top_k=2", "retrieval.min_area=11"])
    opened, view = page.open(None, "learned")
    assert NAME in view.classes
    assert (opened._segmenter.cfg.retrieval.top_k, opened._segmenter.cfg.retrieval.min_area) == (2, 11)


@pytest.mark.parametrize(
    ("data", "box"),
    [
        pytest.param({"box": [0, 0.25, 0.5, 1]}, (0, 0.25, 0.5, 1 - 1e-9), id="a box"),
        pytest.param({"box": [0, 0, 2, 1]}, None, id="outside"),
        pytest.param({"box": [0, 0]}, None, id="a corner is missing"),
        pytest.param({"box": "text"}, None, id="no numbers"),
        pytest.param({}, None, id="no box"),
        pytest.param(None, None, id="nothing"),
        pytest.param({"box": [0, 0, float("nan"), 1]}, None, id="not a number"),
    ],
)
def test_what_the_script_sends_is_checked(data: Any, box: Any) -> None:
    assert read_pointer(data) == box


def test_names_are_escaped(session: Session) -> None:
    name = "<img src=x onerror=alert(1)>'\""
    change = session.correct(some_object(session), name)
    view = Page(lambda: session)._view(session, some_object(session), name, shows_change=True)
    for part in (view.picture, view.legend, view.change, view.explanation, markup.show_change(change)):
        assert "<img src=x" not in part
    assert "&lt;img src=x" in view.legend


def test_what_changed_is_said_in_words() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[:2] = True
    change = WhatChanged(Change(3, "sofa", "cat"), (("sofa", "cat", 8), ("tree", "cat", 1)), 0.2, mask)
    assert change.describe() == (
        "This region: sofa → cat. 9 other regions changed (sofa → cat: 8, tree → cat: 1). 20.0 % of the picture has "
        "another class."
    )
    text = markup.show_change(change)
    for part in ("sofa → <b>cat</b>", "9 other regions changed:", "<b>8</b>", "20.0 %", "striped"):
        assert part in text
    same = WhatChanged(Change(3, "cat", "cat"))
    assert same.describe() == "This region stays cat. No other region changed. 0.0 % of the picture has another class."


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        pytest.param((64, 64), (768, 768), id="small"),
        pytest.param((300, 451), (300, 451), id="medium"),
        pytest.param((3000, 4000), (960, 1280), id="large"),
        pytest.param((1, 5000), (1, 1280), id="a strip"),
    ],
)
def test_pictures_are_shown_at_a_readable_size(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert choose_size(size) == shown


def test_outlines_stay_thin_where_a_picture_grows(session: Session) -> None:
    proposal = some_object(session)
    plain = draw_picture(session.prediction, session.colours)
    marked = draw_picture(session.prediction, session.colours, proposal)
    height, width = session.prediction.label_map.shape
    assert plain.painted.shape == (12 * height, 12 * width, 3)
    white = (marked.painted == 255).all(2) & (plain.painted != 255).any(2)
    # A pixel of the small picture is 12 pixels wide, the line is one: as many pixels as the outline is long.
    mask = np.pad(session.prediction.proposals.masks[proposal].numpy(), 1)
    sides = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    assert 6 * sides < white.sum() <= 13 * sides
    change = session.correct(proposal, NAME)
    striped = draw_picture(session.prediction, session.colours, change=change)
    unstriped = draw_picture(session.prediction, session.colours)
    differs = (striped.painted != unstriped.painted).any(2)
    mask = change.mask.repeat(12, 0).repeat(12, 1)
    assert differs[mask].any()
    assert not differs[~mask].any()


def test_examples_suit_the_bank(tmp_path: Path) -> None:
    scenes, photographs = write_examples(CLASSES, tmp_path), write_examples(("background", "cat"), tmp_path)
    assert [max(Image.open(file).size) for file in scenes] == 3 * [128]
    assert [file.stem for file in photographs] == ["coffee", "chelsea", "rocket"]
    assert min(Image.open(file).width for file in photographs) > 400


def test_without_gradio_there_is_one_line(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingError, match=r"gradio: cannot be imported \(No module named 'gradio'\); pip install"):
        serve.open_page(serve.DemoOptions(str(bank)))


@pytest.mark.parametrize("version", ["3.18.0", "6.27.1"])
def test_an_old_gradio_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = version

    monkeypatch.setattr(importlib, "import_module", lambda name: Old)
    lowest = ".".join(map(str, MIN_GRADIO))
    with pytest.raises(MissingError, match=rf"gradio: got version {version}, expected {lowest} or newer"):
        import_gradio()
    assert f'"gradio>={lowest}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_a_page_for_others_offers_no_bank_to_save_or_open(bank: Path) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is an optional package")
    for host, is_offered in (("127.0.0.1", True), ("0.0.0.0", False)):
        options, overrides = parse(
            [f"bank={bank}", f"host={host}", "runtime.device=cpu"], serve.DemoOptions, "demo_app"
        )
        parts = serve.open_page(options, overrides).get_config_file()["components"]
        labels = {part["props"].get("label") for part in parts}
        assert "Name of the region, old or new" in labels
        assert ("Save as" in labels, "Saved banks" in labels) == (is_offered, is_offered)


def test_the_page_is_served_on_this_machine(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import_gradio()
    except MissingError as error:
        pytest.skip(f"gradio is an optional package: {error}")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    options, overrides = parse([f"bank={bank}", "runtime.device=cpu"], serve.DemoOptions, "demo_app")
    blocks = serve.open_page(options, overrides)
    address = serve.launch(blocks, options, wait=False)
    try:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        assert answer.status == 200
        for part in ("Drop a picture above", "Name it", "drop a picture first"):
            assert part in text
    finally:
        blocks.close()
    with pytest.raises(ConfigError, match=r"port: got 0, expected 1 to 65535"):
        parse([f"bank={bank}", "port=0"], serve.DemoOptions, "demo_app")
