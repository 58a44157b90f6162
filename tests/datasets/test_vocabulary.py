"""Vocabularies: how they are written, and the data set as they see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moduseg.datasets.tagged_images import TaggedImages
from moduseg.datasets.vocabulary import RewordedDataset, WordList, read_word_list
from moduseg.errors import ConfigError, DataError, MissingError, ModusegError
from tests.support.skeletons import indexed, noise, picture


@pytest.mark.parametrize(("content", "expected"), [
    pytest.param("dog\ngrass\n", WordList(("dog", "grass"), (("dog",), ("grass",))), id="one word a class"),
    pytest.param("dog, puppy\n\ncat\n", WordList(("dog", "cat"), (("dog", "puppy"), ("cat",))), id="commas"),
    pytest.param("dog; small, young dog\ncat\n", WordList(("dog", "cat"), (("dog", "small, young dog"), ("cat",))),
                 id="semicolons"),
    pytest.param("boat: ship\nbackground: sky; sea\n", WordList(("boat",), (("ship",),), ("sky", "sea")), id="names"),
    pytest.param("dog #ff8000\nsmall cat; kitten #00aa00\n", WordList(("dog", "small cat"),
                 (("dog",), ("small cat", "kitten"))), id="a class list with colours"),
    pytest.param("background\ndog\n", WordList(("dog",), (("dog",),), ("background",)), id="background is a word"),
])  # fmt: skip
def test_files_are_read(content: str, expected: WordList, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(content)
    assert read_word_list(str(tmp_path / "words.txt")) == expected


@pytest.mark.parametrize(("value", "expected"), [
    pytest.param("a dog;grass", WordList(("a dog", "grass"), (("a dog",), ("grass",))), id="text"),
    pytest.param("dog: puppy, hound;cat", WordList(("dog", "cat"), (("puppy", "hound"), ("cat",))), id="text, names"),
    pytest.param(["a dog", "grass"], WordList(("a dog", "grass"), (("a dog",), ("grass",))), id="list"),
    pytest.param(";".join(f"class {i}" for i in range(200)),
                 WordList(tuple(f"class {i}" for i in range(200)), tuple((f"class {i}",) for i in range(200))),
                 id="text longer than a file name may be"),
    pytest.param("", None, id="empty text"),
    pytest.param((), None, id="empty list"),
])  # fmt: skip
def test_lists_are_read(value: str | list[str], expected: WordList | None) -> None:
    assert read_word_list(value) == expected


@pytest.mark.parametrize(("value", "error", "message"), [
    pytest.param("absent.txt", MissingError, r"^vocabulary: got 'absent.txt', no such file", id="no file"),
    pytest.param("dog;dog", DataError, r"^vocabulary: line 3 is 'dog', expected a name not used", id="twice"),
    pytest.param("dog:;cat", ConfigError, r"^vocabulary: got .* one word or more for each class", id="no word"),
    pytest.param(["background: sky"], DataError, r"^vocabulary: got 0 classes beside background", id="no class"),
])  # fmt: skip
def test_mistakes_are_one_line(value: str | list[str], error: type[ModusegError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read_word_list(value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def dataset(tmp_path: Path) -> TaggedImages:
    """One image: its truth has 0, 1, 2 and 255, its tags are 1 and 2."""
    picture(tmp_path / "a.png", noise(0, (4, 6)))
    indexed(tmp_path / "truth.png", np.array([[0, 0, 1, 1, 2, 255]] * 4, np.uint8))
    return TaggedImages(
        "two",
        "val",
        classes=("background", "cat", "dog"),
        files={"a": tmp_path / "a.png"},
        tags={"a": (1, 2)},
        masks={"a": tmp_path / "truth.png"},
    )


def test_truth_and_tags_follow_the_order_of_words(dataset: TaggedImages) -> None:
    reworded = RewordedDataset(dataset, WordList(("dog", "cat"), (("a dog",), ("a cat", "kitten"))))
    sample = reworded.load("a", truth=True)
    assert reworded.classes == ("background", "dog", "cat")
    assert sample.semantic is not None
    assert sample.semantic[0].tolist() == [0, 0, 2, 2, 1, 255]
    assert (sample.labels, reworded.has_truth, reworded.name) == ((1, 2), True, "two")


def test_classes_keep_their_colours(dataset: TaggedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaggedImages, "class_colours", {"cat": "#112233", "dog": "#445566"})
    assert RewordedDataset(dataset, WordList(("dog",), (("dog",),))).class_colours == {"dog": "#445566"}


def test_other_classes_have_no_truth(dataset: TaggedImages) -> None:
    reworded = RewordedDataset(dataset, WordList(("dog", "grass"), (("dog",), ("grass",))))
    sample = reworded.load("a", truth=True)
    assert (sample.semantic, sample.labels, reworded.has_truth, reworded.label_source) == (None, None, False, "none")
    assert sample.size == (4, 6)
