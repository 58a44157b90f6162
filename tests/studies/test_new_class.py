"""A class withheld from a bank and added again, from a few tagged images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moduseg.bank.derived import digest_bank
from moduseg.bank.store import Bank
from moduseg.cli.options import parse
from moduseg.config import compose
from moduseg.errors import ConfigError, DataError
from moduseg.stages.build_bank import BuildBank
from moduseg.studies import new_class
from moduseg.tools import bank as bank_tool
from tests.support.runs import overrides
from tests.support.tagged_world import CLIP, NEW, holding, settings, write_folder


def test_before_after_and_with_all(tmp_path: Path) -> None:
    """With every image that shows it added, the class is found as with the full bank, whatever the order of rows."""
    more = ("backbone=miniature", "bank.outliers.enabled=false")
    cfg = compose(overrides(tmp_path, *more, train=24, val=8))
    stored = Bank.load(BuildBank.run(cfg))
    name = max(stored.classes[1:], key=lambda n: stored.counts[n])
    options, _ = parse([f"class={name}", "images=2"], new_class.NewClassOptions, "new_class")
    path = new_class.run(options, cfg)
    record = json.loads(path.with_suffix(".json").read_text())
    (row,) = record["rows"]
    assert (row["class"], row["added"]) == (name, 2)
    assert row["of"] >= stored.counts[name]
    assert row["images_before"] == 24 - row["of"]
    assert row["before"]["iou"] == 0.0
    assert row["after"]["iou"] > 0.0
    assert row["seconds"] > 0
    assert f"| {name}" in path.read_text()
    everything, _ = parse([f"class={name}", "images=1000", "name=all"], new_class.NewClassOptions, "new_class")
    (row,) = json.loads(new_class.run(everything, cfg).with_suffix(".json").read_text())["rows"]
    assert row["added"] == row["of"]
    assert row["after"] == pytest.approx(row["all"], abs=1e-6)


def test_what_is_withheld_is_what_was_never_there(tmp_path: Path) -> None:
    """Taking images out of a bank gives the bank that was built without them."""
    without, holders = holding(NEW, 4, yes=False), holding(NEW, 2)
    joint_root = write_folder(tmp_path / "joint", without + holders)
    without_root = write_folder(tmp_path / "own", without)
    joint_bank, without_bank = (
        BuildBank.run(compose(settings(root, tmp_path / "o", *CLIP))) for root in (joint_root, without_root)
    )
    gone = Bank.load(joint_bank).image_ids[4:]
    bank_tool.remove(bank_tool.RemoveOptions(str(joint_bank), (NEW,), gone, out=str(tmp_path / "left")), [])
    bank_tool.remove(bank_tool.RemoveOptions(str(without_bank), (NEW,), out=str(tmp_path / "alone")), [])
    assert digest_bank(Bank.load(tmp_path / "left")) == digest_bank(Bank.load(tmp_path / "alone"))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    cfg = compose(overrides(tmp_path))
    with pytest.raises(ConfigError, match=r"class: got 'bird', expected all or some of red disc"):
        new_class.run(new_class.NewClassOptions(("bird",)), cfg)
    with pytest.raises(ConfigError, match=r"images: got 0, expected 1 or more"):
        parse(["images=0"], new_class.NewClassOptions, "new_class")
    no_truth_root = write_folder(tmp_path / "own", [0, 1], masks=False)
    with pytest.raises(DataError, match=r"folder train: got no ground truth"):
        new_class.run(
            new_class.NewClassOptions(),
            compose(settings(no_truth_root, tmp_path / "o", *CLIP, "dataset.val_split=train")),
        )
