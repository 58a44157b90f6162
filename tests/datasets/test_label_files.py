"""Readers of label files, class lists and ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.datasets.labels import check_ids, distinct_names, read_classes, read_label_file, resolve_labels
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


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param([0, 2], (2,), id="the background as an id"),
        pytest.param(["0", "1"], (1,), id="the background as text"),
        pytest.param(["_background_", "Background", "background"], (), id="the background as a name"),
        pytest.param(["__ignore__", "dog"], (1,), id="what LabelMe ignores"),
        pytest.param(["dog, red car"], (1, 2), id="names with commas between them"),
        pytest.param(["tree, old"], (3,), id="a name with a comma"),
        pytest.param(["cafe\u0301"], (4,), id="decomposed Unicode"),
    ],
)
def test_tags_as_people_write_them(raw: list[int | str], expected: tuple[int, ...]) -> None:
    assert resolve_labels(raw, ("background", "dog", "red car", "tree, old", "caf\u00e9"), "a", "f") == expected


@pytest.mark.parametrize("tag", ["DOG", "Dog", "red  car", "red_car", "Red-Car"])
def test_case_and_spacing_are_asked_about(tag: str) -> None:
    expected = "dog" if "og" in tag.lower() else "red car"
    with pytest.raises(DataError, match=rf"has label '{tag}'.*did you mean '{expected}'\?"):
        resolve_labels([tag], ("background", "dog", "red car"), "a", "f")


def test_label_files_that_list_the_background(tmp_path: Path) -> None:
    """Those of the published method's authors do, with COCO's images by their number."""
    path = tmp_path / "train.json"
    path.write_text('{"images": [{"img_id": "9", "labels": [0, 46]}, {"img_id": "25", "labels": [0]}]}')
    file = read_label_file(path)
    classes = ("background", *(f"class {i}" for i in range(1, 81)))
    tags = {image_id: resolve_labels(raw, classes, image_id, file.where) for image_id, raw in file.entries.items()}
    assert tags == {"9": (46,), "25": ()}


EXPECTED = {"p0": ("disc",), "p1": ("disc", "square")}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("image,labels\np0.jpg,disc\np1.jpg,disc;square\n", id="as documented"),
        pytest.param("image,labels\r\np0.jpg,disc\r\n,\r\np1.jpg,disc;square\r\n,\r\n,,\r\n", id="rows of commas"),
        pytest.param("\ufeffimage;labels\r\np0.jpg;disc\r\np1.jpg;disc;square\r\n", id="semicolons"),
        pytest.param('image;labels\np0.jpg;disc\np1.jpg;"disc;square"\n;;\n', id="semicolons, quoted"),
        pytest.param("sep=;\nimage;labels\np0.jpg;disc;\np1.jpg;disc;square\n", id="Excel's own first line"),
        pytest.param('"Image"\t"Labels"\np0.jpg\tdisc\np1.jpg\tdisc;square\n', id="tabs"),
        pytest.param("\n\nimage,labels\np0.jpg,disc\np1,disc\np1.jpg,square\n", id="blank lines, repeated image"),
    ],
)
def test_tables_as_spreadsheets_save_them(tmp_path: Path, content: str) -> None:
    (tmp_path / "l.csv").write_bytes(content.encode())
    assert read_label_file(tmp_path / "l.csv").entries == EXPECTED


def test_unknown_tags_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("image,labels\n,\na,dog\nb,cat\n")
    file = read_label_file(tmp_path / "l.csv")
    assert (file.locate("b"), file.locate("c")) == (f"{tmp_path / 'l.csv'}:4", f"{tmp_path / 'l.csv'}")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(["disc", '"disc, square"'], ["disc", "square"], id="several names in one tag"),
        pytest.param(["disc", '"tree, old"'], ["disc", "tree, old"], id="a name with a comma"),
        pytest.param(["disc", "_background_", "__ignore__"], ["disc"], id="the background"),
        pytest.param(["1", "2"], None, id="ids"),
    ],
)
def test_names_of_a_label_file(tmp_path: Path, rows: list[str], expected: list[str] | None) -> None:
    lines = [f"p{i},{row}" for i, row in enumerate(rows)]
    (tmp_path / "l.csv").write_text("\n".join(["image,labels", *lines]))
    assert distinct_names(read_label_file(tmp_path / "l.csv")) == expected


@pytest.mark.parametrize("names", [("Disc", "disc"), ("red car", "red  car"), ("red_car", "Red Car")])
def test_names_that_are_nearly_equal_are_asked_about(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "l.csv").write_text(f"image,labels\na,{names[0]}\nb,other\nc,{names[1]}\n")
    with pytest.raises(DataError, match=r"differ only in case or spacing: '.*l\.csv:[24].*l\.csv:[24]") as caught:
        distinct_names(read_label_file(tmp_path / "l.csv"))
    assert all(name in str(caught.value) for name in names)


def test_labelmes_class_list(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("__ignore__\n_background_\ndisc\nsquare\n")
    assert read_classes(tmp_path / "classes.txt") == ("background", "disc", "square")


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
