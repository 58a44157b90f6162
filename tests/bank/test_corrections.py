"""Corrections of a bank's labels, from a file that names the bank they were made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moduseg.bank.corrections import apply_corrections, read_corrections
from moduseg.bank.derived import digest_bank
from moduseg.bank.store import Bank
from moduseg.errors import ConfigError, ModusegError

CLASSES = ("background", "cat", "dog")


def make_bank() -> Bank:
    """Four regions of two images."""
    return Bank(
        pooled=torch.eye(4),
        labels=torch.tensor([0, 1, 0, 2]),
        image_index=torch.tensor([0, 0, 1, 1]),
        areas=torch.tensor([9, 8, 7, 6]),
        image_ids=("a", "b"),
        classes=CLASSES,
        info={},
    )


def write(path: Path, corrections: Any, **changes: Any) -> Path:
    """Write a file of corrections for `make_bank()`."""
    content = {"version": 1, "bank": digest_bank(make_bank()), "corrections": corrections, **changes}
    path.write_text(json.dumps(content))
    return path


def entry(row: int = 1, image: str = "a", before: str = "cat", after: str | None = "dog") -> dict[str, Any]:
    return {"row": row, "image": image, "before": before, "after": after}


def test_labels_change_and_regions_go(tmp_path: Path) -> None:
    file = read_corrections(write(tmp_path / "c.json", [entry(), entry(3, "b", "dog", None)]))
    bank = make_bank()
    corrected = apply_corrections(bank, file)
    assert corrected.labels.tolist() == [0, 2, 0]
    assert corrected.areas.tolist() == [9, 8, 7]
    assert corrected.is_trusted is not None
    assert corrected.is_trusted.tolist() == [False, True, False]  # a person named it
    assert corrected.pooled.equal(bank.pooled[:3])
    assert bank.labels.tolist() == [0, 1, 0, 2]  # the bank itself stays as it is


@pytest.mark.parametrize(
    ("corrections", "changes", "message"),
    [
        pytest.param([], {}, "empty list", id="nothing to correct"),
        pytest.param([entry()], {"bank": "0" * 64}, "another bank", id="another bank"),
        pytest.param([entry()], {"version": 2}, "another kind", id="another version"),
        pytest.param({}, {}, "no list of corrections", id="no list"),
        pytest.param([entry(), entry()], {}, "two corrections of row 1", id="a row twice"),
        pytest.param([entry(row=4)], {}, r"row 4, expected 0\.\.3", id="no such row"),
        pytest.param([entry(row=-1)], {}, "correction 0", id="a negative row"),
        pytest.param([entry(image="b")], {}, "the bank has 'cat' of 'a'", id="another image"),
        pytest.param([entry(before="dog")], {}, "the bank has 'cat' of 'a'", id="another label"),
        pytest.param([entry(after="bird")], {}, "'bird', expected one of background, cat, dog", id="no such class"),
        pytest.param(["dog"], {}, "correction 0: got 'dog'", id="no object"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, corrections: Any, changes: Any, message: str) -> None:
    path = write(tmp_path / "c.json", corrections, **changes)
    with pytest.raises(ConfigError, match=message):
        apply_corrections(make_bank(), read_corrections(path))


def test_a_file_that_is_no_json_is_saved_again(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"version": 1')
    with pytest.raises(ConfigError, match=r"c\.json: got no JSON, expected \{.*save it again in the report"):
        read_corrections(tmp_path / "c.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModusegError, match="no such file"):
        read_corrections(tmp_path / "none.json")
