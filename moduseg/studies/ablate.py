"""Tables of experiments from one command: a grid of overrides, one run for each cell; equal runs are computed once.

A table is a file of `configs/table/`: `base` overrides for every run, `axes` (one column each: option -> overrides),
`replicates` (lists of overrides whose results are averaged) and `columns` (figures in the results of `evaluate`). A
`reference` names the option of an axis that the others are compared with, image by image over all replicates.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg.config import UNREADABLE, Config, compose, config_dir
from moduseg.config.command_keys import AblateOptions
from moduseg.config.construct import construct
from moduseg.errors import ConfigError
from moduseg.evaluation.bootstrap import bootstrap, paired_bootstrap
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.measures import (
    CLASSIFIER_FIGURES,
    MATCHED_FIGURES,
    PROPOSAL_FIGURES,
    Figure,
    read_path,
    single_measures,
)
from moduseg.evaluation.tables import find_supervision, mark_supervision, markdown_table, versions
from moduseg.files import digest_of, read_json, write_atomic, write_json
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import Progress
from moduseg.stages import evaluate
from moduseg.stages.discover import Discover
from moduseg.stages.predict_student import PredictStudent
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.stages.segment import Segment
from moduseg.studies.bank_vectors import VECTOR_FIGURES, measure_vectors
from moduseg.studies.costs import COST_FIGURES, measure_costs

FIGURES: dict[str, tuple[str, Figure]] = {
    **{measure.column: ("prediction", measure) for measure in single_measures()},
    **{end: ("prediction", Figure(name=f"miou_interval.{end}", title=end)) for end in ("low", "high")},
    **{f"pseudo-mask {measure.column}": ("pseudo_masks", measure) for measure in single_measures()},
    **{figure.column: ("proposals", figure) for figure in PROPOSAL_FIGURES},
    **{figure.column: ("classifier", figure) for figure in CLASSIFIER_FIGURES},
    **{figure.column: ("segments", figure) for figure in MATCHED_FIGURES},
}
"""Figures in the results of a stage: the part of them, and the figure in it."""
COLUMNS: dict[str, tuple[str, Figure]] = {
    **FIGURES,
    **{f"tagged {measure.column}": ("tagged", measure) for measure in single_measures()},
    **{column: ("costs", figure) for column, figure in COST_FIGURES.items()},
    **{column: ("vectors", figure) for column, figure in VECTOR_FIGURES.items()},
}
"""Columns that a grid may have: `FIGURES`, those of the generator's masks of the evaluated split, whose images' tags it
is given, costs, and how near the bank's vectors are to those of true masks."""
PARTS: dict[str, tuple[str, ...]] = {
    "evaluate": ("prediction", "pseudo_masks", "proposals", "classifier", "tagged", "costs", "vectors"),
    "segment": ("prediction",),
    "discover": ("segments",),
    "predict_student": ("prediction",),
}
"""What a run of a table may be -> the parts of its results, the one that says what was scored first."""
_SINGLE_PARTS: dict[str, Callable[[Config], Path]] = {
    "segment": Segment.run,
    "discover": Discover.run,
    "predict_student": PredictStudent.run,
}
"""Stages whose results have a single part, which they do not name."""
_PART_TITLES = {"prediction": "predictions", "pseudo_masks": "pseudo masks", "segments": "matched segments"}


@dataclass(frozen=True)
class Table:
    """A table of experiments, as its file describes it.

    Attributes:
        title: what it shows.
        base: overrides of every run.
        axes: axis -> option -> overrides, or -> a list of lists of overrides, whose results are averaged.
        replicates: lists of overrides; every cell is run with each list, and the results are averaged.
        columns: keys of `COLUMNS`.
        stage: what a run is: `evaluate` (a bank, searched), `segment` (words alone) and `predict_student` (a trained
            network), which have figures of predictions alone, or `discover` (no words), which has figures of matched
            segments alone.
        reference: axis -> option, for one axis or more: each row is compared with the row that has these options and
            its own on the other axes; none if omitted. Rows then also have the mIoU of one confusion matrix over the
            images of all their runs and its difference to the reference's, both with 95 % intervals over these images
            (paired draws; `moduseg.evaluation.bootstrap`).
    """

    title: str
    axes: Mapping[str, Any]
    base: list[str] = field(default_factory=list)
    replicates: list[Any] = field(default_factory=lambda: [[]])
    columns: list[str] = field(default_factory=lambda: ["mIoU"])
    stage: Literal["evaluate", "segment", "discover", "predict_student"] = "evaluate"
    reference: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [c for c in self.columns if c not in COLUMNS]
        if unknown:
            raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {', '.join(COLUMNS)}")
        if any(COLUMNS[column][0] not in PARTS[self.stage] for column in self.columns):
            allowed = " and ".join(_PART_TITLES.get(part, part) for part in PARTS[self.stage])
            raise ValueError(f"columns: got {', '.join(self.columns)}, expected figures of {allowed} for {self.stage}")
        if not self.axes or not all(isinstance(options, Mapping) and options for options in self.axes.values()):
            raise ValueError(f"axes: got {dict(self.axes)!r}, expected axis -> option -> overrides")
        if self.reference and self.stage != "evaluate":
            raise ValueError(f"reference: got one with stage {self.stage}, expected none; leave it out")
        if any(option not in self.axes.get(axis, {}) for axis, option in self.reference.items()):
            allowed = "; ".join(f"{axis}: {', '.join(options)}" for axis, options in self.axes.items())
            raise ValueError(f"reference: got {self.reference}, expected an axis and one of its options ({allowed})")
        for axis in self.reference:
            num_runs = {option: len(_as_alternatives(runs)) for option, runs in self.axes[axis].items()}
            if len(set(num_runs.values())) > 1:
                numbers = ", ".join(f"{option} {number}" for option, number in num_runs.items())
                raise ValueError(
                    f"reference: got options of {axis} with unequal numbers of runs ({numbers}), expected equal ones, "
                    "since runs are compared in pairs; leave it out"
                )


@dataclass(frozen=True)
class ScoredImages:
    """The images of a run.

    Attributes:
        ids: of the images.
        counts: `[n, 3, S]` int64 of `moduseg.evaluation.bootstrap.image_counts`.
    """

    ids: tuple[str, ...]
    counts: np.ndarray

    def select(self, wanted: Collection[str]) -> np.ndarray:
        """Return the counts of those images that are wanted, in the order of `ids`."""
        return self.counts[[image_id in wanted for image_id in self.ids]]


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


FOLDERS = {"ablate": "table", "methods": "methods", "reproduce": "reproduce"}
"""Command -> folder of `configs/` that holds its tables."""


def read_table(command: str, name: str) -> dict[str, Any]:
    """Read the content of a table's file without resolving its interpolations.

    Args:
        command: `ablate` (grids of `configs/table/`), `methods` (`configs/methods/`) or `reproduce` (the paper's
            tables, `configs/reproduce/`).
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
    cfg = compose([*table.base, *overrides])
    if table.reference and not cfg.evaluation.bootstrap:
        raise ConfigError(
            f"evaluation.bootstrap: got 0, expected 1 draw or more, as table {name} has intervals; try 1000"
        )
    cells = list(_expand_cells(table))
    with Progress(sum(len(runs) for _, runs in cells), f"table {name}", unit="run") as progress:
        results = [_run_cell(table, options, runs, overrides, progress) for options, runs in cells]
    rows = [row for row, _ in results]
    if table.reference:
        _compare_with_reference(table.reference, results, cfg)
    outputs = Path(cfg.runtime.outputs) / "tables"
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
) -> tuple[dict[str, Any], list[ScoredImages]]:
    """Run one cell of the grid: its row, and if the table has a reference the pixel counts of each run's images."""
    start = time.perf_counter()
    commands = [[*table.base, *cell_overrides, *overrides] for cell_overrides in runs]
    results, counts = [], []
    for command in commands:
        cfg = compose(["evaluation.report=false", *command])
        results.append(run_stage(table.stage, cfg, table.columns))
        if table.reference:
            counts.append(_read_counts(evaluate.run(cfg), results[-1]["prediction"]))
        progress.update()
    scored = results[0][PARTS[table.stage][0]]
    supervision = "+".join(dict.fromkeys(text for text in map(find_supervision, results) if text))
    row = {
        "options": dict(options),
        "runs": commands,
        "figures": {column: [read_figure(record, column) for record in results] for column in table.columns},
        **({"supervision": supervision} if supervision else {}),
        "images": scored["images"],
        "dataset": scored["dataset"],
        "split": scored["split"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    return row, counts


def _read_counts(folder: Path, record: Mapping[str, Any]) -> ScoredImages:
    """Return the images of a run of `evaluate`, whose prediction has `record`."""
    rule = record.get("uncovered", {}).get("rule")
    counts = SplitCounts.from_bytes((folder / FILE).read_bytes(), str(folder / FILE))
    of_labels = counts.label_counts(rule is None, "ignore" if rule == "ignore" else "wrong")
    return ScoredImages(tuple(counts.ids), of_labels)


def _compare_with_reference(
    reference: dict[str, str], results: Sequence[tuple[dict[str, Any], list[ScoredImages]]], cfg: Config
) -> None:
    """Add `all_images` to each row: its mIoU over the images of all runs, and the difference to its reference row's.

    The difference is that on the images that both have; `images` is their number where the row has others.
    """
    resamples, seed = cfg.evaluation.bootstrap, cfg.runtime.seed
    runs_by_options = {tuple(row["options"].values()): runs for row, runs in results}
    for row, runs in results:
        counts = np.concatenate([run.counts for run in runs])
        row["all_images"] = {"images": len(counts), "miou": asdict(bootstrap(counts, resamples, seed=seed))}
        if row["options"] == row["options"] | reference:
            continue
        pairs = list(zip(runs_by_options[tuple((row["options"] | reference).values())], runs, strict=True))
        first, second = (
            np.concatenate([pair[side].select({*pair[0].ids} & {*pair[1].ids}) for pair in pairs]) for side in (0, 1)
        )
        difference = asdict(paired_bootstrap(first, second, resamples, seed=seed))
        is_smaller = len(second) < max(len(counts), sum(len(other.ids) for other, _ in pairs))
        row["all_images"]["difference"] = {**difference, **({"images": len(second)} if is_smaller else {})}


def run_stage(stage: str, cfg: Config, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Run a stage, with what some columns need besides, and return its results by part.

    Args:
        stage: one of `PARTS`.
        cfg: the configuration.
        columns: keys of `COLUMNS`.
    """
    if stage != "evaluate":
        return {PARTS[stage][0]: read_json(_SINGLE_PARTS[stage](cfg) / "results.json")}
    work, parts = Workspace(cfg), {COLUMNS[column][0] for column in columns}
    path = evaluate.run(cfg, work)
    results = dict(read_json(path / "results.json"))
    if "costs" in parts:
        results["costs"] = measure_costs(path)
    if "tagged" in parts:
        results["tagged"] = read_json(PseudoMasks.run(cfg, work, work.eval_split) / "results.json")
    if "vectors" in parts:
        results["vectors"] = measure_vectors(cfg, work)
    return results


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
    """Return the value of a column in the results of a run by part; `None` where they lack it."""
    part, figure = COLUMNS[column]
    return read_path(record, (part, *figure.path))


def label_column(column: str) -> str:
    """Return the title of a column, with its unit where that is not percent."""
    return COLUMNS[column][1].label(column)


def _markdown(table: Table, rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [
            *_name_options(row),
            *(mean_cell(row["figures"][c], c) for c in table.columns),
            *_compared_cells(row),
            len(row["runs"]),
        ]
        for row in rows
    ]
    where = f"{rows[0]['dataset']} {rows[0]['split']}, {rows[0]['images']} images. "
    note = "Mean ± sample standard deviation where a row has several runs; percent."
    compared = []
    if table.reference:
        note += " In brackets the 95 % interval over the images of all runs, paired draws for differences."
        images = rows[0]["all_images"]["images"]
        compared = [f"mIoU of all {images} images", f"difference to {', '.join(table.reference.values())}"]
    header = [*table.axes, *(label_column(c) for c in table.columns), *compared, "runs"]
    return f"**{table.title}** {where}{note}\n\n{markdown_table(header, body)}"


def _compared_cells(row: Mapping[str, Any]) -> list[str]:
    """Return mIoU and difference of a row over all images, with their intervals; none without a reference."""
    if "all_images" not in row:
        return []
    miou, difference = row["all_images"]["miou"], row["all_images"].get("difference")
    cells = [f"{miou['value']:.1f} ({miou['low']:.1f} to {miou['high']:.1f})", "-"]
    if difference is not None:
        cells[1] = f"{difference['value']:+.1f} ({difference['low']:+.1f} to {difference['high']:+.1f})"
        cells[1] += f", {difference['images']} images" if "images" in difference else ""
    return cells


def _name_options(row: Mapping[str, Any]) -> list[str]:
    """Return the options of a row; the last one says so if a part of its runs was trained on masks."""
    *others, last = row["options"].values()
    return [*others, mark_supervision(last, row.get("supervision"))]


def mean_cell(values: Sequence[float | None], column: str, sign: str = "") -> str:
    """Return mean ± sample standard deviation of the runs that have a value, with the column's decimals.

    Args:
        values: of the runs.
        column: key of `COLUMNS`.
        sign: `+` shows a plus as well.
    """
    decimals = COLUMNS[column][1].decimals
    measured = [v for v in values if v is not None]
    if not measured:
        return "-"
    # Adding zero turns -0.0 into 0.0.
    spread = f" ± {stdev(measured):.{decimals}f}" if len(measured) > 1 else ""
    return f"{round(mean(measured), decimals) + 0:{sign}.{decimals}f}{spread}"
