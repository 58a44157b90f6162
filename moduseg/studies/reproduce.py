"""The paper's tables from one command: published, ours, difference; rows that lack data or weights say so.

`python scripts/reproduce.py table=<name> [dataset=<data set>] [row=<name>] [seeds=<n>] [key=value ...]`
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from moduseg.config import Config, compose
from moduseg.config.command_keys import ReproduceOptions
from moduseg.errors import ConfigError, MissingError, ModusegError, StorageError
from moduseg.evaluation.tables import find_supervision, versions
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import Progress
from moduseg.stages import evaluate
from moduseg.stages.discover import Discover
from moduseg.stages.predict_student import PredictStudent
from moduseg.stages.segment import Segment
from moduseg.stages.train_student import TrainStudent
from moduseg.studies.ablate import FIGURES, PARTS, read_figure
from moduseg.studies.paper_markdown import PaperMarkdown
from moduseg.studies.paper_tables import BASE, MINIATURE, SPLITS, PaperTable, load_paper_table, pick

RUNS: dict[str, Callable[[Config], Path]] = {
    "evaluate": evaluate.run,
    "segment": Segment.run,
    "discover": Discover.run,
    "predict_student": PredictStudent.run,
}
"""What a row of a table runs, by the table's `stage`."""
ALIASES = {"voc_aug": "voc", "coco2014": "coco"}
"""Other configurations of a data set -> its name in tables."""


def main(options: ReproduceOptions, overrides: Sequence[str]) -> int:
    """Make a table of the paper and print it, or the commands of its rows.

    Returns:
        0 if every row was run or lacks data or weights, 1 if one failed or left images out.
    """
    if options.show:
        print("\n".join(list_commands(options.table, options.dataset)))
        return 0
    tables = run(options, overrides)
    for path in tables.paths:
        print(path.read_text(encoding="utf-8"))
    print("written: " + ", ".join(str(path) for path in tables.paths))
    return 1 if tables.num_failed else 0


@dataclass(frozen=True)
class WrittenTables:
    """What a call of `run` wrote.

    Attributes:
        paths: the Markdown files `<outputs>/tables/<table>-<data set>.md`, each with its `.json`.
        num_failed: rows that broke off or left images out, for another reason than missing data or weights.
    """

    paths: list[Path]
    num_failed: int


def run(options: ReproduceOptions, overrides: Sequence[str] = ()) -> WrittenTables:
    """Run the rows of a table of the paper and write it, again after each row.

    One row alone is written to a file of its own.

    Args:
        options: what to run.
        overrides: for every run; what a row is about stays as the row has it.

    Raises:
        ConfigError: no such table, row or data set, or an override that does not fit.
        StorageError: nothing can be written any more.
    """
    table, seeds = load_paper_table(options.table), options.seeds
    datasets = _choose_datasets(table, options)
    if options.row is not None:
        table = replace(table, rows={options.row: table.rows[options.row]}, reference=None)
    repeated = [d for d in datasets if pick(dict(table.replicate), d) is not None]
    if seeds is not None and (seeds < 1 or (seeds > 1 and not repeated)):
        limits = "1 or more" if repeated else f"1 on {', '.join(datasets)}, where nothing is drawn by a seed"
        raise ConfigError(f"seeds: got {seeds}, expected {limits}; leave it out")
    all_overrides = [*([f"dataset={options.dataset}"] if options.dataset in ALIASES else []), *overrides]
    runs = [TableRun(table, options, d, all_overrides) for d in datasets]
    # Every mistake in the configuration comes before the first run.
    jobs = [(table_run, table_run.configurations()) for table_run in runs]
    with Progress(sum(len(rows) for _, rows in jobs), f"table {options.table}", unit="row") as progress:
        for table_run, rows in jobs:
            table_run.write()
            for row, cfgs in rows:
                table_run.run_row(row, cfgs)
                table_run.write()
                progress.update()
    return WrittenTables([table_run.path for table_run in runs], sum(table_run.num_failed for table_run in runs))


def _choose_datasets(table: PaperTable, options: ReproduceOptions) -> list[str]:
    """Return the data sets to run a table on; errors as `run`."""
    name, dataset, row = options.table, options.dataset, options.row
    wanted, allowed = ALIASES.get(dataset or "", dataset), table.datasets
    if wanted is not None and wanted not in allowed:
        raise ConfigError(f"dataset: got {dataset!r}, expected one of {', '.join(allowed)} for table {name}")
    datasets = [wanted] if wanted else table.published_on
    if row is None:
        return datasets
    chosen = [d for d in datasets if row in table.names(d)]
    if not chosen:
        places = [wanted] if wanted else allowed
        rows = [r for r in table.rows if any(r in table.names(d) for d in places)]
        raise ConfigError(f"row: got {row!r}, expected one of {', '.join(map(repr, rows))} of table {name}")
    return chosen


class TableRun:
    """One table on one data set, run and written row by row.

    Args:
        table: the table, with the rows to run.
        options: how it was asked for.
        dataset: one of the table's data sets.
        overrides: for every run.
    """

    def __init__(self, table: PaperTable, options: ReproduceOptions, dataset: str, overrides: Sequence[str]) -> None:
        self.table, self.name, self.dataset, self.overrides = table, options.table, dataset, list(overrides)
        self.shown = options.dataset or dataset
        self.seed_key = pick(dict(table.replicate), dataset)
        self.reference = pick(table.reference, dataset)
        self.runs_by_row = {
            row: table.runs(row, dataset, options.seeds or table.seeds, overrides) for row in table.names(dataset)
        }
        self.records = {row: self._make_record(row) for row in self._list_rows()}
        outputs = Path(compose(next(iter(self.runs_by_row.values()))[0]).runtime.outputs)
        suffix = "" if options.row is None else "-" + "".join(c if c.isalnum() else "_" for c in options.row)
        self.path = outputs / "tables" / f"{self.name}-{self.shown}{suffix}.md"

    @property
    def num_failed(self) -> int:
        """Number of rows that broke off or left images out."""
        return sum(r["status"] == "failed" or r["left_out"] > 0 for r in self.records.values())

    def configurations(self) -> list[tuple[str, list[Config]]]:
        """Return each row to run, with the configuration of each of its runs."""
        return [(row, [compose(overrides) for overrides in runs]) for row, runs in self.runs_by_row.items()]

    def run_row(self, row: str, cfgs: Sequence[Config]) -> None:
        """Run a row, or record what it lacks."""
        record, start = self.records[row], time.perf_counter()
        try:
            stage = self.table.stage
            lacking = [line for cfg in cfgs for line in find_missing(Workspace(cfg), stage)]
            record["missing"] = list(dict.fromkeys(lacking))
            if record["missing"]:
                record["status"] = "missing"
            else:
                # Each run has a workspace of its own, so that one run's models are in memory at a time.
                record.update(self._read_results([RUNS[self.table.stage](cfg) for cfg in cfgs]))
                record["train_split"] = cfgs[0].dataset.get("train_split", "train")
                record["status"] = "done"
        except StorageError:
            raise
        except MissingError as error:
            record.update(status="missing", missing=[one_line(error)])
        except ModusegError as error:
            record.update(status="failed", errors=[one_line(error)])
        except Exception as error:  # other rows still run; the traceback is logged and the exit code is 1
            log.exception("table %s, %s, row %r", self.name, self.dataset, row)
            record.update(status="failed", errors=[f"{type(error).__name__}: {one_line(error)}"])
        record["seconds_now"] = round(time.perf_counter() - start, 1)

    def write(self) -> None:
        """Write the rows so far, as JSON and Markdown."""
        self._compare()
        record = {
            "title": self.table.title,
            "table": self.name,
            "dataset": self.shown,
            "figure": self.table.figure,
            "reference": self.reference,
            "overrides": self.overrides,
            "rows": list(self.records.values()),
            "versions": versions(),
        }
        write_json(self.path.with_suffix(".json"), record)
        text = PaperMarkdown(
            self.table,
            self.dataset,
            self.shown,
            reference=self.reference,
            seed_key=self.seed_key,
            records=list(self.records.values()),
            num_run=len(self.runs_by_row),
        )
        write_atomic(self.path, text.make().encode())

    def _list_rows(self) -> list[str]:
        """Return the rows in the table's order: those to run, and other methods' on the same benchmark."""
        return [
            name
            for name, row in self.table.rows.items()
            if name in self.runs_by_row
            or (row.is_quoted and self.dataset != MINIATURE and self.table.figure_of(name, self.dataset))
        ]

    def _make_record(self, row: str) -> dict[str, Any]:
        """Return the record of a row that was not run yet."""
        runs, published = self.runs_by_row.get(row, []), self.table.figure_of(row, self.dataset)
        keys = ("method", "benchmark", "value", "source", "note")
        return {
            "row": row,
            "kind": self.table.rows[row].kind,
            "status": "to do" if runs else "quoted",
            "published": None if published is None else {key: getattr(published, key) for key in keys},
            "published_further": {
                split: None if further is None else further.value
                for split in self.table.further_splits
                for further in [self.table.figure_of(row, self.dataset, split)]
            },
            "ours": None,
            "runs": runs,
            "commands": [command(overrides, self.table.stage) for overrides in runs],
            "values": [],
            "columns": {},
            "images": None,
            "split": None,
            "train_split": None,
            "label_source": None,
            "left_out": 0,
            "seconds": None,
            "missing": [],
            "errors": [],
        }

    def _read_results(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Return what a row's record says of its finished runs."""
        results = [read_json(path / "results.json") for path in paths]
        if self.table.stage != "evaluate":
            # Other stages have a single part, which they do not name.
            results = [{PARTS[self.table.stage][0]: result} for result in results]
        # The figure's own label maps: predictions, pseudo masks or segments.
        scored = results[0][FIGURES[self.table.figure][0]] or {}
        values = [read_figure(result, self.table.figure) for result in results]
        supervision = "+".join(dict.fromkeys(text for text in map(find_supervision, results) if text))
        measured = [value for value in values if value is not None]
        return {
            "values": values,
            "ours": mean(measured) if measured else None,
            "columns": {c: [read_figure(result, c) for result in results] for c in self.table.columns},
            "images": scored.get("images"),
            "split": scored.get("split"),
            "label_source": scored.get("label_source"),
            **({"supervision": supervision} if supervision else {}),
            "left_out": sum(count_failures(path) for path in paths),
            "seconds": round(mean(work_seconds(path) for path in paths), 1),
            "results": [str(path) for path in paths],
        }

    def _compare(self) -> None:
        """Set the difference from the published figure, and both changes from the reference row."""
        reference = self.records.get(self.reference or "")
        for record in self.records.values():
            published = record["published"]
            has_both = published is not None and record["ours"] is not None
            is_comparable = has_both and record["split"] == SPLITS[self.table.figure]
            record["difference"] = record["ours"] - published["value"] if is_comparable else None
            if reference is None or record is reference:
                record["change"], record["published_change"] = [], None
                continue
            pairs = zip(record["values"], reference["values"], strict=False)
            record["change"] = [a - b for a, b in pairs if a is not None and b is not None]
            reference_published = reference["published"]
            has_both = published is not None and reference_published is not None
            record["published_change"] = published["value"] - reference_published["value"] if has_both else None


def find_missing(work: Workspace, stage: str = "evaluate") -> list[str]:
    """Return what a run needs and does not find: data, folders, weights. Nothing is computed with them.

    Weights that can be fetched are fetched.

    Args:
        work: of the run.
        stage: what runs: a key of `RUNS`, `infer` or `pseudo_masks`.

    Returns:
        The line of each `MissingError`, once.
    """
    parts: tuple[Callable[[], object], ...] = (
        lambda: [work.dataset(split).ids for split in (work.train_split, work.eval_split)],
        lambda: work.proposer.digest,
        lambda: work.train_proposer.digest,
        lambda: work.backbone.digest,
        lambda: work.generator.digest,
    )
    if stage == "segment":
        needs_proposals = work.word_generator.needs_proposals or work.cfg.pseudo_masks.refine == "region_vote"
        proposals: tuple[Callable[[], object], ...] = (lambda: work.proposer.digest,) if needs_proposals else ()
        parts = (
            lambda: work.dataset(work.eval_split).ids,
            *proposals,
            lambda: work.word_generator.digest,
            lambda: work.tagger.digest,
        )
    elif stage == "pseudo_masks":
        parts = (*parts[:1], lambda: _find_voters(work), lambda: work.generator.digest)
    elif stage == "discover":
        parts = (
            lambda: work.dataset(work.eval_split).ids,
            lambda: work.discoverer.digest,
            lambda: work.backbone.digest,
        )
    elif stage == "predict_student":
        # Truth and files take none of the parts that label images.
        needs_labelling = work.cfg.student is not None and work.cfg.student.labels in ("pseudo_masks", "predictions")
        parts = (*(parts if needs_labelling else parts[:1]), lambda: TrainStudent(work).student.digest)
    lines: dict[str, None] = {}
    for part in parts:
        try:
            part()
        except MissingError as error:
            lines[one_line(error)] = None
    return list(lines)


def _find_voters(work: Workspace) -> None:
    """Look for what proposes masks on both splits, if pseudo masks are made with proposals."""
    if work.generator.needs_proposals or work.cfg.pseudo_masks.refine == "region_vote":
        _ = (work.proposer.digest, work.train_proposer.digest)


def work_seconds(path: Path) -> float:
    """Return the seconds that an artefact and all that it was made of took, each folder counted once."""
    return sum(folder.seconds for folder in StageFolder(path).provenance())


def command(overrides: Sequence[str], stage: str = "evaluate") -> str:
    """Return the command line of one run of a stage."""
    return " ".join([f"python scripts/{stage}.py", *(shlex.quote(override) for override in overrides)])


def list_commands(name: str, dataset: str | None = None) -> list[str]:
    """Return a line `data set, row: command` for each row of a table; `None` for all data sets."""
    table = load_paper_table(name)
    wanted = ALIASES.get(dataset or "", dataset)
    chosen = [d for d in BASE if d in table.datasets and wanted in (None, d)]
    return [f"{d}, {row}: {command(table.runs(row, d, 1)[0], table.stage)}" for d in chosen for row in table.names(d)]


def one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())
