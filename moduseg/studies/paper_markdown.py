"""The text of a table of the paper: published, ours, difference, and what one must know to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moduseg.evaluation.measures import format_value
from moduseg.evaluation.tables import mark_supervision, markdown_table
from moduseg.studies.ablate import label_column, mean_cell
from moduseg.studies.paper_tables import MINIATURE, SPLITS, PaperTable, pick


@dataclass(frozen=True)
class PaperMarkdown:
    """A table with the records of its rows.

    Attributes:
        table: what the table is about.
        dataset: one of the table's data sets.
        shown: how it was asked for.
        reference: the row that changes are counted from; `None` for none.
        seed_key: what repeated runs differ in; `None` if nothing is drawn by a seed.
        records: of the rows, in the table's order, as `reproduce.TableRun` keeps them.
        num_run: rows that are run; the others are quoted.
    """

    table: PaperTable
    dataset: str
    shown: str
    reference: str | None
    seed_key: str | None
    records: Sequence[Mapping[str, Any]]
    num_run: int

    def make(self) -> str:
        """Return the table as Markdown, with what one must know to read it."""
        further = [f"published {split}" for split in self.table.further_splits]
        header = ["row", *(["kind"] if self._has_kinds else []), "published", *further, "ours", "difference"]
        if self.reference is not None:
            header += ["published change", "our change"]
        header += [*(label_column(c) for c in self.table.columns), "images", "seconds"]
        body = [self._make_cells(record) for record in self.records]
        splits = {record["split"] for record in self.records if record["split"]}
        where = ", ".join(sorted(splits)) or SPLITS[self.table.figure]
        head = f"**{self.table.title}** {self.shown}, {self.table.figure} on {where}, percent."
        blocks = ["\n".join(f"- {note}" for note in self._list_notes()), *self._list_problems(), self._list_commands()]
        return "\n".join([head, "", markdown_table(header, body), *(f"{block}\n" for block in blocks)])

    def _make_cells(self, record: Mapping[str, Any]) -> list[object]:
        """Return a row of the table."""
        figure = self.table.figure
        ours = {"done": mean_cell(record["values"], figure), "quoted": "-"}.get(record["status"], record["status"])
        published, images, seconds = record["published"], record["images"], record["seconds"]
        cells: list[object] = [
            mark_supervision(record["row"], record.get("supervision")),
            *([record["kind"] or "-"] if self._has_kinds else []),
            format_value(None if published is None else published["value"]),
            *(format_value(value) for value in record["published_further"].values()),
            ours + ("*" if record["left_out"] else ""),
            mean_cell([record["difference"]], figure, "+"),
        ]
        if self.reference is not None:
            cells += [mean_cell([record["published_change"]], figure, "+"), mean_cell(record["change"], figure, "+")]
        cells += [mean_cell(record["columns"].get(c, []), c) for c in self.table.columns]
        return [*cells, "-" if images is None else images, "-" if seconds is None else seconds]

    @property
    def _has_kinds(self) -> bool:
        """Whether the table says of its rows what the methods had."""
        return any(row.kind for row in self.table.rows.values())

    def _list_notes(self) -> list[str]:
        """Return what one must know to read the table, in sentences."""
        records = self.records
        sources = sorted({r["published"]["source"] for r in records if r["published"]})
        notes = [f"Published: {', '.join(sources)}."] if sources else []
        if self.dataset == MINIATURE and sources:
            where = "Cityscapes-27" if self.table.stage == "discover" else "VOC 2012"
            notes[0] = f"Published: {', '.join(sources)}, on {where}, for orientation: compare changes, not levels."
        if self.reference is not None:
            notes.append(f"Changes are counted from the row `{self.reference}`.")
        num_runs = max(len(r["runs"]) for r in records)
        if num_runs > 1:
            last = num_runs - 1
            notes.append(f"Ours: mean ± sample standard deviation of {num_runs} runs, {self.seed_key} 0 to {last}.")
        banks = sorted({(r["train_split"], r["label_source"]) for r in records if r["status"] == "done"})
        if self.table.stage == "segment":
            sources = sorted({str(source) for _, source in banks})
            notes += [f"No bank; which classes compete in an image: {source}." for source in sources]
        elif self.table.stage == "predict_student":
            notes += [f"Trained on images of {split}, labels: {source}." for split, source in banks]
        elif self.table.stage == "discover":
            notes.append("No bank, no words: segments are matched to the truth; protocols are not to be compared.")
        else:
            notes += [f"Bank of {split}, image-level labels from {source}." for split, source in banks]
        notes.append(
            "Seconds: time on the clock of all stages behind a row, whenever it was done and whoever shares it."
        )
        notes += pick(dict(self.table.notes), self.dataset) or []
        noted = [r["published"] for r in records if r["published"] and r["published"]["note"]]
        return [*notes, *(f"{published['method']}: {published['note']}." for published in noted)]

    def _list_problems(self) -> list[str]:
        """Return what rows lack, why rows failed, and which rows left images out, a block of text each."""
        blocks = []
        for title, key in (("Missing", "missing"), ("Failed", "errors")):
            for rows, lines in self._group_lines(key).items():
                blocks.append(f"{title} in {rows}:\n\n" + "\n".join(f"- {line}" for line in lines))
        if skipping := [r for r in self.records if r["left_out"]]:
            named = ", ".join(f"`{r['row']}` {r['left_out']}" for r in skipping)
            blocks.append(f"* Images left out on the way, see failures.jsonl: {named}.")
        return blocks

    def _list_commands(self) -> str:
        rows = [f"    # {r['row']}\n    {r['commands'][0]}" for r in self.records if r["commands"]]
        return "\n".join(["Each row by itself (its first run):", "", *rows])

    def _group_lines(self, key: str) -> dict[str, list[str]]:
        """Return the lines of the records' lists `key`, grouped by the rows that have them."""
        rows_by_line: dict[str, list[str]] = {}
        for record in self.records:
            for line in record[key]:
                rows_by_line.setdefault(line, []).append(record["row"])
        lines_by_rows: dict[str, list[str]] = {}
        for line, rows in rows_by_line.items():
            has_every_row = len(rows) > 1 and len(rows) == self.num_run
            title = "every row" if has_every_row else ", ".join(f"`{row}`" for row in rows)
            lines_by_rows.setdefault(title, []).append(line)
        return lines_by_rows
