"""Taggers that run no model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.taggers import build
from tests.pseudo_masks.contract import CLASSES, sample
from tests.support.devices import CPU


@pytest.mark.parametrize(("name", "expected"), [
    pytest.param("given", (2, 4), id="given"),
    pytest.param("all", (1, 2, 3, 4, 5), id="all"),
])  # fmt: skip
def test_classes_of_an_image(name: str, expected: tuple[int, ...]) -> None:
    assert build({"name": name}, CPU, CLASSES).tag(sample()).class_ids == expected


def test_a_file_names_classes_of_each_image(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("image,labels\na,class 5;class 1\nb,\n")
    tagger = build({"name": "file", "path": str(tmp_path / "tags.csv")}, CPU, CLASSES)
    assert [tagger.tag(sample(name=name)).class_ids for name in "ab"] == [(1, 5), ()]
    with pytest.raises(DataError, match=r"^c: not in .*tags\.csv; add a row"):
        tagger.tag(sample(name="c"))
    before = tagger.digest
    (tmp_path / "tags.csv").write_text("image,labels\na,class 2\n")
    assert build({"name": "file", "path": str(tmp_path / "tags.csv")}, CPU, CLASSES).digest != before


def test_mistakes() -> None:
    untagged = sample(labels=())
    object.__setattr__(untagged, "labels", None)
    with pytest.raises(DataError, match="no image-level labels, which tagger=given needs"):
        build({"name": "given"}, CPU, CLASSES).tag(untagged)
    with pytest.raises(MissingError, match=r"^tagger\.path: got 'absent\.csv', no such file"):
        _ = build({"name": "file", "path": "absent.csv"}, CPU, CLASSES).digest
    with pytest.raises(ConfigError, match=r"^tagger\.name: got 'nobody', expected one of all, "):
        build({"name": "nobody"}, CPU, CLASSES)
