"""`results.json` and Markdown tables."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor

import moduseg
from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.confusion import (
    Uncovered,
    frequency_weighted_iou_of_counts,
    iou_of_counts,
    label_counts,
    mean_iou_of_counts,
    pixel_accuracy_of_counts,
    share_of_counts,
)

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "segment-anything", "numpy", "opencv-python", "pillow",
    "scikit-image", "pycocotools",
)  # fmt: skip


@dataclass(frozen=True)
class BoundaryFigures:
    """What boundary IoU is made of.

    Attributes:
        counts: `[3, S]` of `boundary_counts`, summed over the images.
        width: of the contours, as a share of the diagonal.
        pixels: the same in pixels, of each image.
    """

    counts: np.ndarray
    width: float
    pixels: Sequence[int]


def versions() -> dict[str, str | None]:
    """Versions of Python, moduseg and what decides numbers; `None` for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "moduseg": moduseg.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def results_record(
    confusion: np.ndarray | Tensor,
    classes: Sequence[str],
    *,
    dataset: str,
    split: str,
    images: int,
    label_source: str,
    config: Mapping[str, Any],
    seconds: Mapping[str, float] | None = None,
    failures: Sequence[str] = (),
    interval: Interval | None = None,
    boundary: BoundaryFigures | None = None,
    has_background: bool = True,
    uncovered: Uncovered = "wrong",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        confusion: `[S, S]` counts, rows truth.
        classes: `S` names, background first.
        dataset, split: what was scored.
        images: how many images the counts are from.
        label_source: where the image-level labels came from.
        config: the run's configuration, plain values.
        seconds: wall time of each step.
        failures: ids of images left out.
        interval: of the mIoU over images.
        boundary: of boundary IoU; `None` where contours were not counted.
        has_background: whether label 0 is a class; where it is not, the mIoU with uncovered pixels counted as wrong and
            the one with them ignored stand side by side.
        uncovered: which of the two the other figures follow.
        extra: more entries; none may replace one of those above.

    Returns:
        A dictionary fit for JSON; measures in percent, `None` where a class is in neither truth nor prediction.

    Raises:
        ValueError: names and counts do not fit, or `extra` replaces an entry.
    """
    counts = confusion.detach().cpu().numpy() if isinstance(confusion, Tensor) else np.asarray(confusion)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion: got {counts.shape}, expected {(len(classes),) * 2} as there are class names")
    hits, in_truth, predicted = margins = label_counts(counts, has_background, uncovered)
    record: dict[str, Any] = {
        "miou": _number(float(mean_iou_of_counts(*margins))),
        "miou_classes_in_truth": _number(float(mean_iou_of_counts(hits, in_truth, predicted, "truth"))),
        "iou": _by_class(classes, iou_of_counts(*margins)),
        "precision": _by_class(classes, share_of_counts(hits, predicted)),
        "recall": _by_class(classes, share_of_counts(hits, in_truth)),
        "pixel_accuracy": _number(pixel_accuracy_of_counts(*margins)),
        "frequency_weighted_iou": _number(frequency_weighted_iou_of_counts(*margins)),
        "unit": "percent",
        "dataset": dataset,
        "split": split,
        "images": images,
        "left_out": sorted(failures),
        "label_source": label_source,
        "seconds": {step: round(float(value), 3) for step, value in (seconds or {}).items()},
        "versions": versions(),
        "config": dict(config),
        "classes": list(classes),
        "confusion": counts.astype(int).tolist(),
    }
    if interval is not None:
        record["miou_interval"] = {
            "low": _number(interval.low),
            "high": _number(interval.high),
            "confidence": interval.confidence,
            "over": "images",
        }
    if boundary is not None:
        record["boundary_iou"] = {
            "miou": _number(float(mean_iou_of_counts(*boundary.counts))),
            "iou": _by_class(classes, iou_of_counts(*boundary.counts)),
            "width": boundary.width,
            "width_of": "the image's diagonal",
            "width_pixels": [min(boundary.pixels), max(boundary.pixels)],
        }
    if not has_background:
        record["uncovered"] = _uncovered(counts, uncovered)
    taken = sorted(set(record) & set(extra or {}))
    if taken:
        raise ValueError(f"extra: got {', '.join(taken)}, which results hold already; choose other names")
    return {**record, **(extra or {})}


def results_markdown(record: Mapping[str, Any]) -> str:
    """A results record as Markdown: a line with the mIoU, a row for each class, the other figures of the whole."""
    interval = record.get("miou_interval")
    spread = f" ({interval['low']:.1f} to {interval['high']:.1f})" if interval and interval["low"] is not None else ""
    head = (
        f"**mIoU {_text(record['miou'])} %**{spread}, pixel accuracy {_text(record['pixel_accuracy'])} %, on "
        f"{record['dataset']} {record['split']}, {record['images']} images, "
        f"image-level labels: {record['label_source']}"
    )
    if record["left_out"]:
        head += f"; left out: {len(record['left_out'])} ({', '.join(record['left_out'][:5])}" + (
            ", ...)" if len(record["left_out"]) > 5 else ")"
        )
    totals = [("mIoU over classes in the truth", _text(record["miou_classes_in_truth"]))]
    if "uncovered" in record:
        totals += [
            ("mIoU, uncovered pixels counted as wrong", _text(record["uncovered"]["miou_wrong"])),
            ("mIoU, uncovered pixels ignored", _text(record["uncovered"]["miou_ignored"])),
            ("uncovered pixels", _text(record["uncovered"]["share"])),
        ]
    totals.append(("frequency-weighted IoU", _text(record["frequency_weighted_iou"])))
    contours = record.get("boundary_iou")
    if contours:
        low, high = contours["width_pixels"]
        pixels = f"{low}" if low == high else f"{low} to {high}"
        width = f"{100 * contours['width']:g} % of the diagonal, {pixels} pixels"
        totals.append((f"boundary mIoU ({width})", _text(contours["miou"])))
    in_truth = label_counts(np.asarray(record["confusion"]))[1]
    header = ("class", "IoU", "precision", "recall", "share of pixels")
    rows = [
        [
            name,
            _text(value),
            _text(record["precision"][name]),
            _text(record["recall"][name]),
            _share(in_truth[i], in_truth.sum()),
        ]
        for i, (name, value) in enumerate(record["iou"].items())
    ]
    return f"{head}\n\n{markdown_table(header, rows)}\n{markdown_table(('percent', 'value'), totals)}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns are aligned as text too; columns after the first are right-aligned.

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


def _by_class(classes: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(classes, values.tolist(), strict=True)}


def _uncovered(confusion: np.ndarray, rule: Uncovered) -> dict[str, Any]:
    """The strict number and the flattering one, and how many pixels are between them."""
    total = label_counts(confusion, has_background=False)[1].sum()
    return {
        "rule": rule,
        "share": _number(float(share_of_counts(confusion[1:, 0].sum(), total))),
        "miou_wrong": _number(float(mean_iou_of_counts(*label_counts(confusion, False, "wrong")))),
        "miou_ignored": _number(float(mean_iou_of_counts(*label_counts(confusion, False, "ignore")))),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(part: float, whole: float) -> str:
    return f"{100.0 * part / whole:.1f}" if whole else "-"
