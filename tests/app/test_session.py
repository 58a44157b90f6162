"""The demo without a page: what a person can do with a picture and a bank, and take back."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moduseg import Segmenter
from moduseg.app.page import REFUSALS_AT_START
from moduseg.app.session import Session
from moduseg.bank.derived import digest_bank, open_bank
from moduseg.bank.store import Bank
from moduseg.config.stored import reconfigure
from moduseg.errors import ArtefactError, ConfigError
from moduseg.kept_proposals import KeptProposals
from moduseg.report.bank_regions import RegionPictures
from moduseg.result import Change
from moduseg.tools import bank as bank_tool
from tests.support.app_sessions import NAME, label_of, name_of, some_object
from tests.support.deep_png import encode_deep_png
from tests.support.tagged_world import scene


def test_what_is_shown_is_what_the_api_predicts(session: Session, segmenter: Segmenter) -> None:
    plain = segmenter.predict(scene(20).image)
    assert np.array_equal(session.prediction.label_map, plain.label_map)
    assert session.prediction.shares == plain.shares


def test_a_click_finds_the_proposal_that_is_seen_there(session: Session) -> None:
    prediction = session.prediction
    height, width = prediction.label_map.shape
    for y in range(0, height, 5):
        for x in range(0, width, 5):
            proposal = session.at(x + 0.4, y + 0.4)
            covering = prediction.proposals.masks[:, y, x].nonzero()[:, 0]
            assert (proposal is None) == (len(covering) == 0)
            if proposal is not None:
                assert proposal in covering
                labels = prediction.labels[covering].tolist()
                seen = int(prediction.label_map[y, x])
                assert int(prediction.labels[proposal]) == seen or seen not in labels
    assert session.at(-1, 0) is None
    assert session.at(width, 0) is None


def test_a_correction_is_learned_seen_and_undone(session: Session, segmenter: Segmenter) -> None:
    before = digest_bank(segmenter.bank)
    first = session.prediction.label_map.copy()
    proposal = some_object(session)
    old = label_of(session, proposal)
    change = session.correct(proposal, f"  {NAME} ")
    assert change.region == Change(proposal, old, NAME)
    assert session.classes == (*segmenter.classes, NAME)
    mask = session.prediction.proposals.masks[proposal].numpy()
    assert (session.prediction.label_map[mask] == session.classes.index(NAME)).all()
    found = session.prediction.explain(proposal)
    assert (found.label, found.neighbours[0].label, found.neighbours[0].has_voted) == (NAME, NAME, True)
    assert found.neighbours[0].similarity == pytest.approx(1, abs=1e-5)
    assert found.neighbours[0].picture is not None
    assert len(session.bank) == len(segmenter.bank) + 1
    # Corrected once more, the same region counts once.
    session.correct(proposal, "background")
    assert len(session.bank) == len(segmenter.bank) + 1
    assert label_of(session, proposal) == "background"
    for _ in range(2):
        session.undo()
    assert np.array_equal(session.prediction.label_map, first)
    assert digest_bank(session.bank) == digest_bank(segmenter.bank) == before
    assert session.undo() is None


def test_redo_gives_what_undo_took(session: Session) -> None:
    proposal = some_object(session)
    old = label_of(session, proposal)
    done = session.correct(proposal, NAME)
    wanted, bank = session.prediction.label_map, digest_bank(session.bank)
    assert session.redo() is None
    session.undo()
    assert session.last_change is not None
    assert session.last_change.region == Change(proposal, NAME, old)
    assert (session.last_change.num_others, session.last_change.share) == (done.num_others, done.share)
    session.redo()
    assert np.array_equal(session.prediction.label_map, wanted)
    assert digest_bank(session.bank) == bank
    assert session.last_change.region == Change(proposal, old, NAME)
    # Another correction leaves nothing to do again.
    session.undo()
    session.correct(proposal, "background")
    assert session.redo() is None


@pytest.mark.parametrize("override", ["retrieval.top_k=9", "bank.outliers.drop_ratio=0.9"])
def test_a_correction_holds_whatever_votes_and_is_filtered(bank: Path, override: str) -> None:
    config = reconfigure(open_bank(bank).info["config"], [override]).as_dict()
    session = Session(Segmenter.from_bank(bank, "cpu", config))
    session.show(scene(20).image)
    proposal = some_object(session)
    session.correct(proposal, NAME)
    assert label_of(session, proposal) == NAME


def test_two_clicks_make_a_class(session: Session) -> None:
    """The two regions have the name, and so does a third that is the same as one of them in another picture."""
    objects = [int(i) for i in session.prediction.kept if int(session.prediction.labels[i]) > 0][:2]
    for proposal in objects:
        session.correct(proposal, NAME)
    assert [label_of(session, proposal) for proposal in objects] == [NAME, NAME]
    assert session.bank.counts[NAME] == 2
    session.show(scene(20).image)
    assert label_of(session, objects[0]) == NAME


def test_what_changed_is_counted_by_class(session: Session) -> None:
    before = session.prediction
    proposal = some_object(session)
    change = session.correct(proposal, NAME)
    names = [
        (before.classes[int(old)], session.classes[int(new)])
        for old, new in zip(before.labels, session.prediction.labels, strict=True)
    ]
    changed = [pair for i, pair in enumerate(names) if pair[0] != pair[1] and i != proposal]
    assert sorted(changed) == sorted((old, new) for old, new, count in change.others for _ in range(count))
    assert change.num_others == len(changed)
    seen = (
        np.array(before.classes, object)[before.label_map]
        != np.array(session.classes, object)[session.prediction.label_map]
    )
    assert np.array_equal(change.mask, seen)
    assert change.share == pytest.approx(seen.mean())
    assert f"{name_of(before, proposal)} → {NAME}" in change.describe()


def test_a_drawn_box_becomes_a_region(session: Session, segmenter: Segmenter) -> None:
    truth = scene(20).instances
    assert truth is not None
    rows, columns = np.nonzero(truth == 1)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    first, count = session.prediction.label_map.copy(), len(session.prediction.labels)
    proposal = session.draw(box)
    mask = session.prediction.proposals.masks[proposal].numpy()
    assert (mask & (truth == 1)).sum() / (mask | (truth == 1)).sum() > 0.6
    session.correct(proposal, NAME)
    assert (session.prediction.label_map[mask] == session.classes.index(NAME)).all()
    # Drawn again, it is the region that is there.
    assert session.draw(box) == proposal
    while session.undo():
        pass
    assert len(session.prediction.labels) == count
    assert np.array_equal(session.prediction.label_map, first)
    while session.redo():
        pass
    assert label_of(session, proposal) == NAME


def test_a_box_is_drawn_without_all_masks_in_memory(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large photograph take gigabytes, which are kept as bits."""
    decodings: list[KeptProposals] = []
    decode = KeptProposals.decode
    monkeypatch.setattr(KeptProposals, "decode", lambda kept: (decodings.append(kept), decode(kept))[1])
    proposal = session.draw((4, 6, 30, 40))
    assert session.draw((4, 6, 30, 40)) == proposal
    assert not decodings


def test_a_box_without_any_object_is_a_region_itself(session: Session) -> None:
    session.show(np.full((64, 96, 3), 120, np.uint8))
    proposal = session.draw((60, 40, 20, 10))
    mask = session.prediction.proposals.masks[proposal].numpy()
    assert np.array_equal(np.argwhere(mask)[[0, -1]], [[10, 20], [39, 59]])
    assert mask.sum() == 30 * 40
    session.correct(proposal, NAME)
    assert session.prediction.shares[NAME] >= 30 * 40 / mask.size
    session.undo()
    with pytest.raises(ConfigError, match=r"region: got 4 pixels, expected retrieval.min_area=10 or more"):
        session.draw((1, 1, 3, 3))
    assert session.redo() is not None  # what was refused changed nothing
    with pytest.raises(ConfigError, match="inside the picture of 96 x 64 pixels"):
        session.draw((100, 0, 120, 30))


def test_why_no_button_can_be_used(session: Session, segmenter: Segmenter) -> None:
    empty = Session(segmenter)
    assert empty.refusals(None, NAME) == REFUSALS_AT_START
    proposal = some_object(session)
    assert session.refusals(None, NAME)["correct"] == "click a region first"
    assert session.refusals(proposal, " ")["correct"] == "type what it is first"
    assert session.refusals(proposal, NAME)["correct"] == ""
    session.correct(proposal, NAME)
    assert [session.refusals(proposal)[name] for name in ("undo", "redo", "save")] == ["", "nothing was undone", ""]
    session.undo()
    assert [bool(session.refusals(proposal)[name]) for name in ("undo", "redo", "save")] == [True, False, True]


def test_another_picture_is_labelled_with_what_was_learned(session: Session) -> None:
    session.correct(some_object(session), NAME)
    session.show(scene(20).image)
    assert NAME in session.prediction.shares
    session.show(scene(21).image)
    session.undo()
    assert NAME not in session.classes


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
    picture = again.prediction.explain(proposal).neighbours[0].picture
    shown = session.prediction.explain(proposal).neighbours[0].picture
    assert picture is not None
    assert shown is not None
    assert np.array_equal(picture, shown)
    assert bank_tool.info(bank_tool.InfoOptions(str(path)), []) == 0
    with pytest.raises(ArtefactError, match=r"is the folder of the bank itself"):
        session.save(bank)


def test_mistakes_are_one_line(session: Session, segmenter: Segmenter, tmp_path: Path) -> None:
    empty = Session(segmenter)
    for act, message in (
        (lambda: empty.prediction, r"picture: got none"),
        (lambda: empty.picture, r"picture: got none"),
        (lambda: session.correct(10_000, NAME), r"proposal: got 10000, expected 0\.\."),
        (lambda: session.correct(0, "  "), r"class name ''"),
        (lambda: session.save(tmp_path / "x"), r"save: got no correction"),
    ):
        with pytest.raises(ConfigError, match=message):
            act()
    with pytest.raises(ValueError, match="H, W"):
        session.show(np.zeros(3, np.uint8))


def test_pictures_of_16_bits_are_read_as_the_bank_was(bank: Path, tmp_path: Path) -> None:
    config = {**open_bank(bank).info["config"]}
    config["dataset"] = {**config["dataset"], "image_range": [0, 4095]}
    (tmp_path / "dark.png").write_bytes(encode_deep_png(scene(20).image.astype(np.uint16) * 16))
    brightest = int((int(scene(20).image.max()) * 16 * 510 + 4095) // (2 * 4095))
    session = Session(Segmenter.from_bank(bank, "cpu", config))
    session.show(tmp_path / "dark.png")
    assert session.picture.pixels.max() == brightest
    # A bank that names its files shows their regions alike.
    info = {**session.bank.info, "config": config, "files": {session.bank.image_ids[0]: str(tmp_path / "dark.png")}}
    pictures = RegionPictures(bank, replace(session.bank, info=info), picture_folders=[tmp_path])
    image = pictures.find_image(session.bank.image_ids[0])
    assert image is not None
    assert image.max() == brightest


def test_pictures_without_a_correction_are_forgotten(session: Session) -> None:
    pictures = []
    for index in range(21, 24):
        session.show(scene(index).image)
        pictures.append(weakref.ref(session.picture))
    session.correct(some_object(session), NAME)
    session.show(scene(25).image)
    gc.collect()
    assert [picture() is not None for picture in pictures] == [False, False, True]
