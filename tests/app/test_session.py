"""The demo's logic without a page, the page's events without a browser, and the page served on this machine."""

from __future__ import annotations

import importlib
import io
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moduseg import Segmenter
from moduseg.app import serve
from moduseg.app.page import Page, PageView, import_gradio, picture_scale
from moduseg.app.session import Session
from moduseg.bank import edit
from moduseg.bank.derived import digest_bank, open_bank
from moduseg.bank.store import Bank
from moduseg.cli.options import parse
from moduseg.config import compose
from moduseg.datasets.io import write_rgb_png
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.report.bank_regions import RegionPictures, draw_region
from moduseg.stages import extend_bank
from moduseg.stages.build_bank import BuildBank
from moduseg.tools import bank as bank_tool
from tests.support.deep_png import encode_deep_png
from tests.support.tagged_world import CLIP, image_id, scene, settings, write_folder

NAME = "purple blob"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bank")
    write_folder(root / "own", range(12))
    return BuildBank.run(compose(settings(root / "own", root / "outputs", *CLIP, "retrieval.min_area=10")))


@pytest.fixture(scope="module")
def segmenter(bank: Path) -> Segmenter:
    return Segmenter.from_bank(bank, device="cpu")


@pytest.fixture
def session(segmenter: Segmenter, bank: Path) -> Session:
    made = Session(segmenter, bank)
    made.show(scene(20).image)
    return made


def some_object(session: Session) -> int:
    """The first object that is seen."""
    prediction = session.prediction
    return next(int(i) for i in prediction.kept if int(prediction.labels[i]) > 0)


def inside(session: Session, proposal: int) -> tuple[int, int]:
    """A pixel `(x, y)` where only this proposal lies, as superpixels of one scale give it."""
    masks = session.prediction.proposals.masks.numpy()
    rows, columns = np.nonzero(masks[proposal])
    alone = next(k for k in range(len(rows)) if session.at(int(columns[k]), int(rows[k])) == proposal)
    return int(columns[alone]), int(rows[alone])


def test_what_is_shown_is_what_the_api_predicts(session: Session, segmenter: Segmenter) -> None:
    plain = segmenter.predict(scene(20).image)
    assert np.array_equal(session.prediction.label_map, plain.label_map)
    assert sum(pixels for _, pixels in session.labels()) == plain.label_map.size
    assert session.overlay().shape == session.image.shape
    assert not np.array_equal(session.overlay(some_object(session)), session.overlay())
    assert session.count_objects() > 0


def test_a_click_finds_the_proposal_that_is_seen_there(session: Session) -> None:
    prediction = session.prediction
    height, width = prediction.label_map.shape
    for y in range(0, height, 5):
        for x in range(0, width, 5):
            proposal = session.at(x + 0.4, y + 0.4)
            if proposal is not None:
                assert bool(prediction.proposals.masks[proposal, y, x])
            label = int(prediction.labels[proposal]) if proposal is not None else 0
            assert label == prediction.label_map[y, x]
    assert session.at(-1, 0) is None
    assert session.at(width, 0) is None


def test_why_names_the_regions_that_voted(session: Session) -> None:
    proposal = some_object(session)
    found = session.why(proposal)
    assert found.label == session.classes[int(session.prediction.labels[proposal])]
    assert sum(found.votes.values()) == session.top_k == 1
    assert [n.has_voted for n in found.neighbours] == [True] + 5 * [False]
    assert [n.row for n in found.neighbours][:1] == session.prediction.neighbours[proposal].tolist()
    assert next(iter(found.votes)) == found.label
    similarities = [n.similarity for n in found.neighbours]
    assert similarities == sorted(similarities, reverse=True)
    won = [n.similarity for n in found.neighbours if n.label == found.label and n.has_voted]
    assert found.score == pytest.approx(np.mean(won), abs=1e-5)
    for neighbour in found.neighbours:
        assert neighbour.image.startswith("scene")
        assert neighbour.picture is not None
        assert max(neighbour.picture.shape[:2]) == 160
    session.set_top_k(7)
    wide = session.why(proposal, pictures=False)
    assert len(wide.neighbours) == sum(wide.votes.values()) == 7
    assert [n.row for n in wide.neighbours] == session.prediction.neighbours[proposal].tolist()
    assert (wide.runner_up is None) == (len(wide.votes) == 1)
    session.set_top_k(None)
    assert sum(session.why(proposal).votes.values()) == session.top_k == 1


def test_a_correction_is_learned_seen_and_taken_back(session: Session, segmenter: Segmenter) -> None:
    before = digest_bank(segmenter.bank)
    first = session.prediction.label_map.copy()
    proposal = some_object(session)
    old = session.why(proposal).label
    changes = session.correct(proposal, f"  {NAME} ")
    assert (proposal, old, NAME) in [(c.proposal, c.before, c.after) for c in changes]
    assert session.classes == (*segmenter.classes, NAME)
    found = session.why(proposal)
    assert (found.label, found.neighbours[0].image, found.neighbours[0].label) == (NAME, "shown/1", NAME)
    assert found.neighbours[0].similarity > 0.8
    assert found.neighbours[0].picture is not None
    assert len(session.bank) == len(segmenter.bank) + 1
    assert digest_bank(segmenter.bank) == before
    # Corrected again, the same region counts once.
    session.correct(proposal, "background")
    assert len(session.bank) == len(segmenter.bank) + 1
    assert NAME not in session.classes
    assert session.why(proposal).label == "background"
    taken = session.undo()
    assert taken is not None
    assert taken.label == "background"
    assert np.array_equal(session.prediction.label_map, first)
    assert digest_bank(session.bank) == before
    assert session.undo() is None


def test_the_votes_follow_the_rarest_class(session: Session) -> None:
    rarest = min(count for count in session.bank.counts.values() if count)
    assert session.top_k == min(rarest, 1)  # one neighbour is configured
    session.correct(some_object(session), NAME)
    assert session.top_k == 1
    session.set_top_k(9)
    assert len(session.why(0, pictures=False).neighbours) == 9
    # One region of nine cannot win.
    assert NAME not in [name for name, _ in session.labels()]


def test_another_picture_is_labelled_with_what_was_learned(session: Session) -> None:
    proposal = some_object(session)
    session.correct(proposal, NAME)
    session.show(scene(20).image)
    assert NAME in [name for name, _ in session.labels()]
    session.correct(some_object(session), "red disc")
    assert [c.image for c in session.corrections] == ["shown/1", "shown/2"]


def test_a_saved_bank_works_like_any_other(session: Session, bank: Path, tmp_path: Path) -> None:
    proposal = some_object(session)
    session.correct(proposal, NAME)
    wanted = session.prediction.label_map
    path = session.save(tmp_path / "learned")
    stored = Bank.load(path)
    assert digest_bank(stored) == digest_bank(session.bank)
    again = Session.open_bank(path, device="cpu")
    again.show(scene(20).image)
    assert np.array_equal(again.prediction.label_map, wanted)
    picture = again.why(proposal).neighbours[0].picture
    assert picture is not None
    shown = session.why(proposal).neighbours[0].picture
    assert shown is not None
    assert np.array_equal(picture, shown)
    assert bank_tool.info(bank_tool.InfoOptions(str(path)), []) == 0
    with pytest.raises(ArtefactError, match=r"is the folder of the bank itself"):
        session.save(bank)


def test_mistakes_are_one_line(session: Session, segmenter: Segmenter, bank: Path, tmp_path: Path) -> None:
    empty = Session(segmenter, bank)
    for act, message in (
        (lambda: empty.why(0), r"picture: got none"),
        (lambda: empty.overlay(), r"picture: got none"),
        (lambda: empty.show(np.zeros((3, 3), np.uint8)), r"picture: got \(3, 3\) uint8, expected \[H, W, 3\]"),
        (lambda: session.why(10_000), r"proposal: got 10000, expected 0\.\."),
        (lambda: session.correct(0, "  "), r"class name ''"),
        (lambda: session.set_top_k(0), r"top_k: got 0"),
        (lambda: session.save(tmp_path / "x"), r"save: got no correction"),
    ):
        with pytest.raises(ConfigError, match=message):
            act()


def test_pictures_of_regions_are_looked_for_through_the_folders(bank: Path, tmp_path: Path) -> None:
    """Those of a bank made of banks too; where an image is gone there is none."""
    more = write_folder(tmp_path / "more", [30])
    options = extend_bank.AddOptions(str(bank), (str(more),), out=str(tmp_path / "new"))
    extend_bank.run(options, [f"runtime.outputs={tmp_path / 'o'}"])
    stored = Bank.load(tmp_path / "new")
    pictures = RegionPictures(tmp_path / "new", stored, size=100, picture_folders=[more])
    for row in range(len(stored)):
        name, label = stored.image_ids[int(stored.image_index[row])], stored.classes[int(stored.labels[row])]
        assert pictures.draw(name, label) is not None
    first = stored.image_ids[int(stored.image_index[1])]
    label = stored.classes[int(stored.labels[1])]
    outlined, whole = pictures.draw(first, label), pictures.draw(first, "no such class")
    assert outlined is not None
    assert whole is not None
    assert not np.array_equal(outlined, whole)
    (more / "images" / f"{image_id(30)}.png").unlink()
    assert RegionPictures(tmp_path / "new", stored).draw(image_id(30), label) is None
    assert RegionPictures(tmp_path / "new", stored).draw("nobody", label) is None


def name_picture(bank: Bank, image: str, file: str) -> Bank:
    """The bank with a file named for one of its images, as somebody who writes a bank.json by hand can."""
    return edit.append_files(bank, {image: file})


def test_a_foreign_bank_shows_no_file_outside_its_images(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bank)
    stored, shown = Bank.load(bank), write_rgb_png(scene(20).image)
    first = stored.image_ids[0]
    folder, private = tmp_path / "foreign", tmp_path / "private.png"
    (folder / "images").mkdir(parents=True)
    private.write_bytes(shown)
    (folder / "images" / "own.png").write_bytes(shown)
    (folder / "images" / "link.png").symlink_to(private)
    for file, is_shown in {
        str(folder / "images" / "own.png"): True,
        str(private): False,
        str(folder / "images" / ".." / ".." / "private.png"): False,
        str(folder / "images" / "link.png"): False,
        "pictures\0.png": False,
    }.items():
        pictures = RegionPictures(folder, name_picture(stored, first, file))
        assert (pictures.find_image(first) is not None) == is_shown, file
    allowed = RegionPictures(folder, name_picture(stored, first, str(private)), picture_folders=[tmp_path])
    assert allowed.find_image(first) is not None
    monkeypatch.chdir(tmp_path)
    assert RegionPictures(folder, name_picture(stored, first, str(private))).find_image(first) is not None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RegionPictures(folder, name_picture(stored, first, str(private))).find_image(first) is None
    for outside in ("../images/" + first, str(tmp_path / "private"), "a\0b"):
        pictures = RegionPictures(folder, stored)
        assert pictures.find_image(outside) is None
        assert pictures.find_label_map(outside) is None


def test_a_public_page_shows_no_training_image_outside_the_bank(bank: Path) -> None:
    stored = Bank.load(bank)
    first = stored.image_ids[0]
    root = Path(stored.info["config"]["dataset"]["root"])
    assert RegionPictures(bank, stored).find_image(first) is not None
    assert RegionPictures(bank, stored, is_public=True).find_image(first) is None
    assert RegionPictures(bank, stored, picture_folders=[root], is_public=True).find_image(first) is not None


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


def test_pictures_of_16_bits_are_read_as_the_bank_was(bank: Path, tmp_path: Path) -> None:
    config = {**open_bank(bank).info["config"]}
    config["dataset"] = {**config["dataset"], "image_range": [0, 4095]}
    (tmp_path / "dark.png").write_bytes(encode_deep_png(scene(20).image.astype(np.uint16) * 16))
    brightest = int((int(scene(20).image.max()) * 16 * 510 + 4095) // (2 * 4095))
    session = Session(Segmenter.from_bank(bank, "cpu", config), bank)
    Page(lambda: session).drop(session, str(tmp_path / "dark.png"))
    assert session.image.max() == brightest
    # A bank that names its files shows their regions alike.
    info = {**session.bank.info, "config": config, "files": {session.bank.image_ids[0]: str(tmp_path / "dark.png")}}
    pictures = RegionPictures(bank, replace(session.bank, info=info), picture_folders=[tmp_path])
    image = pictures.find_image(session.bank.image_ids[0])
    assert image is not None
    assert image.max() == brightest


def test_pictures_without_a_correction_are_forgotten(session: Session) -> None:
    for index in range(21, 25):
        session.show(scene(index).image)
    assert len(session._images) == 1
    session.correct(some_object(session), NAME)
    session.show(scene(25).image)
    assert len(session._images) == 2


def test_a_region_is_cut_out_and_the_rest_dimmed() -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    picture = draw_region(image, mask, 112)
    assert picture.shape == (72, 112, 3)  # 18 x 28 pixels of the image
    assert picture[36, 56].tolist() == [200, 200, 200]
    assert picture[2, 2].tolist() == [90, 90, 90]
    assert (picture == 255).all(2).any()
    assert draw_region(image, None, 30).shape == (20, 30, 3)


def test_the_events_of_the_page(segmenter: Segmenter, bank: Path, tmp_path: Path) -> None:
    page = Page(lambda: Session(segmenter, bank), save_folder=tmp_path)
    (tmp_path / "scene.png").write_bytes(write_rgb_png(scene(20).image))
    session, view = page.drop(None, str(tmp_path / "scene.png"))
    assert (view.proposal, view.thumbnails, view.message) == (None, (), "")
    factor = picture_scale(session)
    assert factor == 512 // 64
    assert view.overlay is not None
    assert view.overlay.shape == (*(side * factor for side in scene(20).image.shape[:2]), 3)
    assert "background" in view.labels
    assert "Click" in view.explanation
    assert page.drop(session, None) == (session, PageView())
    chosen = some_object(session)
    x, y = inside(session, chosen)
    view = page.click(session, x * factor, y * factor)
    assert view.proposal == chosen
    assert f"**{view.label}**, score" in view.explanation
    assert len(view.thumbnails) == 6
    assert view.thumbnails[0][1].startswith(f"{view.label} ")
    assert ["no vote" in caption for _, caption in view.thumbnails] == [False] + 5 * [True]
    assert page.correct(session, None, NAME).message == "Click a region first, then say what it is."
    view = page.correct(session, chosen, NAME)
    assert f"→ **{NAME}**" in view.message
    assert NAME in view.labels
    assert (view.label, session.classes[-1]) == (NAME, NAME)
    assert "No label changed" in page.correct(session, chosen, NAME).message
    assert "-> " in page.save(session, "learned")
    assert page.save(session, " ") == "Name a folder first."
    view = page.set_votes(session, chosen, 5)
    assert ["no vote" in caption for _, caption in view.thumbnails] == 5 * [False] + [True]
    assert page.set_votes(None, None, 5) == PageView()
    assert page.undo(session, chosen).message == f"Taken back: {NAME}."
    assert page.undo(session, None).message == "Nothing to take back."


def test_without_gradio_there_is_one_line(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingError, match=r"gradio: cannot be imported \(No module named 'gradio'\); pip install"):
        serve.open_page(serve.DemoOptions(str(bank)))


def test_an_old_gradio_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "3.18.0"

    monkeypatch.setattr(importlib, "import_module", lambda name: Old)
    with pytest.raises(MissingError, match=r"gradio: got version 3\.18\.0, expected 5 or newer"):
        import_gradio()


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
        for part in ("Drop a picture.", "Add to the bank", "neighbours that vote"):
            assert part in text
    finally:
        blocks.close()
    with pytest.raises(ConfigError, match=r"port: got 0, expected 1 to 65535"):
        parse([f"bank={bank}", "port=0"], serve.DemoOptions, "demo_app")


def test_drop_click_correct_and_see_the_change_in_a_browser(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is an optional package")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    try:
        import_gradio()
    except MissingError as error:
        pytest.skip(f"gradio is an optional package: {error}")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    options, overrides = parse([f"bank={bank}", "runtime.device=cpu"], serve.DemoOptions, "demo_app")
    blocks = serve.open_page(options, overrides)
    address = serve.launch(blocks, options, wait=False)
    outside: list[str] = []
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.set_default_timeout(60_000)
            page.on("request", lambda r: outside.append(r.url) if "127.0.0.1" not in r.url else None)
            page.goto(address)
            page.get_by_text("Add to the bank").wait_for()
            page.set_input_files("input[type=file]", str(bank.parents[3] / "own" / "images" / f"{image_id(3)}.png"))
            page.get_by_text("Click a region of the result").wait_for()
            box = page.locator("img").nth(1).bounding_box()
            assert box is not None
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.get_by_text("votes:").wait_for()
            label = page.get_by_label("it is")
            label.fill(NAME)
            label.press("Enter")
            page.get_by_text("Add to the bank").click()
            page.get_by_text("corrections among them: 1").wait_for()
            page.get_by_text(f"{NAME}, score").wait_for()
            browser.close()
    finally:
        blocks.close()
    assert [url for url in outside if not url.startswith(("data:", "blob:"))] == []
