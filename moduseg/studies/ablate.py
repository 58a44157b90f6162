"""Tables of experiments from one command: a grid of overrides, one run for each cell; equal runs are computed once.

A table is a file of `configs/table/`: `base` overrides for every run, `axes` (one column each: option -> overrides),
`replicates` (lists of overrides whose results are averaged) and `columns` (figures in the results of `evaluate`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg.config import UNREADABLE, Config, compose, config_dir
from moduseg.config.command_keys import AblateOptions
from moduseg.config.construct import construct
from moduseg.errors import ConfigError
from moduseg.evaluation.measures import PROPOSAL_FIGURES, Figure, read_path, single_measures
from moduseg.evaluation.tables import markdown_table, versions
from moduseg.files import digest_of, read_json, write_atomic, write_json
from moduseg.pipeline.workspace import log
from moduseg.progress import Progress
from moduseg.stages import evaluate
from moduseg.stages.segment import Segment

FIGURES: dict[str, tuple[str, Figure]] = {
    **{measure.column: ("prediction", measure) for measure in single_measures()},
    **{end: ("prediction", Figure(name=f"miou_interval.{end}", title=end)) for end in ("low", "high")},
    **{f"pseudo-mask {measure.column}": ("pseudo_masks", measure) for measure in single_measures()},
    **{figure.column: ("proposals", figure) for figure in PROPOSAL_FIGURES},
}
"""Columns that a table may have: the part of the results of `evaluate`, and the figure in it."""


@dataclass(frozen=True)
class Table:
    """A table of experiments, as its file describes it.

    Attributes:
        title: what it shows.
        base: overrides of every run.
        axes: axis -> option -> overrides, or -> a list of lists of overrides, whose results are averaged.
        replicates: lists of overrides; every cell is run with each list, and the results are averaged.
        columns: keys of `FIGURES`.
        stage: what a run is: `evaluate` (a bank, searched) or `segment` (words alone), which has figures of predictions
            alone.
    """

    title: str
    axes: Mapping[str, Any]
    base: list[str] = field(default_factory=list)
    replicates: list[Any] = field(default_factory=lambda: [[]])
    columns: list[str] = field(default_factory=lambda: ["mIoU"])
    stage: Literal["evaluate", "segment"] = "evaluate"

    def __post_init__(self) -> None:
        unknown = [c for c in self.columns if c not in FIGURES]
        if unknown:
            raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {', '.join(FIGURES)}")
        if self.stage == "segment" and any(FIGURES[column][0] != "prediction" for column in self.columns):
            raise ValueError(f"columns: got {', '.join(self.columns)}, expected figures of predictions for segment")
        if not self.axes or not all(isinstance(options, Mapping) and options for options in self.axes.values()):
            raise ValueError(f"axes: got {dict(self.axes)!r}, expected axis -> option -> overrides")


def main(options: AblateOptions, overrides: Sequence[str]) -> int:
    """Make a table and print it; the overrides go to every run."""
    print(run(options.table, overrides).read_text(encoding="utf-8"))
    return 0


def load_table(name: str) -> Table:
    """Load the table that `configs/table/<name>.yaml` describes.

    Raises:
        ConfigError: no such table, or a key that tables do not have.
    """
    return construct(Table, read_table("ablate", name), f"table {name}")


FOLDERS = {"ablate": "table", "reproduce": "reproduce"}
"""Command -> folder of `configs/` that holds its tables."""


def read_table(command: str, name: str) -> dict[str, Any]:
    """Read the content of a table's file without resolving its interpolations.

    Args:
        command: `ablate` (grids of `configs/table/`) or `reproduce` (the paper's tables, `configs/reproduce/`).
        name: of the file.

    Raises:
        ConfigError: no such table, or a file that is no mapping.
    """
    folder = config_dir() / FOLDERS[command]
    path = folder / f"{name}.yaml"
    if "/" in name or not path.is_file():
        owners = [c for c, f in FOLDERS.items() if "/" not in name and (folder.parent / f / path.name).is_file()]
        remedy = f"scripts/{owners[0]}.py table={name}" if owners else f"scripts/{command}.py table=<name>"
        allowed = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"table: got {name!r}, expected one of {allowed}; try: python {remedy}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, *UNREADABLE) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; correct the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected keys such as title; correct the file")
    return {str(key): value for key, value in content.items()}


def run(name: str, overrides: Sequence[str] = ()) -> Path:
    """Run every cell of a table and write it.

    Args:
        name: of a file in `configs/table/`.
        overrides: for every run, after the table's own.

    Returns:
        The Markdown file `<outputs>/tables/<name>.md`, with `<name>.json` beside it. With overrides (other than
        `runtime.outputs`) `<name>-<key8>` stands for `<name>`: the key hashes them, and the table without them stays.
    """
    table = load_table(name)
    cells = list(_expand_cells(table))
    with Progress(sum(len(runs) for _, runs in cells), f"table {name}", unit="run") as progress:
        rows = [_run_cell(table, options, runs, overrides, progress) for options, runs in cells]
    outputs = Path(compose([*table.base, *overrides]).runtime.outputs) / "tables"
    changes = [override for override in overrides if not override.startswith("runtime.outputs=")]
    stem = f"{name}-{digest_of(changes)[:8]}" if changes else name
    record = {"title": table.title, "table": name, "overrides": list(overrides), "rows": rows, "versions": versions()}
    write_json(outputs / f"{stem}.json", record)
    text = _markdown(table, rows)
    write_atomic(outputs / f"{stem}.md", text.encode())
    log.info("%s\ntable -> %s", text.rstrip(), outputs / f"{stem}.md")
    return outputs / f"{stem}.md"


def _run_cell(
    table: Table, options: Mapping[str, str], runs: Sequence[list[str]], overrides: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Run one cell of the grid and return its row."""
    start = time.perf_counter()
    commands = [[*table.base, *cell_overrides, *overrides] for cell_overrides in runs]
    results = []
    for command in commands:
        results.append(run_stage(table.stage, compose(["evaluation.report=false", *command])))
        progress.update()
    return {
        "options": dict(options),
        "runs": commands,
        "figures": {column: [read_figure(record, column) for record in results] for column in table.columns},
        "images": results[0]["prediction"]["images"],
        "dataset": results[0]["prediction"]["dataset"],
        "split": results[0]["prediction"]["split"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_stage(stage: str, cfg: Config) -> dict[str, Any]:
    """Run `evaluate` or `segment` and return its results by part; those of `segment` are of predictions alone."""
    if stage == "evaluate":
        return dict(read_json(evaluate.run(cfg) / "results.json"))
    return {"prediction": read_json(Segment.run(cfg) / "results.json")}


def _expand_cells(table: Table) -> Iterator[tuple[dict[str, str], list[list[str]]]]:
    """Yield the options of each row with the overrides of its runs."""
    for choice in itertools.product(*(options.items() for options in table.axes.values())):
        alternatives = [[list(o) for o in _as_alternatives(overrides)] for _, overrides in choice]
        runs = [
            [override for part in parts for override in part]
            for parts in itertools.product(*alternatives, [list(r) for r in table.replicates])
        ]
        yield dict(zip(table.axes, (option for option, _ in choice), strict=True)), runs


def _as_alternatives(overrides: Any) -> list[list[str]]:
    """Return a list of runs: `[a, b]` is one run, `[[a], [b]]` is two runs whose results are averaged."""
    entries = list(overrides or [])
    return entries if entries and all(isinstance(e, list) for e in entries) else [entries]


def read_figure(record: Mapping[str, Any], column: str) -> float | None:
    """Return the value of a column in the results of `evaluate`; `None` where they lack it."""
    part, figure = FIGURES[column]
    return read_path(record, (part, *figure.path))


def label_column(column: str) -> str:
    """Return the title of a column, with its unit where that is not percent."""
    return FIGURES[column][1].label(column)


def _markdown(table: Table, rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [*row["options"].values(), *(mean_cell(row["figures"][c], c) for c in table.columns), len(row["runs"])]
        for row in rows
    ]
    where = f"{rows[0]['dataset']} {rows[0]['split']}, {rows[0]['images']} images. "
    note = "Mean ± sample standard deviation where a row has several runs; percent."
    header = [*table.axes, *(label_column(c) for c in table.columns), "runs"]
    return f"**{table.title}** {where}{note}\n\n{markdown_table(header, body)}"


def mean_cell(values: Sequence[float | None], column: str, sign: str = "") -> str:
    """Return mean ± sample standard deviation of the runs that have a value, with the column's decimals.

    Args:
        values: of the runs.
        column: key of `FIGURES`.
        sign: `+` shows a plus as well.
    """
    decimals = FIGURES[column][1].decimals
    measured = [v for v in values if v is not None]
    if not measured:
        return "-"
    # Adding zero turns -0.0 into 0.0.
    spread = f" ± {stdev(measured):.{decimals}f}" if len(measured) > 1 else ""
    return f"{round(mean(measured), decimals) + 0:{sign}.{decimals}f}{spread}"
