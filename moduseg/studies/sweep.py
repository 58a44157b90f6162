"""Sweeps that run no model: a grid over what follows the caches, each setting scored on the whole split.

Bank vectors are stored before the filter and the proposals' vectors are cached, so K, the filter, suppression, minimum
area, class subsets, images per class and the rules of vote and selection cost a search and some counting each.

A threshold is never chosen on the split it is reported on: `select` names the split (or the other run) that chooses;
without it the report says that its best figure is not a fair result.
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
from tqdm import tqdm

from moduseg.config import BankConfig, Config, OutliersConfig, RetrievalConfig, compose, from_hydra
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
from moduseg.evaluation.tables import markdown_table, versions
from moduseg.files import to_json_values, write_atomic, write_json
from moduseg.pipeline.workspace import Workspace, log
from moduseg.report.curves import Curve, draw_curves
from moduseg.studies.cached_split import CachedSplit

STORED = ("purify", "min_area", "aggregation", "flips", "path", "outliers")
"""Keys of `bank` that decide what is stored; `outliers` is swept key by key."""
KEYS = (
    *(f"retrieval.{f.name}" for f in fields(RetrievalConfig) if f.name not in ("engine", "storage")),
    *(f"bank.{f.name}" for f in fields(BankConfig) if f.name not in STORED),
    *(f"bank.outliers.{f.name}" for f in fields(OutliersConfig)),
)
"""What can be swept without a model."""
BEST = 10
"""Settings in the report's first table."""


@dataclass(frozen=True)
class Grid:
    """What a command line asks for.

    Attributes:
        axes: key -> values; the grid is their product, the last key varying fastest.
        overrides: of the run that is swept.
        select: a split, or overrides of another run, that chooses the best setting; empty where the reported one does.
    """

    axes: Mapping[str, list[Any]]
    overrides: list[str]
    select: list[str]

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every setting: key -> value."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]


@dataclass(frozen=True)
class SweepOptions:
    """Keys of the command `sweep`.

    Attributes:
        select: a split, or overrides of another run, one at a time, that chooses the best setting.
    """

    select: tuple[str, ...] = ()


def main(options: SweepOptions, overrides: Sequence[str]) -> int:
    """Score a grid and print its report."""
    folder = run([*overrides, *(f"select={text}" for text in options.select)])
    print((folder / "sweep.md").read_text(encoding="utf-8") + f"\nsweep -> {folder}")
    return 0


def parse(arguments: Sequence[str]) -> Grid:
    """`key=a,b,...` is an axis, `key=a` an override, `select=...` names what chooses.

    Raises:
        ConfigError: no axis, one that would run a model, or an argument that is not `key=value`.
    """
    select = [a.removeprefix("select=") for a in arguments if a.startswith("select=")]
    rest = [a for a in arguments if not a.startswith("select=")]
    try:
        parsed = OverridesParser.create().parse_overrides(rest)
    except HydraException as error:
        raise ConfigError(f"sweep: {' '.join(str(error).split())}; write key=value or key=value,value") from error
    axes: dict[str, list[Any]] = {}
    overrides = []
    for text, override in zip(rest, parsed, strict=True):
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
        axes[key] = [_unquoted(v) for v in values]
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
    settings = [_changed(base, point) for point in points]
    start = time.perf_counter()
    reported = CachedSplit(base, [s.retrieval for s in settings])
    chooser, chosen_on = _chooser(base, grid, settings)
    ready = time.perf_counter()
    rows = [
        {"setting": p, **_figures(reported, s, base)}
        for p, s in zip(points, tqdm(settings, desc="sweep", unit="setting", leave=False), strict=True)
    ]
    if chooser is not None:
        for row, setting in zip(rows, settings, strict=True):
            row["chosen by"] = _figures(chooser, setting, base)["mIoU"]
    seconds = {"read": ready - start, "sweep": time.perf_counter() - ready}

    key = "mIoU" if chooser is None else "chosen by"
    ranked = sorted(range(len(rows)), key=lambda i: -_or_nan(rows[i][key]))
    where = f"{reported.dataset.name} {reported.dataset.split}, {len(reported.images)} images"
    default = {name: _value_of(base, name) for name in grid.axes}
    artefact = Workspace(base).artefact(
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
    record = {
        "where": where,
        "chosen_on": chosen_on,
        "fair": chooser is not None,
        "axes": to_json_values(grid.axes),
        "default": to_json_values(default),
        "best": rows[ranked[0]],
        "rows": rows,
        "overrides": grid.overrides,
        "label_source": reported.dataset.label_source,
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "versions": versions(),
        "config": base.as_dict(),
    }
    text = _report(record, ranked)
    write_json(artefact.path / "results.json", record)
    write_atomic(artefact.path / "sweep.csv", _csv(grid, rows).encode())
    write_atomic(artefact.path / "sweep.md", text.encode())
    title = f"{where}: {len(rows)} settings"
    write_atomic(artefact.path / "sweep.png", draw_curves(_curves(record), title, "mIoU, percent"))
    artefact.write_manifest(
        status="complete",
        images=len(reported.images),
        failures=0,
        inputs={stage: str(path) for stage, path in reported.inputs.items()},
    )
    log.info("%s\nsweep -> %s", text.rstrip(), artefact.path)
    return artefact.path


def _chooser(base: Config, grid: Grid, settings: Sequence[Config]) -> tuple[CachedSplit | None, str]:
    """What the best setting is chosen on, and how to say so."""
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


def _changed(base: Config, point: Mapping[str, Any]) -> Config:
    values = base.as_dict()
    for key, value in point.items():
        *groups, name = key.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[name] = value
    return from_hydra(values)


def _value_of(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return to_json_values(value)


def _figures(split: CachedSplit, setting: Config, base: Config) -> dict[str, Any]:
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


def _csv(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "setting"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*grid.axes, *names])
    for row in rows:
        writer.writerow([*(_text(v) for v in row["setting"].values()), *(row.get(name) for name in names)])
    return table.getvalue()


def _report(record: Mapping[str, Any], ranked: Sequence[int]) -> str:
    rows, axes, default = record["rows"], record["axes"], record["default"]
    best = record["best"]
    shown = " ".join(f"{key}={_text(value)}" for key, value in best["setting"].items())
    seconds = record["seconds"]
    lines = [
        f"**{len(rows)} settings** on {record['where']}; read in {seconds['read']:.1f} s, swept in "
        f"{seconds['sweep']:.1f} s; percent.",
        "",
        f"Best: `{shown}`, mIoU {format_value(best['mIoU'])}. Chosen on {record['chosen_on']}.",
    ]
    same = [row for row in rows if row["setting"] == default]
    if same:
        lines.append(f"The configuration as it is: mIoU {format_value(same[0]['mIoU'])}.")
    figures = [name for name in rows[0] if name != "setting"]
    body = [
        [*(_text(v) for v in rows[i]["setting"].values()), *(format_value(rows[i].get(n)) for n in figures)]
        for i in ranked[:BEST]
    ]
    lines += ["", markdown_table([*axes, *figures], body)]
    for key, values in axes.items():
        at = _at_default(record, key)
        body = []
        for value in values:
            found = [_or_nan(row["mIoU"]) for row in rows if row["setting"][key] == value]
            alone = [row["mIoU"] for row in rows if row["setting"] == {**at, key: value}]
            body.append(
                [
                    _text(value),
                    format_value(alone[0]),
                    format_value(mean(found)),
                    format_value(min(found)),
                    format_value(max(found)),
                ]
            )
        lines.append(markdown_table([key, "others as they are", "mean", "lowest", "highest"], body))
    fixed = _at_default(record, "")
    lines.append(f"Others as they are: {', '.join(f'{k}={_text(v)}' for k, v in fixed.items())}.")
    return "\n".join(lines).rstrip() + "\n"


def _at_default(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values that the other axes are held at: the configuration's, or the best setting's where it is not swept."""
    held = {}
    for name, values in record["axes"].items():
        value = record["default"][name]
        held[name] = value if value in values else record["best"]["setting"][name]
    held.pop(key, None)
    return held


def _curves(record: Mapping[str, Any]) -> list[Curve]:
    found = []
    for key, values in record["axes"].items():
        held = _at_default(record, key)
        groups = [[_or_nan(r["mIoU"]) for r in record["rows"] if r["setting"][key] == v] for v in values]
        line = [next(_or_nan(r["mIoU"]) for r in record["rows"] if r["setting"] == {**held, key: v}) for v in values]
        default = record["default"][key]
        found.append(
            Curve(
                key,
                [_text(v) for v in values],
                line,
                [mean(g) for g in groups],
                [min(g) for g in groups],
                [max(g) for g in groups],
                values.index(default) if default in values else None,
            )
        )
    return found


def _unquoted(value: Any) -> Any:
    """Hydra's quoted strings as text, inside lists too."""
    if isinstance(value, list):
        return [_unquoted(v) for v in value]
    return getattr(value, "text", value)


def _text(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
