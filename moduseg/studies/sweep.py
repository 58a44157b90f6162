"""Grid search over settings that need no model: each setting is scored on the whole split from cached results.

Bank vectors are stored before the outlier filter and the proposals' vectors are cached. So K, the filter, suppression,
minimum area, class subsets, images per class and the rules of vote and selection cost a search and some counting each.

A threshold should not be chosen on the split it is reported on: `select` names the split (or another run) that
chooses. If it is omitted, the report says that its best figure is not a fair result.
"""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moduseg.config import BankConfig, Config, OutliersConfig, RetrievalConfig, compose, from_hydra
from moduseg.config.command_keys import SweepOptions
from moduseg.config.overrides import read_override
from moduseg.errors import ConfigError
from moduseg.evaluation.measures import (
    LabelMapCounts,
    count_labels,
    format_value,
    iou,
    measure_label_maps,
    single_measures,
    to_json,
)
from moduseg.evaluation.tables import mark_supervision, markdown_table, versions
from moduseg.files import to_json_values, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.manifests import name_supervision
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.report.curves import Curve, draw_curves
from moduseg.studies.cached_split import STORED_KEYS, CachedSplit

KEYS = (
    *(f"retrieval.{f.name}" for f in fields(RetrievalConfig) if f.name not in ("engine", "storage")),
    *(f"bank.{f.name}" for f in fields(BankConfig) if f.name not in (*STORED_KEYS, "outliers")),
    *(f"bank.outliers.{f.name}" for f in fields(OutliersConfig)),
)
"""Keys that can be swept without a model; `bank.outliers` is swept key by key."""
MIOU = next(measure for measure in single_measures() if measure.name == "miou")
"""What the best setting is chosen by, and how the columns are shown that are no measure of their own."""
NUM_BEST = 10
"""Number of settings in the report's first table."""


@dataclass(frozen=True)
class Grid:
    """A grid of settings, as a command line describes it.

    Attributes:
        axes: key -> values; the grid is their product, the last key varying fastest.
        overrides: of the run that is swept.
        select: a split, or overrides of another run, that chooses the best setting; empty if the reported split does.
    """

    axes: Mapping[str, list[Any]]
    overrides: list[str]
    select: list[str]

    @property
    def points(self) -> list[dict[str, Any]]:
        """All settings of the grid, each a mapping from key to value."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]


def main(options: SweepOptions, overrides: Sequence[str]) -> int:
    """Score a grid and print its report."""
    folder = run([*overrides, *(f"select={text}" for text in options.select)])
    print((folder / "sweep.md").read_text(encoding="utf-8") + f"\nsweep -> {folder}")
    return 0


def parse(arguments: Sequence[str]) -> Grid:
    """Read a command line: `key=a,b,...` is an axis, `key=a` an override, `select=...` names what chooses.

    Raises:
        ConfigError: no axis, one that would run a model, or an argument that is not `key=value`.
    """
    select = [a.removeprefix("select=") for a in arguments if a.startswith("select=")]
    rest = [a for a in arguments if not a.startswith("select=")]
    axes: dict[str, list[Any]] = {}
    overrides = []
    for text in rest:
        if read_override(text).is_path:  # taken as it is typed, commas included
            overrides.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"sweep: {' '.join(str(error).split())}; write key=value or key=value,value") from error
        if not override.is_sweep_override():
            overrides.append(text)
            continue
        key = override.key_or_group
        if key not in KEYS:
            raise ConfigError(
                f"sweep: got {key}, which is not applied to caches; expected some of {', '.join(KEYS)}; for others "
                "make a table, scripts/ablate.py"
            )
        values = [
            OverridesParser.create().parse_override(f"{key}={v}").value() for v in override.sweep_string_iterator()
        ]
        axes[key] = [_unquote(v) for v in values]
    if not axes:
        raise ConfigError("sweep: got no key with several values, expected one or more; try retrieval.top_k=1,5,9,15")
    if any(not s for s in select) or (len(select) > 1 and not all("=" in s for s in select)):
        raise ConfigError(f"select: got {', '.join(select)!r}, expected one split, or key=value of another run")
    return Grid(axes, overrides, select)


def run(arguments: Sequence[str]) -> Path:
    """Score every setting of a grid.

    Returns:
        The artefact's folder: `sweep.csv`, `sweep.md`, `sweep.png`, `results.json`.

    Raises:
        ConfigError: see `parse`, or a value that is not allowed.
        DataError: a split without ground truth.
    """
    grid = parse(arguments)
    base = compose(grid.overrides)
    points = grid.points
    settings = [_change(base, point) for point in points]
    start = time.perf_counter()
    reported = CachedSplit(base, [s.retrieval for s in settings])
    chooser, chosen_on = _open_chooser(base, grid, settings)
    ready = time.perf_counter()
    rows = [
        {"setting": p, **_measure(reported, s, base)}
        for p, s in zip(points, track(settings, "sweep", unit="setting"), strict=True)
    ]
    if chooser is not None:
        for row, setting in zip(rows, settings, strict=True):
            row["chosen by"] = _measure(chooser, setting, base)["mIoU"]
    seconds = {"read": ready - start, "sweep": time.perf_counter() - ready}

    key = "mIoU" if chooser is None else "chosen by"
    ranked = sorted(range(len(rows)), key=lambda i: -_or_nan(rows[i][key]))
    supervision = reported.bank.info.get("supervision")
    record = {
        "where": f"{reported.dataset.name} {reported.dataset.split}, {len(reported.images)} images",
        "chosen_on": chosen_on,
        "fair": chooser is not None,
        "axes": to_json_values(grid.axes),
        "default": {name: _read_setting(base, name) for name in grid.axes},
        "best": rows[ranked[0]],
        "rows": rows,
        "overrides": grid.overrides,
        # The bank has learned from the tags of the training images; those of the scored split are read by nothing.
        "label_source": reported.bank.info.get("label_source", reported.dataset.label_source),
        **name_supervision(supervision),
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "versions": versions(),
        "config": base.as_dict(),
    }
    artefact = _open_artefact(base, grid, reported, chooser)
    _write(artefact, record, ranked)
    artefact.write_manifest(
        status="complete",
        images=len(reported.images),
        failures=0,
        inputs={stage: str(path) for stage, path in reported.inputs.items()},
    )
    return artefact.path


def _open_artefact(base: Config, grid: Grid, reported: CachedSplit, chooser: CachedSplit | None) -> Artefact:
    """Return the artefact of a sweep, whose key names everything that decides its figures."""
    return Workspace(base).artefact(
        "sweep",
        f"{base.backbone['name']}-{reported.dataset.split}",
        {
            "inputs": {stage: path.name for stage, path in reported.inputs.items()},
            "chosen_on": {} if chooser is None else {stage: path.name for stage, path in chooser.inputs.items()},
            "select": grid.select,
            "axes": to_json_values(grid.axes),
            "retrieval": to_json_values(base.as_dict()["retrieval"]),
            "bank": to_json_values(base.as_dict()["bank"]),
        },
    )


def _write(artefact: Artefact, record: Mapping[str, Any], ranked: Sequence[int]) -> None:
    """Write the record of a sweep as JSON, CSV, Markdown and a picture, and log the Markdown."""
    text = _make_report(record, ranked)
    write_json(artefact.path / "results.json", record)
    write_atomic(artefact.path / "sweep.csv", _make_csv(record).encode())
    write_atomic(artefact.path / "sweep.md", text.encode())
    title = f"{record['where']}: {len(record['rows'])} settings"
    write_atomic(artefact.path / "sweep.png", draw_curves(_make_curves(record), title, "mIoU, percent"))
    log.info("%s\nsweep -> %s", text.rstrip(), artefact.path)


def _open_chooser(base: Config, grid: Grid, settings: Sequence[Config]) -> tuple[CachedSplit | None, str]:
    """Return the split that the best setting is chosen on, `None` for the reported one, and its description."""
    if not grid.select:
        return None, f"{base.dataset.get('val_split', 'val')}, which is what is reported: not a fair result"
    retrieval = [s.retrieval for s in settings]
    if "=" in grid.select[0]:
        other = compose([*grid.overrides, *grid.select])
        split = CachedSplit(other, retrieval)
        return split, f"{split.dataset.split} with {' '.join(grid.select)}, {len(split.images)} images"
    name = grid.select[0]
    values = base.as_dict()
    if name == base.dataset.get("val_split", "val"):
        raise ConfigError(f"select: got {name}, which is what is reported; expected another split, or leave it out")
    values["dataset"]["val_split"] = name
    held_out = name == base.dataset.get("train_split", "train")
    split = CachedSplit(from_hydra(values), retrieval, held_out)
    note = ", no image being a neighbour of its own proposals" if held_out else ""
    return split, f"{name}, {len(split.images)} images{note}"


def _change(base: Config, point: Mapping[str, Any]) -> Config:
    values = base.as_dict()
    for key, value in point.items():
        *groups, name = key.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[name] = value
    return from_hydra(values)


def _read_setting(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return to_json_values(value)


def _measure(split: CachedSplit, setting: Config, base: Config) -> dict[str, Any]:
    """Return the measures of one setting by their columns."""
    dataset, confusion = split.dataset, split.confusion(setting.bank, setting.retrieval)
    counts = LabelMapCounts(confusion, None, dataset.has_background, base.evaluation.uncovered)
    record = measure_label_maps(counts, dataset.classes)
    figures = {m.column: m.read(record) for m in single_measures() if m.counts(counts) is not None}
    if setting.bank.classes is not None:
        names = [c for c in dict.fromkeys(("background", *setting.bank.classes)) if c in dataset.classes]
        each = iou(count_labels(counts))[[dataset.classes.index(name) for name in names]]
        figures["mIoU of bank.classes"] = to_json(float(np.nanmean(each)))
    return figures


def _make_csv(record: Mapping[str, Any]) -> str:
    rows = record["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "setting"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*record["axes"], *names])
    for row in rows:
        writer.writerow([*(_text(v) for v in row["setting"].values()), *(row.get(name) for name in names)])
    return table.getvalue()


def _make_report(record: Mapping[str, Any], ranked: Sequence[int]) -> str:
    rows, axes, default = record["rows"], record["axes"], record["default"]
    best = record["best"]
    shown = " ".join(f"{key}={_text(value)}" for key, value in best["setting"].items())
    seconds = record["seconds"]
    where = mark_supervision(record["where"], record.get("supervision"))
    lines = [
        f"**{len(rows)} settings** on {where}; read in {seconds['read']:.1f} s, swept in "
        f"{seconds['sweep']:.1f} s; percent.",
        "",
        f"Best: `{shown}`, mIoU {format_value(best['mIoU'])}. Chosen on {record['chosen_on']}.",
    ]
    unchanged = [row for row in rows if row["setting"] == default]
    if unchanged:
        lines.append(f"The configuration as it is: mIoU {format_value(unchanged[0]['mIoU'])}.")
    figures = [name for name in rows[0] if name != "setting"]
    measures = {m.column: m for m in single_measures()}
    shown_as = [measures.get(name, MIOU) for name in figures]
    body = [
        [
            *(_text(value) for value in rows[i]["setting"].values()),
            *(figure.format(rows[i].get(name)) for name, figure in zip(figures, shown_as, strict=True)),
        ]
        for i in ranked[:NUM_BEST]
    ]
    titles = [figure.label(name) for name, figure in zip(figures, shown_as, strict=True)]
    lines += ["", markdown_table([*axes, *titles], body)]
    for key, values in axes.items():
        held = _at_default(record, key)
        body = []
        for value in values:
            mious = [_or_nan(row["mIoU"]) for row in rows if row["setting"][key] == value]
            at_held = next(row["mIoU"] for row in rows if row["setting"] == {**held, key: value})
            numbers = (at_held, mean(mious), min(mious), max(mious))
            body.append([_text(value), *(format_value(number) for number in numbers)])
        lines.append(markdown_table([key, "others as they are", "mean", "lowest", "highest"], body))
    fixed = _at_default(record, "")
    lines.append(f"Others as they are: {', '.join(f'{k}={_text(v)}' for k, v in fixed.items())}.")
    return "\n".join(lines).rstrip() + "\n"


def _at_default(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the values that the other axes are held at.

    They are the configuration's, or the best setting's where the configuration's value is not on the axis.
    """
    held = {}
    for name, values in record["axes"].items():
        value = record["default"][name]
        held[name] = value if value in values else record["best"]["setting"][name]
    held.pop(key, None)
    return held


def _make_curves(record: Mapping[str, Any]) -> list[Curve]:
    lines = []
    for key, values in record["axes"].items():
        held = _at_default(record, key)
        groups = [[_or_nan(r["mIoU"]) for r in record["rows"] if r["setting"][key] == v] for v in values]
        line = [next(_or_nan(r["mIoU"]) for r in record["rows"] if r["setting"] == {**held, key: v}) for v in values]
        default = record["default"][key]
        lines.append(
            Curve(
                name=key,
                values=[_text(v) for v in values],
                line=line,
                average=[mean(g) for g in groups],
                lowest=[min(g) for g in groups],
                highest=[max(g) for g in groups],
                default=values.index(default) if default in values else None,
            )
        )
    return lines


def _unquote(value: Any) -> Any:
    """Return Hydra's quoted strings as text, inside lists too."""
    if isinstance(value, list):
        return [_unquote(v) for v in value]
    return getattr(value, "text", value)


def _text(value: Any) -> str:
    """Return a value as the command line has it."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
