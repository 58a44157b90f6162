"""What is written of a scored run: the record of `results.json` and Markdown tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

import moduseg
from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.confusion import label_counts
from moduseg.evaluation.measures import (
    LabelMapCounts,
    class_measures,
    count_contours,
    format_value,
    measure_label_maps,
    single_measures,
    to_json,
)

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "segment-anything", "numpy", "opencv-python", "pillow",
    "scikit-image", "pycocotools",
)  # fmt: skip


GROUPS = ("boundary_iou", "uncovered")
"""Entries of results that hold measures beside what they were counted with."""
MAX_NAMED = 5
"""The Markdown names at most this many of the images that were left out."""


@dataclass(frozen=True)
class ContourWidth:
    """How wide the contours of boundary IoU are.

    Attributes:
        share: of the diagonal.
        pixels: the width in pixels, of each image.
    """

    share: float
    pixels: Sequence[int]


@dataclass(frozen=True)
class ScoredRun:
    """What `results.json` says about a run beside its measures.

    Attributes:
        dataset, split: what was scored.
        num_images: how many images the counts are from.
        label_source: where the image-level labels came from.
        config: the run's configuration, plain values.
        seconds: wall time of each step.
        failures: ids of images that were left out.
        extra: more entries; none may replace one of the others.
        supervision: what beyond tags and words a part of the run was trained on, such as `pixel:<data set>`.
    """

    dataset: str
    split: str
    num_images: int
    label_source: str
    config: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    supervision: str | None = None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, moduseg and what decides numbers; `None` for a package that is not installed."""
    by_package: dict[str, str | None] = {"python": platform.python_version(), "moduseg": moduseg.__version__}
    for package in PACKAGES:
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            by_package[package] = None
    return by_package


def results_record(
    counts: LabelMapCounts,
    classes: Sequence[str],
    run: ScoredRun,
    *,
    interval: Interval | None = None,
    contours: ContourWidth | None = None,
) -> dict[str, Any]:
    """Return what `results.json` holds: every measure that applies, and what was scored.

    Where label 0 is no class, the mIoU with uncovered pixels counted as wrong and the one with them ignored stand side
    by side; `counts.uncovered` says which of the two the other measures follow.

    Args:
        counts: of the split.
        classes: `S` names, background first.
        run: what was scored.
        interval: of the mIoU over images.
        contours: width of the contours in `counts`; `None` where there are none.

    Returns:
        A dictionary fit for JSON; measures in percent, `None` where a class is in neither truth nor prediction.

    Raises:
        ValueError: names and counts do not fit, or a measure or `run.extra` has the name of another entry.
    """
    expected = (len(classes), len(classes))
    if counts.confusion.shape != expected:
        raise ValueError(f"confusion: got {counts.confusion.shape}, expected {expected} as there are class names")
    measured = measure_label_maps(counts, classes)
    record: dict[str, Any] = {
        "unit": "percent",
        "dataset": run.dataset,
        "split": run.split,
        "images": run.num_images,
        "left_out": sorted(run.failures),
        "label_source": run.label_source,
        "seconds": {step: round(float(value), 3) for step, value in run.seconds.items()},
        "versions": versions(),
        "config": dict(run.config),
        "classes": list(classes),
        "confusion": counts.confusion.astype(int).tolist(),
    }
    if run.supervision is not None:
        record["supervision"] = run.supervision
    if interval is not None:
        ends = {"low": to_json(interval.low), "high": to_json(interval.high)}
        record["miou_interval"] = {**ends, "confidence": interval.confidence, "over": "images"}
    if contours is not None:
        record["boundary_iou"] = {
            "width": contours.share,
            "width_of": "the image's diagonal",
            "width_pixels": [min(contours.pixels), max(contours.pixels)],
        }
    if "uncovered" in measured:
        record["uncovered"] = {"rule": counts.uncovered}
    return _join("extra", _join("measures", measured, record), run.extra)


def measure_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return title and value, as text, of each measure of a whole split that a results record holds.

    A measure that the record lacks, as one of an older version may, has no row.
    """
    rows = []
    for measure in single_measures():
        if measure.is_in(record):
            width = f" ({_describe_width(record['boundary_iou'])})" if measure.counts is count_contours else ""
            rows.append((measure.label(measure.title + width), measure.format(measure.read(record))))
    return rows


def results_markdown(record: Mapping[str, Any]) -> str:
    """Return a results record as Markdown: a line with the mIoU, a row for each class, the measures of the split."""
    interval = record.get("miou_interval")
    spread = f" ({interval['low']:.1f} to {interval['high']:.1f})" if interval and interval["low"] is not None else ""
    head = (
        f"**mIoU {format_value(record['miou'])} %**{spread}, pixel accuracy {format_value(record['pixel_accuracy'])} %,"
        f" on {record['dataset']} {record['split']}, {record['images']} images, "
        f"image-level labels: {record['label_source']}"
    )
    head = mark_supervision(head, record.get("supervision"))
    if record["left_out"]:
        more = ", ..." if len(record["left_out"]) > MAX_NAMED else ""
        head += f"; left out: {len(record['left_out'])} ({', '.join(record['left_out'][:MAX_NAMED])}{more})"
    in_truth = label_counts(np.asarray(record["confusion"]))[1]
    by_class = [measure for measure in class_measures() if measure.is_in(record)]
    rows = [
        [
            name,
            *(measure.format(measure.read(record)[name]) for measure in by_class),
            format_value(100.0 * in_truth[i] / in_truth.sum() if in_truth.any() else None),
        ]
        for i, name in enumerate(record["classes"])
    ]
    header = ("class", *(measure.label(measure.title) for measure in by_class), "share of pixels")
    # The head holds the mIoU already.
    totals = measure_rows(record)[1:]
    return f"{head}\n\n{markdown_table(header, rows)}\n{markdown_table(('percent', 'value'), totals)}"


def find_supervision(record: Mapping[str, Any]) -> str | None:
    """Return what results say of masks that a part of the run was trained on; `None` if they say nothing.

    Args:
        record: results of a split, or of `evaluate`, whose parts are looked at.
    """
    parts = [record, *(record.get(name) or {} for name in ("prediction", "pseudo_masks"))]
    texts = dict.fromkeys(part["supervision"] for part in parts if part.get("supervision"))
    return "+".join(texts) or None


def mark_supervision(text: str, supervision: str | None) -> str:
    """Return the text of a run with the mark of results that are not weakly supervised; as it is without one."""
    return text if supervision is None else f"{text} [supervision={supervision}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table whose columns are aligned as text too; columns after the first are right-aligned.

    Raises:
        ValueError: a row of another length than the header.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    if any(len(row) != len(header) for row in cells):
        raise ValueError(f"table: got a row of another length, expected {len(header)} cells as in the header")
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([f"{lines[0]} |", rule, *(f"{line} |" for line in lines[1:])]) + "\n"


def _join(where: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of both mappings; those of `GROUPS` are joined in turn.

    Raises:
        ValueError: both have an entry of one name.
    """
    nested = {name: _join(where, first[name], second[name]) for name in GROUPS if name in first and name in second}
    if replaced := sorted((first.keys() & second.keys()) - nested.keys()):
        raise ValueError(f"{where}: got {', '.join(replaced)}, which results hold already; choose other names")
    return {**first, **second, **nested}


def _describe_width(contours: Mapping[str, Any]) -> str:
    """Return the width of contours in words."""
    low, high = contours["width_pixels"]
    pixels = f"{low}" if low == high else f"{low} to {high}"
    return f"{100 * contours['width']:g} % of the diagonal, {pixels} pixels"
