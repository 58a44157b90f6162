"""Readers of label files, class lists and ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.datasets.labels import check_ids, read_classes, read_label_file, resolve_labels
from moduseg.errors import DataError


@pytest.mark.parametrize(
    "id", ["../b", "a/../../b", "/etc/passwd", "C:/x", "a\\b", "a//b", "./a", "a/", "", "a\x00b", ".."]
)
def test_ids_leaving_the_folder(id: str) -> None:
    with pytest.raises(DataError, match=r"list\.txt: got image id"):
        check_ids(["fine/one", id], "list.txt")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.json", b"{", "not JSON"),
        ("l.json", b"[1]", "got a list at the top"),
        ("l.json", b'{"a": 3}', "entry 'a' has labels 3"),
        ("l.json", b'{"a": [1.5]}', r"entry 'a' has labels \[1\.5\]"),
        ("l.json", b'{"a": [true]}', "entry 'a'"),
        ("l.json", b'{"images": [{"labels": [1]}]}', "entry None"),
        ("l.json", b'"\xff\xfe"', "not UTF-8"),
        ("l.csv", b"", "got columns none"),
        ("l.csv", b"file,tags\na,b\n", "got columns file, tags"),
        ("l.csv", b"image,labels\na,dog,cat\n", "line 2 is not <image>,<labels>"),
        ("l.csv", b"image,labels\n,dog\n", "line 2 is not <image>,<labels>"),
    ],
)
def test_broken_label_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_label_file(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_forms(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("\ufeffLabels, Image \n1 2,a.jpg\n3;4,b\n,c\nred car;dog,d\n", encoding="utf-8")
    expected = {"a": ("1", "2"), "b": ("3", "4"), "c": (), "d": ("red car", "dog")}
    assert read_label_file(tmp_path / "l.csv").entries == expected


def test_names_resolve_before_numbers() -> None:
    assert resolve_labels(["7", "2", 1], ("background", "dog", "7"), "a", "f") == (1, 2)
    with pytest.raises(DataError, match=r"'a' has label 'dgo'.*did you mean 'dog'"):
        resolve_labels(["dgo"], ("background", "dog"), "a", "f")
    with pytest.raises(DataError, match="has label 'background'"):
        resolve_labels(["background"], ("background", "dog"), "a", "f")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dog\ncat\n", "got 'dog' first, expected 'background'"),
        ("", "got nothing first"),
        ("background\n", "got 0 classes"),
        ("background\ndog\n\ncat\n", "line 3 is ''"),
        ("background\ndog\ndog\n", "line 3 is 'dog'"),
        ("background\ndo\0g\n", r"line 2 is 'do\\x00g'"),
        ("background\n\x1b[2J\n", "line 2 is .*without control characters"),
        ("background\n" + "".join(f"c{i}\n" for i in range(255)), "got 255 classes"),
    ],
)
def test_broken_class_lists(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        read_classes(tmp_path / "classes.txt")
