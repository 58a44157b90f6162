"""Prompts: what is written, which tokens stand for which class, and what is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moduseg.diffusion.prompts import (
    BACKGROUND_WORDS,
    Prompt,
    TokenizedPrompt,
    resolve_background_words,
    resolve_class_words,
    resolve_head_words,
    tokenize,
    write_prompt,
)
from moduseg.errors import DataError

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(words: tuple[Path, int, int]) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(words[0]))


def read_words(prompt: Prompt, tokens: TokenizedPrompt, tokenizer: Any) -> list[str]:
    """Return the tokens of each name as text."""
    pieces = tokenizer.convert_ids_to_tokens(list(tokens.ids))
    return ["".join(pieces[p] for p in span).replace("</w>", " ").strip() for span in tokens.spans]


@pytest.mark.parametrize(("class_words", "settings", "text"), [
    pytest.param({"dog": "dog"}, {}, "a photograph of dog", id="one class"),
    pytest.param({"a": "dog", "b": "tv monitor"}, {}, "a photograph of dog and tv monitor", id="two classes"),
    pytest.param({"a": "dog", "b": "cat"}, {"template": "{} in a room", "separator": ", ", "suffix": "."},
                 "dog, cat in a room.", id="template, separator and suffix"),
])  # fmt: skip
def test_prompt_is_written(class_words: dict[str, str], settings: dict[str, Any], text: str) -> None:
    prompt = write_prompt(class_words, **settings)
    assert prompt.text == text
    assert [text[start:end] for start, end in prompt.ranges] == list(class_words.values())


@pytest.mark.parametrize(("written", "head_words", "expected"), [
    pytest.param(["disc"], [], ["disc"], id="one word"),
    pytest.param(["red disc", "ring"], [], ["red disc", "ring"], id="two words"),
    pytest.param(["red disc", "blue ring"], ["red disc"], ["disc", "blue ring"], id="the last word alone"),
    pytest.param(["Red  Disc", "blue ring"], [], ["red disc", "blue ring"], id="capitals and spaces"),
    pytest.param(["red disc", "red disc and ring"], [], ["red disc", "red disc and ring"], id="a name in another"),
    pytest.param(["zxqj", "ring"], [], ["zxqj", "ring"], id="a word of several tokens"),
    pytest.param(["naïve café", "t-shirt"], [], None, id="letters beyond ASCII"),
])  # fmt: skip
def test_spans_are_found(written: list[str], head_words: list[str], expected: Any, tokenizer: Any) -> None:
    prompt = write_prompt({word: word for word in written}, head_words=head_words, suffix=" and other object, grass")
    tokens = tokenize(prompt, tokenizer, 48)
    if expected is not None:
        assert read_words(prompt, tokens, tokenizer) == expected
    # Whole words have the tokens that they have alone.
    alone = [tokenizer(prompt.text[start:end])["input_ids"][1:-1] for start, end in prompt.ranges]
    assert [[tokens.ids[p] for p in span] for span in tokens.spans] == alone
    assert len(tokens.ids) == 48


def test_content_is_between_start_and_end(tokenizer: Any) -> None:
    tokens = tokenize(write_prompt({"a": "red disc"}), tokenizer, LENGTH)
    assert tokens.content == (1, 2, 3, 4, 5)
    assert tokens.ids[6:] == (tokenizer.eos_token_id,) * (LENGTH - 6)
    assert tokenize(Prompt(""), tokenizer, LENGTH).content == ()


def test_weights_are_those_of_the_words(tokenizer: Any) -> None:
    tokens = tokenize(write_prompt({"a": "red disc"}, head_words=["red disc"], num_pluses=1), tokenizer, 8)
    assert tokens.weights == (1, 1, 1, 1, 1, pytest.approx(1.1), 1, 1)


def test_a_long_prompt_is_cut_behind_its_classes(tokenizer: Any) -> None:
    prompt = write_prompt({"a": "red disc"}, suffix=" and grass" * 30)
    tokens = tokenize(prompt, tokenizer, LENGTH)
    assert len(tokens.ids) == LENGTH
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert read_words(prompt, tokens, tokenizer) == ["red disc"]


@pytest.mark.parametrize(("written", "named"), [
    pytest.param(["disc"] * 10 + ["red ring"], r"'red ring' of 'red ring'", id="behind the last token"),
    pytest.param(["disc"] * 8 + ["green red blue ring"], r"'green red blue ring'", id="across the last token"),
    pytest.param(["zxqjvkzxqjvkzxqjvkzxqjvkzxqjvkzxqjvk"], r"'zxqjvk\w+'", id="inside one word"),
])  # fmt: skip
def test_words_that_are_cut_off_are_named(written: list[str], named: str, tokenizer: Any) -> None:
    text, ranges = "a photograph of ", []
    for word in written:
        ranges.append((len(text), len(text) + len(word)))
        text += f"{word} and "
    prompt = Prompt(text, tuple(written), tuple(ranges))
    with pytest.raises(DataError, match=rf"^prompt: the words {named}.* are cut off, got \d+ tokens") as raised:
        tokenize(prompt, tokenizer, LENGTH)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("value", "expected"), [
    pytest.param("names", ("person", "potted plant", "unknown thing"), id="names"),
    pytest.param(None, ("person", "potted plant", "unknown thing"), id="nothing"),
    pytest.param("iseg", ("people", "potted plant", "unknown thing"), id="a preset"),
    pytest.param({"person": "human"}, ("human", "potted plant", "unknown thing"), id="a mapping"),
])  # fmt: skip
def test_words_of_classes(value: Any, expected: tuple[str, ...]) -> None:
    assert resolve_class_words(value, ("background", "person", "potted_plant", "unknown_thing")) == expected


@pytest.mark.parametrize(("value", "expected"), [
    pytest.param("none", (), id="none"),
    pytest.param("all", ("a b", "c"), id="all"),
    pytest.param(["c d"], ("c d",), id="a list"),
])  # fmt: skip
def test_head_words(value: Any, expected: tuple[str, ...]) -> None:
    assert resolve_head_words(value, ("a b", "c")) == expected


def test_background_words_of_coco_extend_those_of_voc() -> None:
    voc, coco = (resolve_background_words(name) for name in ("voc", "coco"))
    assert len(voc) == 9
    assert coco == (*voc, "river", "sea", "railway")
    assert set(BACKGROUND_WORDS) == {"none", "voc", "coco"}


@pytest.mark.parametrize(("call", "message"), [
    pytest.param(lambda: resolve_class_words("nope", ("background", "a")), "class_words: got 'nope'", id="words"),
    pytest.param(lambda: resolve_class_words({"b": "c"}, ("background", "a")), "got 'b', which is no", id="class"),
    pytest.param(lambda: resolve_class_words({"a": ""}, ("background", "a")), "got '' for 'a'", id="an empty word"),
    pytest.param(lambda: resolve_head_words("nope", ()), "head_words: got 'nope'", id="head words"),
    pytest.param(lambda: resolve_background_words("nope"), "background_words: got 'nope'", id="background"),
    pytest.param(lambda: resolve_background_words(["a", ""]), "expected words", id="an empty background word"),
    pytest.param(lambda: write_prompt({"a": "a"}, template="no place"), "template: got 'no place'", id="template"),
    pytest.param(lambda: write_prompt({}), "for 0 classes", id="no class"),
    pytest.param(lambda: Prompt("a", ("a",)), "expected one for each", id="ranges"),
    pytest.param(lambda: Prompt("a", ("a",), ((0, 2),)), r"got \(0, 2\) for 'a'", id="a range"),
])  # fmt: skip
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
