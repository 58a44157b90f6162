"""The table of all methods as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from moduseg.evaluation.measures import format_value
from moduseg.evaluation.tables import mark_supervision, markdown_table

CSV_COLUMNS = (
    "method", "form", "status", "miou", "miou_low", "miou_high", "spread", "alike", "gain", "gain_low", "gain_high",
    "gain_is_certain", "boundary_miou", "boundary_miou_low", "boundary_miou_high", "train_miou", "wall", "cpu",
    "memory", "preparation_wall", "preparation_cpu", "preparation_memory", "num_parameters", "needs_tags",
    "supervision", "published", "published_on", "published_source", "images", "num_worlds", "parts", "missing",
)  # fmt: skip
"""Columns of the CSV: percent, seconds, GB (2^30 bytes), numbers."""
_PUBLISHED = {"train": "train, tags given", "val": "val"}
TAGS = "image-level tags"


def make_markdown(record: Mapping[str, Any]) -> str:
    """Return the table with what one must know to read it.

    Args:
        record: of `moduseg.studies.methods.MethodStudy.summarise`.
    """
    worlds = record["worlds"]
    images = max((row["images"] or 0 for row in record["rows"]), default=0)
    seeds = ", ".join(map(str, worlds))
    drawn = f", {len(worlds)} worlds (seeds {seeds})" if len(worlds) > 1 else f", world {seeds}" if worlds else ""
    head = f"**{record['title']}** {record['dataset']} {record['split']}{drawn}, {images} pictures, percent."
    header = (
        "method", "form", "mIoU", "95 % interval", "alike", "gain", "boundary mIoU", "masks of train", "s", "CPU s",
        "GB", "preparation (CPU min)", "trained parameters", "supervision", "tags at test", "published",
    )  # fmt: skip
    body = [_make_cells(row, len(worlds)) for row in record["rows"]]
    notes = "\n".join(f"- {note}" for note in _list_notes(record))
    return "\n".join([head, "", markdown_table(header, body), notes, "", *_list_problems(record["rows"])])


def make_csv(record: Mapping[str, Any]) -> str:
    """Return a line for each row, with all figures unrounded."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in record["rows"]:
        gain = row["gain"] or {}
        gains = {f"gain_{end}": gain.get(end) for end in ("low", "high", "is_certain")}
        writer.writerow(
            {**row, **gains, "gain": gain.get("difference"), "missing": "; ".join(row["missing"] or row["errors"])}
        )
    return buffer.getvalue()


def _make_cells(row: Mapping[str, Any], num_worlds: int) -> list[object]:
    """Return the cells of a row; one that was not run says so in place of its mIoU.

    Args:
        row: of the table's record.
        num_worlds: of the table; a row that has fewer so far, or broke off, says how many.
    """
    is_done = row["miou"] is not None
    partial = f" ({row['num_worlds']} of {num_worlds} worlds)" if is_done and row["num_worlds"] < num_worlds else ""
    gain = row["gain"]
    seconds = row["preparation_cpu"]
    return [
        row["method"],
        row["form"],
        format_value(row["miou"]) + ("*" if row["left_out"] else "") + partial if is_done else row["status"],
        _join_ends(row["miou_low"], row["miou_high"]),
        row["alike"] or "-",
        "-" if gain is None else format_value(gain["difference"], "+") + ("" if gain["is_certain"] else " ?"),
        format_value(row["boundary_miou"]),
        format_value(row["train_miou"]),
        format_value(row["wall"], decimals=3),
        format_value(row["cpu"], decimals=3),
        format_value(row["memory"], decimals=2),
        format_value(None if seconds is None else seconds / 60),
        format_count(row["num_parameters"]) if is_done else "-",
        mark_supervision(TAGS, row["supervision"]),
        "yes" if row["needs_tags"] else "no",
        _name_published(row),
    ]


def format_count(number: int | None) -> str:
    """Return a number of parameters in a few characters: `0`, `1,548`, `3.2 M`."""
    if number is None:
        return "-"
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def _join_ends(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{format_value(low)} to {format_value(high)}"


def _name_published(row: Mapping[str, Any]) -> str:
    """Return the published figure with what was scored, such as `75.2 (voc train, tags given)`."""
    if row["published"] is None:
        return "-"
    name, _, split = row["published_on"].partition("/")
    is_words = name not in ("voc", "coco")
    scored = f"{split}, words alone" if is_words else _PUBLISHED[split]
    return f"{format_value(row['published'])} ({name} {scored})"


def _list_notes(record: Mapping[str, Any]) -> list[str]:
    """Return what one must know to read the table, in sentences."""
    notes = list(record["notes"])
    confidence = record["confidence"]
    if confidence:
        first = record["forms"][0]
        notes += [
            "alike: methods of one form that share no letter differ; paired bootstrap over the pictures, "
            f"{100 * confidence['methods']:.2f} % for each pair, so that all pairs of a form hold together with 95 %.",
            f"gain: from the method's {first}, on the same pictures; `?` where the interval of the difference holds 0 "
            f"({100 * confidence['forms']:.2f} % each).",
        ]
    if len(record["worlds"]) > 1:
        notes.append("mIoU is that of the pictures of all worlds together.")
    notes += [
        "masks of train: what banks and students are made of; published figures of masks are of that split.",
        "s, CPU s, GB: one picture, from its pixels to its label map; the most memory of the process or of the GPU. "
        "Rows share a process. Preparation, once: fits, masks of the training images, bank, training.",
        "trained parameters: learnt for the row, by a fit of its generator and by its student.",
    ]
    if sources := sorted({row["published_source"] for row in record["rows"] if row["published_source"]}):
        notes.append(f"Published: {', '.join(sources)}; the models and the pictures are others.")
    return notes


def _list_problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what rows lack, why rows failed and which lost images: a block of lines each."""
    blocks = []
    for title, key in (("Missing", "missing"), ("Failed", "errors")):
        by_line: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            for line in row[key]:
                by_line.setdefault(line, []).append(row)
        listed = [f"- {_name_rows(lacking, rows)}: {line}" for line, lacking in by_line.items()]
        if listed:
            blocks.append("\n".join([f"{title}:", "", *listed, ""]))
    if lost := [f"{row['method']}, {row['form']}: {row['left_out']}" for row in rows if row["left_out"]]:
        blocks.append(f"* Images left out on the way, see failures.jsonl: {'; '.join(lost)}.\n")
    return blocks


def _name_rows(lacking: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of some rows; all forms of a method, or all methods of a form, are one name."""
    if len(lacking) == len(rows) > 1:
        return "every row"
    texts: dict[str, None] = {}
    for row in lacking:
        of_form, of_method = (
            sum(r[key] == row[key] for r in lacking) == sum(r[key] == row[key] for r in rows)
            for key in ("form", "method")
        )
        name = row["method"] if of_method else f"every {row['form']}" if of_form else _name_row(row)
        texts[name] = None
    return "; ".join(texts)


def _name_row(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, {row['form']}"
