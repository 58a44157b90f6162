"""The paper's tables from one command: published, ours, difference; what lacks data or weights says so.

`python scripts/reproduce.py table=<name> [dataset=<data set>] [row=<name>] [seeds=<n>] [key=value ...]`
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from moduseg.config import Config, compose
from moduseg.errors import ConfigError, MissingError, ModusegError, StorageError
from moduseg.evaluation.tables import markdown_table, versions
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.stages import evaluate
from moduseg.studies.ablate import mean_cell, read_figure
from moduseg.studies.paper_tables import BASE, SPLITS, PaperTable, load_paper_table, pick

ALIASES = {"voc_aug": "voc", "coco2014": "coco"}
"""Configurations of a data set that a table knows by another name."""


@dataclass(frozen=True)
class ReproduceOptions:
    """Keys of the command `reproduce`.

    Attributes:
        table: name of a file in `configs/reproduce/`.
        dataset: the one data set to run; all with published figures if omitted.
        row: the one row to run; all if omitted.
        seeds: runs of a row, where the data set can be repeated; the table's number if omitted.
        show: whether to print the command of each row instead of running it.
    """

    table: str = ""
    dataset: str | None = None
    row: str | None = None
    seeds: int | None = None
    show: bool = False


def main(options: ReproduceOptions, overrides: Sequence[str]) -> int:
    """Make a table of the paper and print it, or the commands of its rows.

    Returns:
        0 if every row was run or lacks data or weights, 1 if one failed or left images out.
    """
    if options.show:
        print("\n".join(commands(options.table, options.dataset)))
        return 0
    finished = run(options.table, overrides, options.dataset, options.row, options.seeds)
    for path in finished.paths:
        print(path.read_text(encoding="utf-8"))
    print("written: " + ", ".join(str(path) for path in finished.paths))
    return 1 if finished.failed else 0


@dataclass(frozen=True)
class Finished:
    """What a call made.

    Attributes:
        paths: the Markdown files `<outputs>/tables/<table>-<data set>.md`, each with its `.json`.
        failed: rows that broke off or left images out, for another reason than missing data or weights.
    """

    paths: list[Path]
    failed: int


def run(
    name: str,
    overrides: Sequence[str] = (),
    dataset: str | None = None,
    row: str | None = None,
    seeds: int | None = None,
) -> Finished:
    """Run the rows of a table of the paper and write it, anew after each row.

    Args:
        name: of a file in `configs/reproduce/`.
        overrides: for every run; what a row is about stays as the row has it.
        dataset: `voc`, `voc_aug`, `coco`, `ade20k`, `cityscapes` or `miniature`; `None` is all with published figures.
        row: the one row to run, written to a file of its own; `None` is all of them.
        seeds: runs of a row, where the data set can be repeated; `None` is the table's number.

    Raises:
        ConfigError: no such table, row or data set, or an override that does not fit.
        StorageError: nothing can be written any more.
    """
    table = load_paper_table(name)
    wanted = ALIASES.get(dataset or "", dataset)
    known = table.datasets
    if wanted is not None and wanted not in known:
        raise ConfigError(f"dataset: got {dataset!r}, expected one of {', '.join(known)} for table {name}")
    chosen = [wanted] if wanted else table.published_on
    if row is not None:
        chosen = [d for d in chosen if row in table.names(d)]
        if not chosen:
            allowed = [r for r in table.rows if any(r in table.names(d) for d in ([wanted] if wanted else known))]
            raise ConfigError(f"row: got {row!r}, expected one of {', '.join(map(repr, allowed))} of table {name}")
        table = replace(table, rows={row: table.rows[row]}, reference=None)
    repeated = [d for d in chosen if pick(dict(table.replicate), d) is not None]
    if seeds is not None and (seeds < 1 or (seeds > 1 and not repeated)):
        limits = "1 or more" if repeated else f"1 on {', '.join(chosen)}, where nothing is drawn by a seed"
        raise ConfigError(f"seeds: got {seeds}, expected {limits}; leave it out")
    mine = [*([f"dataset={dataset}"] if dataset in ALIASES else []), *overrides]
    makers = [_Maker(table, name, d, row, seeds or table.seeds, mine, dataset or d) for d in chosen]
    # Every mistake in the configuration comes before the first run.
    jobs = [(maker, list(maker.configurations())) for maker in makers]
    with tqdm(total=sum(len(rows) for _, rows in jobs), desc=f"table {name}", unit="row") as progress:
        for maker, rows in jobs:
            maker.write()
            for label, cfgs in rows:
                maker.add(label, cfgs)
                maker.write()
                progress.update()
    return Finished([m.path for m in makers], sum(m.failed for m in makers))


class _Maker:
    """One table on one data set, row by row."""

    def __init__(
        self,
        table: PaperTable,
        name: str,
        dataset: str,
        row: str | None,
        seeds: int,
        overrides: Sequence[str],
        shown: str,
    ) -> None:
        self.table, self.dataset, self.shown, self.overrides = table, dataset, shown, list(overrides)
        self.name, self.seed_key = name, pick(dict(table.replicate), dataset)
        self.plan = {label: table.runs(label, dataset, seeds, overrides) for label in table.names(dataset)}
        self.reference = pick(table.reference, dataset)
        self.records = {label: self._blank(label) for label in self._labels()}
        outputs = Path(compose(next(iter(self.plan.values()))[0]).runtime.outputs)
        suffix = "" if row is None else "-" + "".join(c if c.isalnum() else "_" for c in row)
        self.path = outputs / "tables" / f"{name}-{shown}{suffix}.md"

    @property
    def failed(self) -> int:
        return sum(r["status"] == "failed" or r["left_out"] > 0 for r in self.records.values())

    def configurations(self) -> Iterator[tuple[str, list[Config]]]:
        """Each row to run, with the configuration of each of its runs."""
        for label, runs in self.plan.items():
            yield label, [compose(overrides) for overrides in runs]

    def add(self, label: str, cfgs: Sequence[Config]) -> None:
        """Run a row, or find out what it lacks."""
        record, start = self.records[label], time.perf_counter()
        try:
            record["missing"] = list(dict.fromkeys(line for cfg in cfgs for line in lacking(Workspace(cfg))))
            if record["missing"]:
                record["status"] = "missing"
            else:
                # Each run has a workspace of its own, so that one run's models are in memory at a time.
                record.update(self._results([evaluate.run(cfg) for cfg in cfgs]))
                record["train_split"] = cfgs[0].dataset.get("train_split", "train")
                record["status"] = "done"
        except StorageError:
            raise
        except MissingError as error:
            record.update(status="missing", missing=[_one_line(error)])
        except ModusegError as error:
            record.update(status="failed", errors=[_one_line(error)])
        except Exception as error:  # a night's table goes on; the traceback is shown and the exit code says so
            log.exception("table %s, %s, row %r", self.name, self.dataset, label)
            record.update(status="failed", errors=[f"{type(error).__name__}: {_one_line(error)}"])
        record["seconds_now"] = round(time.perf_counter() - start, 1)

    def write(self) -> None:
        """Write what there is so far, as JSON and Markdown."""
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
        write_atomic(self.path, self._markdown().encode())

    def _labels(self) -> list[str]:
        """Rows in the table's order: those to run, and other methods' on the same benchmark."""
        return [
            label
            for label, row in self.table.rows.items()
            if label in self.plan or (row.is_quoted and self.dataset != "miniature" and self._published(label))
        ]

    def _published(self, label: str) -> Mapping[str, Any] | None:
        found = self.table.figure_of(label, self.dataset)
        if found is None:
            return None
        keys = ("method", "benchmark", "value", "source", "note")
        return {key: getattr(found, key) for key in keys}

    def _blank(self, label: str) -> dict[str, Any]:
        runs = self.plan.get(label, [])
        return {
            "row": label,
            "status": "to do" if runs else "quoted",
            "published": self._published(label),
            "ours": None,
            "runs": runs,
            "commands": [command(overrides) for overrides in runs],
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

    def _results(self, paths: Sequence[Path]) -> dict[str, Any]:
        results = [read_json(path / "results.json") for path in paths]
        about = results[0]["pseudo_masks" if self.table.figure == "pseudo-mask mIoU" else "prediction"] or {}
        values = [read_figure(result, self.table.figure) for result in results]
        return {
            "values": values,
            "ours": _mean(values),
            "columns": {c: [read_figure(result, c) for result in results] for c in self.table.columns},
            "images": about.get("images"),
            "split": about.get("split"),
            "label_source": about.get("label_source"),
            "left_out": sum(count_failures(path) for path in paths),
            "seconds": round(mean(work_seconds(path) for path in paths), 1),
            "results": [str(path) for path in paths],
        }

    def _compare(self) -> None:
        """Difference from the published figure, and both changes from the reference row."""
        reference = self.records.get(self.reference or "")
        for record in self.records.values():
            published = record["published"]
            both = published is not None and record["ours"] is not None
            comparable = both and record["split"] == SPLITS[self.table.figure]
            record["difference"] = record["ours"] - published["value"] if comparable else None
            if reference is None or record is reference:
                record["change"], record["published_change"] = [], None
                continue
            pairs = zip(record["values"], reference["values"], strict=False)
            record["change"] = [a - b for a, b in pairs if a is not None and b is not None]
            theirs = reference["published"]
            known = published is not None and theirs is not None
            record["published_change"] = published["value"] - theirs["value"] if known else None

    def _markdown(self) -> str:
        header = ["row", "published", "ours", "difference"]
        if self.reference is not None:
            header += ["published change", "our change"]
        header += [*self.table.columns, "images", "seconds"]
        body = [self._cells(record) for record in self.records.values()]
        splits = {record["split"] for record in self.records.values() if record["split"]}
        where = ", ".join(sorted(splits)) or SPLITS[self.table.figure]
        head = f"**{self.table.title}** {self.shown}, {self.table.figure} on {where}, percent."
        return "\n".join([head, "", markdown_table(header, body), *self._notes()])

    def _cells(self, record: Mapping[str, Any]) -> list[object]:
        states = {"done": mean_cell(record["values"]), "quoted": "-"}
        ours = states.get(record["status"], record["status"])
        published, images = record["published"], record["images"]
        cells: list[object] = [
            record["row"],
            "-" if published is None else f"{published['value']:.1f}",
            ours + ("*" if record["left_out"] else ""),
            _signed(record["difference"]),
        ]
        if self.reference is not None:
            cells += [_signed(record["published_change"]), mean_cell(record["change"], "+")]
        cells += [mean_cell(record["columns"].get(c, [])) for c in self.table.columns]
        return [*cells, "-" if images is None else images, "-" if record["seconds"] is None else record["seconds"]]

    def _notes(self) -> list[str]:
        records = list(self.records.values())
        sources = sorted({r["published"]["source"] for r in records if r["published"]})
        notes = [f"Published: {', '.join(sources)}."] if sources else []
        if self.dataset == "miniature" and sources:
            notes[0] = f"Published: {', '.join(sources)}, on VOC 2012, for orientation: compare changes, not levels."
        if self.reference is not None:
            notes.append(f"Changes are counted from the row `{self.reference}`.")
        if any(len(r["runs"]) > 1 for r in records):
            count = max(len(r["runs"]) for r in records)
            notes.append(f"Ours: mean ± sample standard deviation of {count} runs, {self.seed_key} 0 to {count - 1}.")
        banks = sorted({(r["train_split"], r["label_source"]) for r in records if r["status"] == "done"})
        notes += [f"Bank of {split}, image-level labels from {source}." for split, source in banks]
        notes.append("Seconds: work of all stages behind a row's run, whenever it was done and whoever shares it.")
        notes += pick(dict(self.table.notes), self.dataset) or []
        notes += [f"{r['published']['method']}: {r['published']['note']}." for r in records if _has_note(r)]
        blocks = ["\n".join(f"- {note}" for note in notes)]
        for what, found in (("Missing", self._said("missing")), ("Failed", self._said("errors"))):
            blocks += [
                f"{what} in {rows}:\n\n" + "\n".join(f"- {line}" for line in said) for rows, said in found.items()
            ]
        if left_out := [r for r in records if r["left_out"]]:
            named = ", ".join(f"`{r['row']}` {r['left_out']}" for r in left_out)
            blocks.append(f"* Images left out on the way, see failures.jsonl: {named}.")
        rows = [f"    # {r['row']}\n    {r['commands'][0]}" for r in records if r["commands"]]
        blocks.append("\n".join(["Each row by itself (its first run):", "", *rows]))
        return [f"{block}\n" for block in blocks]

    def _said(self, key: str) -> dict[str, list[str]]:
        """The lines of the records' lists `key`, by the rows that they are said of."""
        rows: dict[str, list[str]] = {}
        for record in self.records.values():
            for line in record[key]:
                rows.setdefault(line, []).append(record["row"])
        found: dict[str, list[str]] = {}
        for line, labels in rows.items():
            every = len(labels) > 1 and len(labels) == len(self.plan)
            found.setdefault("every row" if every else ", ".join(f"`{n}`" for n in labels), []).append(line)
        return found


def lacking(work: Workspace) -> list[str]:
    """What a run would stop at because it is not there: data, folders, weights. Nothing is computed with them.

    Weights that can be fetched are fetched.

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
    lines: dict[str, None] = {}
    for part in parts:
        try:
            part()
        except MissingError as error:
            lines[_one_line(error)] = None
    return list(lines)


def work_seconds(path: Path) -> float:
    """Return the seconds that an artefact and all that it was made of took, each folder counted once."""
    return sum(folder.seconds for folder in StageFolder(path).provenance())


def command(overrides: Sequence[str]) -> str:
    """What one types to do a run by hand."""
    return " ".join(["python scripts/evaluate.py", *(shlex.quote(override) for override in overrides)])


def commands(name: str, dataset: str | None = None) -> list[str]:
    """The rows of a table, `data set, row: command`; arguments as those of `run`."""
    table = load_paper_table(name)
    wanted = ALIASES.get(dataset or "", dataset)
    chosen = [d for d in BASE if d in table.datasets and wanted in (None, d)]
    return [f"{d}, {row}: {command(table.runs(row, d, 1)[0])}" for d in chosen for row in table.names(d)]


def _has_note(record: Mapping[str, Any]) -> bool:
    return bool(record["published"] and record["published"]["note"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _signed(value: float | None) -> str:
    return "-" if value is None else mean_cell([value], "+")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
