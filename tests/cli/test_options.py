"""Arguments of a command become its options dataclass and overrides of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moduseg.cli.options import describe_keys, parse
from moduseg.config.command_keys import PredictOptions
from moduseg.errors import ConfigError


@dataclass(frozen=True)
class Keys:
    """Keys of a command.

    Attributes:
        source: where to read,
            on two lines.
        class_: a name; `None` for none.
        count: how many.
        names: several.
        show: whether to show.
    """

    source: str
    class_: str | None = None
    count: int = 3
    names: tuple[str, ...] = ()
    show: bool = False


@pytest.mark.parametrize(("arguments", "settings", "options", "overrides"), [
    pytest.param(["source=a=b"], {}, Keys("a=b"), [], id="text as it is"),
    pytest.param(["source=a", "class=x"], {}, Keys("a", class_="x"), [], id="a key that Python reserves"),
    pytest.param(["source=a", "count=5", "show=true"], {}, Keys("a", count=5, show=True), [], id="other types"),
    pytest.param(["source=a", "show"], {}, Keys("a", show=True), [], id="a flag alone"),
    pytest.param(["source=a", "names=[x, y]"], {}, Keys("a", names=("x", "y")), [], id="a list"),
    pytest.param(["source=a", "names=x;y"], {}, Keys("a", names=("x", "y")), [], id="semicolons"),
    pytest.param(["a", "x"], {"words": ("source", "class")}, Keys("a", class_="x"), [], id="words in order"),
    pytest.param(["x;y", "z", "source=a"], {"words": ("names",), "repeated": ("names",)}, Keys("a", names=("x;y", "z")),
                 [], id="words that are left"),
    pytest.param(["source=a", "names=k=1", "names=k=2"], {"repeated": ("names",)}, Keys("a", names=("k=1", "k=2")), [],
                 id="repeated"),
    pytest.param(["source=a", "retrieval.top_k=3"], {}, Keys("a"), ["retrieval.top_k=3"], id="a group's key"),
    pytest.param(["source=a", "x=1", "+y=2"], {"accepts": "all"}, Keys("a"), ["x=1", "+y=2"], id="all overrides"),
])  # fmt: skip
def test_arguments_become_options(
    arguments: list[str], settings: dict[str, Any], options: Keys, overrides: list[str]
) -> None:
    assert parse(arguments, Keys, "command", **settings) == (options, overrides)


@pytest.mark.parametrize(("arguments", "accepts", "message"), [
    pytest.param([], "groups", r"^source: missing; set source=<value> for command$", id="missing"),
    pytest.param(["source=a", "source=b"], "groups", r"^source: given twice to command", id="given twice"),
    pytest.param(["source=a", "coumt=1"], "groups", r"^coumt: unknown key .* did you mean count\?$", id="misspelt"),
    pytest.param(["source=a", "xyz=1"], "groups", r"or a group of the configuration", id="unknown"),
    pytest.param(["source=a", "retrieval.top_k=3"], "none", r"unknown key of command.*remove it$", id="no overrides"),
    pytest.param(["source=a", "word"], "groups", r"^command: got 'word', expected key=value; keys are", id="a word"),
    pytest.param(["source=a", "count=many"], "all", r"^count: got 'many' \(str\), expected a whole", id="wrong type"),
])  # fmt: skip
def test_mistakes_name_the_key(arguments: list[str], accepts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(arguments, Keys, "command", accepts=accepts)


def test_keys_are_described_from_the_docstring() -> None:
    assert describe_keys(Keys) == [
        ("source=<text>", "where to read, on two lines."),
        ("class=<text|null> [null]", "a name; `null` for none."),
        ("count=<whole number> [3]", "how many."),
        ("names=<text;...> []", "several."),
        ("show=<true|false> [false]", "whether to show."),
    ]


@pytest.mark.parametrize("name", ["a;b", "[a,b]", " a ", "x=y"])
def test_existing_files_are_one_value(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    options, _ = parse(["bank=b", f"images={name}"], PredictOptions, "predict")
    assert options.images == (name,)
