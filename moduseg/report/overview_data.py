"""Collect what a report loads at once: the overview (`data/summary.js`) and the list of images (`data/images.js`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from moduseg.datasets.colours import find_class_colours
from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.measures import CLASSIFIER_FIGURES, MEASURES, PROPOSAL_FIGURES, single_measures
from moduseg.evaluation.published import BENCHMARKS, PUBLISHED
from moduseg.evaluation.tables import mark_supervision, versions
from moduseg.masks.palette import format_colour
from moduseg.pipeline.workspace import Workspace
from moduseg.report.finished_run import FinishedRun
from moduseg.report.image_data import ImageEntry
from moduseg.report.page import FORMAT
from moduseg.structures import IGNORE_INDEX

NOT_MEASURES = ("miou_interval", "confusion", "images", "left_out")
"""What an overview shows of results beside the measures."""

_NO_CELLS: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.uint16), np.zeros(0, np.uint32))


def make_overview(work: Workspace, run: FinishedRun, num_shown: int) -> dict[str, Any]:
    """Return the overview of a run as JSON values.

    Args:
        work: of its configuration.
        run: the run.
        num_shown: images in the report.
    """
    dataset, record = run.dataset, run.record or {}
    config = record.get("config") or work.cfg.as_dict()
    palette = find_class_colours(dataset.classes, dataset.class_colours, work.cfg.evaluation.report_colours)
    colours = palette[[*range(len(dataset.classes)), IGNORE_INDEX]]
    kept = dict.fromkeys((*(measure.path[0] for measure in MEASURES), *NOT_MEASURES))
    return {
        "format": FORMAT,
        "run": run.path.name,
        "dataset": dataset.name,
        "split": dataset.split,
        "what": run.what,
        "classes": list(dataset.classes),
        "colours": [format_colour(colour) for colour in colours],
        "ignore": IGNORE_INDEX,
        "has_background": dataset.has_background,
        "ignore_uncovered": run.ignores_uncovered,
        "label_source": mark_supervision(
            str(
                record.get("label_source")
                or run.folder.manifest.get("label_source")
                or work.dataset(work.train_split).label_source
            ),
            record.get("supervision") or run.folder.manifest.get("supervision"),
        ),
        "total": len(dataset.ids),
        "shown": num_shown,
        "record": None if run.record is None else {key: record[key] for key in kept if key in record},
        "measures": [measure.describe() for measure in MEASURES],
        "published": _list_published(run),
        "figures": [],
        "fit": [],
        "config": OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        "retrieval": dict(config.get("retrieval") or {}),
        "seconds": [[step, round(seconds, 2)] for step, seconds in run.seconds],
        "versions": {name: version for name, version in (record.get("versions") or versions()).items() if version},
        "heat": None,
        "why": False,
        "bank": False,
        "compare": None,
    }


def list_figures(results: Mapping[str, Any]) -> list[list[Any]]:
    """Return what stage `evaluate` adds to an overview: `[title, value, unit, decimals]` rows."""
    rows: list[list[Any]] = []
    masks, proposals = results.get("pseudo_masks"), results.get("proposals")
    if masks:
        rows += [
            [f"{m.title} of pseudo masks, {masks['split']}", m.read(masks), m.unit, m.decimals]
            for m in single_measures()
            if m.is_in(masks)
        ]
    classifier = results.get("classifier", {})
    rows += [[f.title, f.read(classifier), f.unit, f.decimals] for f in CLASSIFIER_FIGURES if f.is_in(classifier)]
    if proposals:
        rows += [[f.title.format_map(proposals), f.read(proposals), f.unit, f.decimals] for f in PROPOSAL_FIGURES]
    return rows


def list_changes(first: FinishedRun, second: FinishedRun) -> list[list[str]]:
    """Return the configuration keys in which two runs differ: `[key, first value, second value]`, `-` if absent."""
    configs = []
    for run in (first, second):
        config = (run.record or {}).get("config", {})
        decisive = {key: config[key] for key in config if key not in ("runtime", "evaluation")}
        configs.append(dict(_flatten("", decisive)))
    values = [[key, *(config.get(key, "-") for config in configs)] for key in {**configs[0], **configs[1]}]
    return [row for row in values if row[1] != row[2]]


def make_image_list(
    run: FinishedRun, ids: Sequence[str], entries: Sequence[ImageEntry], second: FinishedRun | None
) -> dict[str, Any]:
    """Return the list of images as columns, in the order of `ids`.

    Args:
        run: the run.
        ids: the images of the report.
        entries: of each image.
        second: a run that it is compared with.
    """
    return {
        "ids": list(ids),
        "sizes": [list(entry.size) for entry in entries],
        "photographs": [int(entry.has_photograph) for entry in entries],
        "scores": [None if entry.score is None else round(entry.score, 4) for entry in entries],
        "proposals": [entry.num_proposals for entry in entries],
        "heat": [int(entry.has_heat) for entry in entries],
        "areas": [entry.areas for entry in entries],
        "cells": _collect_cells(run.counts, ids),
        "second": None if second is None else _collect_cells(second.counts, ids),
    }


def _collect_cells(counts: SplitCounts | None, ids: Sequence[str]) -> list[list[list[int]]] | None:
    """Return the non-zero cells of each image's confusion, `[cells, values]`, empty if the image was not scored."""
    if counts is None:
        return None
    index_of = {image_id: index for index, image_id in enumerate(counts.ids)}
    columns: list[list[list[int]]] = []
    for image_id in ids:
        cells, values = counts.cells(index_of[image_id]) if image_id in index_of else _NO_CELLS
        columns.append([[int(cell) for cell in cells], [int(value) for value in values]])
    return columns


def _list_published(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the published rows for the data set of a prediction."""
    benchmark = f"{run.dataset.name}/{run.dataset.split}"
    return [
        {"method": row.method, "value": row.value, "note": row.note, "source": row.source}
        for row in PUBLISHED
        if benchmark in BENCHMARKS and row.benchmark == benchmark and row.table == "main" and run.what == "prediction"
    ]


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield dotted keys of nested mappings, each with its value as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, "null" if value is None else str(value)
