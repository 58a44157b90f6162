"""The table of all methods as a configuration: which methods, in which forms, on which data sets.

A table is a file of `configs/methods/`. Its keys are those of `MethodTable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moduseg.config import Config
from moduseg.config.construct import construct
from moduseg.errors import ConfigError, suggest
from moduseg.evaluation.published import PUBLISHED, PublishedRow
from moduseg.studies.ablate import read_table
from moduseg.studies.paper_tables import merge

DATASETS = ("miniature", "voc", "coco")
"""The data sets that a table may have."""
SCORED = {
    "train": {"voc": "voc/train", "coco": "coco/train"},
    "val": {"voc": "voc/val", "coco": "coco/val"},
    "words": {"voc": "voc21/val", "coco": "coco_object/val"},
}
"""What a published figure was scored on -> data set -> benchmark; `words`: val, without tags."""
SEED = "dataset.seed"
"""What the worlds of the embedded data set differ in."""
_OPTIONAL_PARTS = ("student.", "pseudo_masks.generator.")
"""Beginnings of keys that some rows have and others have not."""


@dataclass(frozen=True)
class Form:
    """One way to make label maps of a method.

    Attributes:
        stage: what runs: `pseudo_masks` (of both splits), `infer` or `predict_student`.
        overrides: what the form is about, which nothing else replaces.
        miniature, voc, coco: overrides on this data set, which the user's replace.
    """

    stage: Literal["pseudo_masks", "infer", "predict_student"]
    overrides: list[str] = field(default_factory=list)
    miniature: list[str] = field(default_factory=list)
    voc: list[str] = field(default_factory=list)
    coco: list[str] = field(default_factory=list)

    @property
    def needs_tags(self) -> bool:
        """Whether the tags of the pictures that are labelled have to be given."""
        return self.stage == "pseudo_masks"


@dataclass(frozen=True)
class Method:
    """A generator of masks.

    Attributes:
        parts: what it is made of, for the reader.
        published: form -> table and method of `moduseg.evaluation.published`, and a key of `SCORED`.
        miniature, voc, coco: overrides on this data set; `None` where the method has none.
    """

    parts: str = ""
    published: Mapping[str, list[str]] = field(default_factory=dict)
    miniature: list[str] | None = None
    voc: list[str] | None = None
    coco: list[str] | None = None

    def find_published(self, form: str, dataset: str) -> PublishedRow | None:
        """Return the published figure of a form on a data set; that of VOC stands beside the miniature's."""
        if form not in self.published:
            return None
        table, method, scored = self.published[form]
        benchmark = SCORED[scored]["coco" if dataset == "coco" else "voc"]
        wanted = (table, method, benchmark)
        return next((row for row in PUBLISHED if (row.table, row.method, row.benchmark) == wanted), None)


@dataclass(frozen=True)
class MethodTable:
    """A table of methods, as its file describes it.

    Attributes:
        title: what it shows.
        forms: name -> form, each made of the one before.
        methods: name -> method.
        base: data set -> overrides of every run.
        worlds: seeds of the embedded data set, in the order in which they are taken.
        notes: sentences below the table.
    """

    title: str
    forms: Mapping[str, Form]
    methods: Mapping[str, Method]
    base: Mapping[str, list[str]] = field(default_factory=dict)
    worlds: list[int] = field(default_factory=lambda: [0])
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.forms or not self.methods or not self.worlds:
            raise ValueError("forms, methods, worlds: got an empty one, expected one entry or more of each")
        if len(set(self.worlds)) < len(self.worlds):
            raise ValueError(f"worlds: got {self.worlds}, expected each once")
        if unknown := [key for key in self.base if key not in DATASETS]:
            raise ValueError(f"base: got {unknown[0]!r}, expected some of {', '.join(DATASETS)}")
        for name, method in self.methods.items():
            for form, entry in method.published.items():
                if form not in self.forms or len(entry) != 3 or entry[2] not in SCORED:
                    raise ValueError(
                        f"methods.{name}.published.{form}: got {entry}, expected a form of the table with [table, "
                        f"method, one of {', '.join(SCORED)}]"
                    )
                if method.find_published(form, "voc") is None:
                    raise ValueError(f"methods.{name}.published.{form}: got {entry}, which no paper's table has on VOC")

    def names(self, dataset: str) -> list[str]:
        """Return the methods that a data set has."""
        return [name for name, method in self.methods.items() if getattr(method, dataset) is not None]

    def choose(self, dataset: str, wanted: Sequence[str]) -> list[str]:
        """Return the methods to run, in the table's order; all that the data set has if none is named.

        Raises:
            ConfigError: a method that the data set does not have.
        """
        names = self.names(dataset)
        for name in wanted:
            if name not in names:
                close = suggest(name, names)
                raise ConfigError(
                    f"methods: got {name!r}, expected some of {', '.join(names)} on {dataset}"
                    + (f"; did you mean {close}?" if close else "; leave it out for all")
                )
        return [name for name in names if not wanted or name in wanted]

    def list_overrides(
        self, method: str, form: str, dataset: str, overrides: Sequence[str] = (), world: int | None = None
    ) -> list[str]:
        """Return the overrides of one run; of equal keys the last counts.

        Args:
            method: one of `names(dataset)`.
            form: one of `forms`.
            dataset: one of `DATASETS`.
            overrides: the user's.
            world: seed of the embedded data set; as the configuration has it if omitted.
        """
        chosen = self.forms[form]
        return merge(
            self.base.get(dataset, []),
            getattr(chosen, dataset),
            getattr(self.methods[method], dataset) or [],
            overrides,
            chosen.overrides,
            [] if world is None else [f"{SEED}={world}"],
        )


def load_method_table(name: str) -> MethodTable:
    """Load the table that `configs/methods/<name>.yaml` describes.

    Raises:
        ConfigError: no such table, or a key or a value that tables do not have.
    """
    content = read_table("methods", name)
    for key, cls in (("forms", Form), ("methods", Method)):
        entries = content.get(key)
        if not isinstance(entries, Mapping):
            raise ConfigError(f"table {name}.{key}: got {entries!r}, expected name -> settings; correct the file")
        content[key] = {
            str(entry): construct(cls, {str(k): v for k, v in (settings or {}).items()}, f"table {name}.{key}.{entry}")
            for entry, settings in entries.items()
        }
    return construct(MethodTable, content, f"table {name}")


def check_overrides(table: MethodTable, dataset: str, overrides: Sequence[str]) -> None:
    """Raise unless every override is one that the table leaves to the user.

    Args:
        table: the table.
        dataset: one of `DATASETS`.
        overrides: the user's.

    Raises:
        ConfigError: one that replaces what rows are about: the generator, a key that a form sets, the world.
    """
    owners = {"pseudo_masks": "methods=[<names>]"}
    owners |= {read_key(each): "table=<file>" for form in table.forms.values() for each in form.overrides}
    if dataset == "miniature":
        owners[SEED] = "worlds=<number>"
    for override in overrides:
        key = read_key(override)
        if key in owners:
            raise ConfigError(
                f"{key}: got {override!r}, expected none, since rows of the table differ in it; leave it out, or try "
                f"{owners[key]}"
            )


def select_fitting(overrides: Sequence[str], cfg: Config) -> list[str]:
    """Return the overrides that a run has a place for, so that one command line serves rows with different parts.

    Args:
        overrides: the user's.
        cfg: the run without them. Keys of a student and of a generator are left out where it has no such key; a student
            that is named is left out where it has none.
    """
    content = cfg.as_dict()
    return [override for override in overrides if _fits(override, content)]


def is_optional(override: str) -> bool:
    """Return whether some rows have no place for an override: one of a student or of a generator."""
    key = read_key(override)
    return key == "student" or key.startswith(_OPTIONAL_PARTS)


def _fits(override: str, content: Mapping[str, Any]) -> bool:
    """Return whether a configuration has the key of an override that is optional; others fit everywhere."""
    if not is_optional(override):
        return True
    if read_key(override) == "student":
        return content.get("student") is not None
    value: Any = content
    for part in read_key(override).split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def read_key(override: str) -> str:
    """Return the key of an override, without a sign."""
    return override.partition("=")[0].lstrip("+~")
