"""The paper's tables as configurations: each row is, on each data set, a list of overrides and a published figure.

A table is a file of `configs/reproduce/`. Its keys are those of `PaperTable`, those of a row are those of `Row`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moduseg.config.construct import construct
from moduseg.errors import ConfigError
from moduseg.evaluation.published import PUBLISHED, TABLES, PublishedRow
from moduseg.studies.ablate import FIGURES, read_table

BASE: dict[str, list[str]] = {
    "voc": ["experiment=voc"],
    "coco": ["experiment=coco"],
    "ade20k": ["experiment=ade20k"],
    "cityscapes": ["experiment=cityscapes"],
    "miniature": [],
    "voc21": ["protocol=voc21"],
    "context60": ["protocol=context60"],
    "coco_object": ["protocol=coco_object"],
    "voc20": ["protocol=voc20"],
    "context59": ["protocol=context59"],
    "coco_stuff": ["protocol=coco_stuff"],
    "cityscapes27": ["protocol=cityscapes27_diffseg"],
    "coco_stuff27": ["protocol=coco_stuff27_diffseg"],
}
"""The data sets that a table may have, and the overrides every row starts from."""
FULL = ("voc", "coco")
"""What `full` means in a table: the data sets of the paper's ablations."""
PROTOCOLS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")
"""The open-vocabulary benchmarks, in the order in which tables show them."""
MINIATURE = "miniature"
"""The embedded world, which is no benchmark: its rows have published figures of `ORIENTATION` beside them."""
ORIENTATION = {"evaluate": "voc", "segment": "voc21", "discover": "cityscapes27", "predict_student": "voc"}
"""Stage of a table -> the benchmark whose figures stand beside the miniature's."""
SPLITS = {"mIoU": "val", "pseudo-mask mIoU": "train", "mIoU, matched by image": "val", "mIoU, matched by set": "val"}
"""Figures that a table may compare, and the split that the published ones belong to."""


@dataclass(frozen=True)
class Row:
    """A row of a table; it applies to the data sets that it has overrides for (`[]` is an empty list of them).

    Attributes:
        published: the method's name in the table of `moduseg.evaluation.published`, or data set -> name.
        kind: what the method had: whether it was trained, and on what; whether it was told an image's tags.
        protocols: overrides on the open-vocabulary benchmarks, `{set}` being the benchmark's name.
        all, full: overrides on VOC, COCO and the miniature; on VOC and COCO.
        voc, coco, ade20k, ...: overrides on this data set, after the others.
    """

    published: Any = None
    kind: str = ""
    protocols: list[str] | None = None
    all: list[str] | None = None
    full: list[str] | None = None
    voc: list[str] | None = None
    coco: list[str] | None = None
    ade20k: list[str] | None = None
    cityscapes: list[str] | None = None
    miniature: list[str] | None = None
    voc21: list[str] | None = None
    context60: list[str] | None = None
    coco_object: list[str] | None = None
    voc20: list[str] | None = None
    context59: list[str] | None = None
    coco_stuff: list[str] | None = None
    cityscapes27: list[str] | None = None
    coco_stuff27: list[str] | None = None

    def overrides(self, dataset: str) -> list[str] | None:
        """Return the overrides of this row for `dataset`; `None` if the row does not apply to it."""
        everywhere = self.all if dataset in (*FULL, MINIATURE) else None
        protocols = None
        if self.protocols is not None and dataset in PROTOCOLS:
            protocols = [override.replace("{set}", dataset) for override in self.protocols]
        parts = [everywhere, protocols, self.full if dataset in FULL else None, getattr(self, dataset)]
        present = [part for part in parts if part is not None]
        return [override for part in present for override in part] if present else None

    @property
    def is_quoted(self) -> bool:
        """Whether there is nothing to run: another method's figure, for the reader."""
        return all(getattr(self, f.name) is None for f in fields(self) if f.name not in ("published", "kind"))


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, as its file describes it.

    Attributes:
        title: what it shows.
        rows: name -> row, in the order shown.
        published: which of `moduseg.evaluation.published.TABLES`.
        stage: what a row runs: `evaluate` (a bank, searched), `segment` (words alone), `discover` (no words) or
            `predict_student` (a trained network).
        figure: key of `SPLITS` that the published figures are.
        further_splits: splits whose published figures are shown beside, in columns of their own (`test`).
        columns: more keys of `moduseg.studies.ablate.FIGURES`, ours alone.
        reference: the row that changes are counted from, or data set -> row.
        base: data set -> overrides that take the place of `BASE`.
        seeds: runs of a row, where the data set has a key in `replicate`.
        replicate: data set -> key that is set to 0, 1, ... in these runs.
        notes: data set -> sentences below the table.

    Wherever data sets are keys, `full` stands for VOC and COCO.
    """

    title: str
    rows: Mapping[str, Row]
    published: str
    stage: Literal["evaluate", "segment", "discover", "predict_student"] = "evaluate"
    figure: str = "mIoU"
    further_splits: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    reference: Any = None
    base: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    replicate: Mapping[str, Any] = field(default_factory=lambda: {"miniature": "dataset.seed"})
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: got none, expected name -> row")
        if self.published not in TABLES:
            raise ValueError(f"published: got {self.published!r}, expected one of {', '.join(TABLES)}")
        if self.figure not in SPLITS:
            raise ValueError(f"figure: got {self.figure!r}, expected one of {', '.join(SPLITS)}")
        if unknown := [column for column in self.columns if column not in FIGURES]:
            raise ValueError(f"columns: got {unknown[0]!r}, expected some of {', '.join(FIGURES)}")
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}, expected 1 or more")
        for name, value in (("base", self.base), ("replicate", self.replicate), ("notes", self.notes)):
            if wrong := [key for key in value if key not in (*BASE, "full")]:
                raise ValueError(f"{name}: got {wrong[0]!r}, expected some of full, {', '.join(BASE)}")
        self._check_rows()

    def _check_rows(self) -> None:
        methods = {row.method for row in PUBLISHED if row.table == self.published}
        for name, row in self.rows.items():
            asked = row.published.values() if isinstance(row.published, Mapping) else [row.published]
            if unknown := [method for method in asked if method is not None and method not in methods]:
                raise ValueError(
                    f"rows.{name}.published: got {unknown[0]!r}, expected one of {', '.join(sorted(methods))}"
                )
            if row.is_quoted and row.published is None:
                raise ValueError(f"rows.{name}: got neither overrides nor a published figure, expected one of them")
        for dataset in self.datasets:
            reference = pick(self.reference, dataset)
            if reference is not None and reference not in self.names(dataset):
                raise ValueError(
                    f"reference: got {reference!r}, expected a row of {dataset}: {', '.join(self.names(dataset))}"
                )

    @property
    def datasets(self) -> list[str]:
        """The data sets that have a row to run."""
        return [d for d in BASE if any(row.overrides(d) is not None for row in self.rows.values())]

    @property
    def published_on(self) -> list[str]:
        """The data sets that have a row to run with a published figure of their own."""
        benchmarks = [d for d in self.datasets if d != MINIATURE]
        return [d for d in benchmarks if any(self.figure_of(name, d) for name in self.names(d))]

    def names(self, dataset: str) -> list[str]:
        """Return the rows of a data set that can be run."""
        return [name for name, row in self.rows.items() if row.overrides(dataset) is not None]

    def figure_of(self, name: str, dataset: str, split: str | None = None) -> PublishedRow | None:
        """Return the published figure of a row; the miniature's rows have one for orientation.

        Args:
            name: of the row.
            dataset: one of `datasets`.
            split: whose figure is wanted; that of `figure` if omitted.
        """
        method = pick(self.rows[name].published, dataset)
        orientation = ORIENTATION[self.stage] if dataset == MINIATURE else dataset
        benchmark = f"{orientation}/{split or SPLITS[self.figure]}"
        wanted = (self.published, method, benchmark)
        return next((row for row in PUBLISHED if (row.table, row.method, row.benchmark) == wanted), None)

    def runs(self, name: str, dataset: str, seeds: int, overrides: Sequence[str] = ()) -> list[list[str]]:
        """Return the overrides of each run of a row: the table's, the user's, the row's; of equal keys the last counts.

        Args:
            name: of the row.
            dataset: one of `datasets`.
            seeds: number of runs, where the data set has a key to repeat a run by; otherwise there is one.
            overrides: the user's.
        """
        base = pick(dict(self.base), dataset) or BASE[dataset]
        row = self.rows[name].overrides(dataset) or []
        key = pick(dict(self.replicate), dataset)
        if key is None:
            return [merge(base, overrides, row)]
        return [merge(base, overrides, row, [f"{key}={seed}"] if seeds > 1 else []) for seed in range(seeds)]


def load_paper_table(name: str) -> PaperTable:
    """Load the table that `configs/reproduce/<name>.yaml` describes.

    Raises:
        ConfigError: no such table, or a key or a value that tables do not have.
    """
    content = read_table("reproduce", name)
    rows = content.get("rows")
    if not isinstance(rows, Mapping):
        raise ConfigError(f"table {name}.rows: got {rows!r}, expected name -> row; correct the file")
    content["rows"] = {
        str(row): construct(Row, {str(k): v for k, v in (settings or {}).items()}, f"table {name}.rows.{row}")
        for row, settings in rows.items()
    }
    return construct(PaperTable, content, f"table {name}")


def merge(*parts: Sequence[str]) -> list[str]:
    """Return all overrides in order; of those with equal keys only the last one stays."""
    merged: dict[str, str] = {}
    for override in (override for part in parts for override in part):
        key = override.partition("=")[0].lstrip("+")
        merged.pop(key, None)
        merged[key] = override
    return list(merged.values())


def pick(value: Any, dataset: str) -> Any:
    """Return a value for a data set, from one value for all or a mapping by data set; `None` if there is none."""
    if not isinstance(value, Mapping):
        return value
    return value.get(dataset, value.get("full") if dataset in FULL else None)
