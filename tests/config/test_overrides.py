"""Arguments of the command line: paths as they are typed, mistakes with the closest names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moduseg import backbones, datasets, proposers, pseudo_masks
from moduseg.config import compose, compose_hydra, config_dir
from moduseg.config.construct import _find_options_class
from moduseg.config.overrides import PATH_KEYS, quote_for_hydra
from moduseg.config.stored import reconfigure
from moduseg.errors import ConfigError

NAMES = ["Bilder_Größe", "photos (1)", "tag#1", "it's", "a&b", "x,y", "me@work", "日本", "${oc.env:HOME}", "[1]",
         "2024", "true", "a\\", 'say "a"', "{a: b}", "a: b", "\\${x}", "~", "???"]  # fmt: skip
"""Names of folders that YAML, Hydra or OmegaConf would read as something else."""
PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)
NO_PATHS = {
    "address", "background_separator", "background_words", "class_words", "closing", "device", "image_range",
    "instance_map", "merge_space", "model", "precision", "revision", "separator", "split", "template", "templates",
}  # fmt: skip
"""Keys that hold text which is a name or a word, never a file of one's own."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["dataset.root", "dataset.labels", "predictions", "runtime.outputs", "bank.path"])
def test_paths_are_taken_as_typed(key: str, name: str) -> None:
    assert get_plain(compose_hydra(["dataset=folder", f"{key}={name}"]), key) == name


def get_plain(cfg: Any, key: str) -> Any:
    """Return a resolved value without reading it as an interpolation again."""
    value: Any = OmegaConf.to_container(cfg, resolve=True)
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("text", ["'photos (1)'", '"photos (1)"'])
def test_quotes_around_a_path_are_dropped(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a folder has this very name."""
    monkeypatch.chdir(tmp_path)
    arguments = ["dataset=folder", f"dataset.root={text}"]
    assert compose(arguments).dataset["root"] == "photos (1)"
    (tmp_path / text).mkdir()
    assert compose(arguments).dataset["root"] == text


@given(PRINTABLE)
@settings(max_examples=20, deadline=None)
@example("${a}")
@example("a\\'b\\")
@example("\\\\${x}\\")
def test_any_printable_name_reaches_the_data_set(name: str) -> None:
    root = f"/data/{name}"
    assert compose(["dataset=folder", f"dataset.root={root}"]).dataset["root"] == root
    assert compose([f"predictions={root}"]).predictions == root
    assert compose([f"runtime.outputs={root}"]).dataset["root"].startswith(f"{root}/miniature/world-")
    stored = compose(["dataset=folder"]).as_dict()
    assert reconfigure(stored, [f"dataset.root={root}"]).dataset["root"] == root


@given(PRINTABLE)
@settings(max_examples=20, deadline=None)
@example("it's")
@example("a\\'b\\")
@example("\\${x}\\")
def test_quoted_names_come_back_from_hydra(name: str) -> None:
    root = f"/data/{name}"
    argument = quote_for_hydra(f"dataset.root={root}", is_multirun=False)
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        assert get_plain(hydra_compose("config", ["dataset=folder", argument]), "dataset.root") == root


@pytest.mark.parametrize(("argument", "is_multirun", "expected"), [
    pytest.param("dataset.root=a,b", True, "dataset.root=a,b", id="several values"),
    pytest.param("dataset.root=a,b", False, "dataset.root='a,b'", id="one value with a comma"),
    pytest.param("retrieval.top_k=1", False, "retrieval.top_k=1", id="no path"),
    pytest.param("--cfg", False, "--cfg", id="an option"),
    pytest.param("predictions=null", False, "predictions=null", id="nothing"),
])  # fmt: skip
def test_only_paths_are_quoted(argument: str, is_multirun: bool, expected: str) -> None:
    assert quote_for_hydra(argument, is_multirun=is_multirun) == expected


def test_every_text_key_is_a_path_or_a_word() -> None:
    """A new key that holds text has to be listed in one of the two tables."""
    registries = [datasets, proposers, backbones, pseudo_masks]
    tables = [value for module in registries for value in vars(module).values() if isinstance(value, dict)]
    classes = [entry for table in tables for entry in table.values() if isinstance(entry, type)]
    unlisted = set()
    for cls in (cls for cls in classes if cls.__module__.startswith("moduseg")):
        options = _find_options_class(cls) or cls
        hints = get_type_hints(options if dataclasses.is_dataclass(options) else options.__init__)
        unlisted |= {n for n, hint in hints.items() if hint in (str, str | None) and n not in {*PATH_KEYS, *NO_PATHS}}
    assert unlisted == set()


def test_other_values_are_read_as_yaml() -> None:
    cfg = compose(["retrieval.top_k=3", "retrieval.vote_temperature=null", "proposer=superpixels",
                   "proposer.scales=[5]", "proposer.weights=[1,1,1,1,1]",
                   "pseudo_masks.background={rule: power, value: 2}"])  # fmt: skip
    assert (cfg.retrieval.top_k, cfg.retrieval.vote_temperature) == (3, None)
    assert (cfg.proposer["scales"], cfg.proposer["weights"]) == ([5], [1, 1, 1, 1, 1])
    assert cfg.pseudo_masks.background.value == 2


@pytest.mark.parametrize(("overrides", "message"), [
    pytest.param(["bakcbone=x"], r"^bakcbone: unknown key; did you mean backbone\?$", id="a group"),
    pytest.param(["proposer@train_proposer=sum"], r"^proposer@train_proposer=sum: no such file in configs/proposer; "
                 r"did you mean sam", id="a file for another group"),
    pytest.param(["experiment=nothing_like_it"], r"no such file in configs/experiment; expected one of ade", id="far"),
    pytest.param(["bank.purify.iteration=3"], r"^bank\.purify\.iteration: unknown key; did you mean "
                 r"bank\.purify\.iterations\?$", id="two levels"),
    pytest.param(["retrieval.zzz=3"], r"^retrieval\.zzz: unknown key, expected one of retrieval\.top_k", id="no close"),
    pytest.param(["top_k=3"], r"^top_k: unknown key; did you mean retrieval\.top_k\?$", id="no group"),
    pytest.param(["seed=3"], r"^seed: unknown key; did you mean dataset\.seed, proposer\.seed, runtime\.seed\?$",
                 id="no group of several"),
    pytest.param(["bank.purify=false"], r"^bank\.purify: got False, expected keys below it: bank\.purify\.enabled, .*; "
                 r"set bank\.purify\.enabled=<value>$", id="a section"),
    pytest.param(["word"], r"^word: got no '=', expected key=value", id="a word"),
    pytest.param(["retrieval.top_k=("], r"^retrieval\.top_k: got '\(' \(str\), expected a whole number$", id="a value"),
    pytest.param(["retrieval.top_k=1,5"], r"^retrieval\.top_k: got '1,5'", id="several values"),
    pytest.param(["dataset.root=nowhere"], r"^dataset\.root: got 'nowhere' with dataset=miniature", id="a root"),
])  # fmt: skip
def test_mistakes_name_the_closest(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_null_leaves_an_optional_group_out() -> None:
    assert compose(["experiment=null", "proposer@train_proposer=null"]) == compose()
    assert compose(["train_proposer=null", "tagger=null"]) == compose()
