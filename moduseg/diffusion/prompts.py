"""Prompts of text-to-image models: what is written, which tokens stand for which class, and what weighs more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moduseg.errors import DataError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

EMPHASIS = 1.1
"""Each `+` behind a word multiplies its weight by this, as prompts of Stable Diffusion are commonly written."""

_SCENERY = ("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water")
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "voc": _SCENERY,
    "coco": (*_SCENERY, "river", "sea", "railway"),
}
"""Words for what is behind the classes, by data set, as iSeg (Sun et al., 2024) writes them into its prompts."""

HEAD_WORDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "iseg": (
        "potted plant", "tv monitor", "traffic light", "fire hydrant", "baseball bat", "baseball glove",
        "tennis racket", "wine glass",
    ),
}  # fmt: skip
"""Names of which iSeg reads the last word alone; `none` reads all words of every name."""

CLASS_WORDS: dict[str, dict[str, str]] = {
    "names": {},
    "iseg": {
        "person": "people", "aeroplane": "plane", "airplane": "plane", "diningtable": "dining table",
        "pottedplant": "potted plant", "tvmonitor": "tv monitor", "tv": "tv monitor", "motorcycle": "motorbike",
        "couch": "sofa",
    },
    "diffsegmenter": {
        "aeroplane": "plane", "bus": "buses", "diningtable": "table", "person": "people", "pottedplant": "plant",
        "tvmonitor": "monitor",
    },
}  # fmt: skip
"""Words that stand for a class in place of its name, by system: what their public code writes into the prompts."""


@dataclass(frozen=True)
class Prompt:
    """A text and the words in it that are looked for.

    Attributes:
        text: what the text encoder reads.
        names: what is looked for, for messages: names of classes.
        ranges: `(start, end)` characters of `text` that stand for each of `names`, end exclusive.
        weight: how much the tokens of all of them weigh (`AttentionSource.encode_prompts`); 1 is as written.
    """

    text: str
    names: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ranges):
            raise ValueError(f"ranges: got {len(self.ranges)}, expected one for each of {len(self.names)} names")
        for name, (start, end) in zip(self.names, self.ranges, strict=True):
            if not 0 <= start < end <= len(self.text):
                raise ValueError(f"ranges: got {(start, end)} for {name!r}, expected characters of {self.text!r}")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder reads it: `L` tokens with start, end and padding.

    Attributes:
        ids: `L` ids of tokens.
        spans: ascending positions of the tokens that stand for each name of the prompt.
        weights: `L` factors; 1 for a token that weighs as written.
        content: ascending positions of all tokens of the text, without start, end and padding.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    content: tuple[int, ...]


def write_prompt(
    words: Mapping[str, str],
    *,
    template: str = "a photograph of {}",
    separator: str = " and ",
    suffix: str = "",
    head_words: Sequence[str] = (),
    num_pluses: int = 0,
) -> Prompt:
    """Return a prompt that names some classes.

    Args:
        words: what is written for each class, by the class's name; at least one.
        template: with one `{}`, where the words of all classes are put.
        separator: between classes.
        suffix: appended to the filled template.
        head_words: words (as written) of which the last one alone stands for the class: `plant` of `potted plant`.
        num_pluses: `+` signs behind what stands for a class: each multiplies its weight by `EMPHASIS`. The text does
            not show them.

    Raises:
        ValueError: no class, or a template without `{}`.
    """
    if not words or template.count("{}") != 1:
        raise ValueError(f"template: got {template!r} for {len(words)} classes, expected one {{}} and a class or more")
    before, after = template.split("{}")
    text, ranges = before, []
    for number, word in enumerate(words.values()):
        text += separator if number else ""
        skipped = word.rstrip().rfind(" ") + 1 if word in head_words else 0
        ranges.append((len(text) + skipped, len(text) + len(word)))
        text += word
    return Prompt(text + after + suffix, tuple(words), tuple(ranges), EMPHASIS**num_pluses)


def tokenize(prompt: Prompt, tokenizer: CLIPTokenizer, length: int) -> TokenizedPrompt:
    """Return a prompt's tokens, padded or cut off to what the text encoder takes.

    Args:
        prompt: the text; what lies behind the last token that fits is not read.
        tokenizer: splits it, and says which characters each token stands for.
        length: tokens that the text encoder takes, with start and end.

    Raises:
        DataError: words of a class are cut off, or the tokenizer knows nothing of them.
    """
    encoded = tokenizer(
        prompt.text, padding="max_length", truncation=True, max_length=length, return_offsets_mapping=True
    )
    offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    content = [position for position, (start, end) in enumerate(offsets) if start < end]
    last = max((offsets[position][1] for position in content), default=0)
    spans = []
    for name, (start, end) in zip(prompt.names, prompt.ranges, strict=True):
        span = tuple(p for p in content if offsets[p][0] < end and offsets[p][1] > start)
        words = prompt.text[start:end]
        if not span or last < start + len(words.rstrip()):
            num_tokens = len(tokenizer(prompt.text)["input_ids"])
            raise DataError(
                f"prompt: the words {words!r} of {name!r} are cut off, got {num_tokens} tokens, expected at most "
                f"{length}; shorten the template, the background words or the caption, or look for fewer classes"
            )
        spans.append(span)
    sought = {position for span in spans for position in span}
    weights = tuple(prompt.weight if position in sought else 1.0 for position in range(length))
    return TokenizedPrompt(tuple(map(int, encoded["input_ids"])), tuple(spans), weights, tuple(content))


def resolve_background_words(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return a preset's background words, or the caller's own; there may be none.

    Raises:
        ValueError: an unknown preset, or an empty word.
    """
    if isinstance(value, str):
        value = BACKGROUND_WORDS[_check_preset("background_words", value, BACKGROUND_WORDS)]
    words = tuple(value)
    if not all(words):
        raise ValueError(f"background_words: got {list(words)}, expected words; remove the empty ones")
    return words


def resolve_head_words(value: str | Sequence[str], class_words: Sequence[str]) -> tuple[str, ...]:
    """Return the words whose last one alone stands for the class.

    Args:
        value: a preset, `all`, or words.
        class_words: what is written for the classes, for `all`.

    Raises:
        ValueError: an unknown preset.
    """
    if value == "all":
        return tuple(class_words)
    if not isinstance(value, str):
        return tuple(value)
    return HEAD_WORDS[_check_preset("head_words", value, (*HEAD_WORDS, "all"))]


def resolve_class_words(value: str | Mapping[str, str] | None, classes: Sequence[str]) -> tuple[str, ...]:
    """Return what is written for each foreground class, in the order of ids.

    Args:
        value: a preset, or a mapping from class names to words; a class that is not in it goes by its name, underscores
            read as spaces. `None` is the preset `names`.
        classes: class names, background first.

    Raises:
        ValueError: an unknown preset, a name that is no class, or a class without a word.
    """
    if isinstance(value, str) or value is None:
        # A preset lists what differs; it serves data sets with some of its classes as well.
        words: Mapping[str, str] = CLASS_WORDS[_check_preset("class_words", value or "names", CLASS_WORDS)]
    else:
        words = value
        if unknown := [name for name in words if name not in classes[1:]]:
            raise ValueError(
                f"class_words: got {unknown[0]!r}, which is no class; expected some of {', '.join(classes[1:])}"
            )
    chosen = [words.get(name, name.replace("_", " ")) for name in classes[1:]]
    for name, word in zip(classes[1:], chosen, strict=True):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"class_words: got {word!r} for {name!r}, expected one text")
    return tuple(chosen)


def _check_preset(name: str, value: str, presets: Collection[str]) -> str:
    """Return the name of a preset, which has to exist; `name` is that of the setting, for messages."""
    if value not in presets:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(presets)}, or your own")
    return value
