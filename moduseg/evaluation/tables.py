"""`results.json` and Markdown tables."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor

import moduseg
from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.confusion import frequency_weighted_iou, iou, miou, pixel_accuracy

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "segment-anything", "numpy", "opencv-python", "pillow",
    "scikit-image", "pycocotools",
)  # fmt: skip


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
        extra: more entries; none may replace one of those above.

    Returns:
        A dictionary fit for JSON; measures in percent, `None` where a class is in neither truth nor prediction.

    Raises:
        ValueError: names and counts do not fit, or `extra` replaces an entry.
    """
    counts = confusion.detach().cpu().numpy() if isinstance(confusion, Tensor) else np.asarray(confusion)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion: got {counts.shape}, expected {(len(classes),) * 2} as there are class names")
    record: dict[str, Any] = {
        "miou": _number(miou(counts)),
        "miou_classes_in_truth": _number(miou(counts, "truth")),
        "iou": {name: _number(value) for name, value in zip(classes, iou(counts).tolist(), strict=True)},
        "pixel_accuracy": _number(pixel_accuracy(counts)),
        "frequency_weighted_iou": _number(frequency_weighted_iou(counts)),
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
    taken = sorted(set(record) & set(extra or {}))
    if taken:
        raise ValueError(f"extra: got {', '.join(taken)}, which results hold already; choose other names")
    return {**record, **(extra or {})}


def results_markdown(record: Mapping[str, Any]) -> str:
    """A results record as Markdown: one line of totals, one row for each class."""
    counts = np.asarray(record["confusion"], dtype=np.int64)
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
    rows = []
    for i, (name, value) in enumerate(record["iou"].items()):
        hits, in_truth, predicted = counts[i, i], counts[i].sum(), counts[:, i].sum()
        rows.append(
            (name, _text(value), _share(hits, predicted), _share(hits, in_truth), _share(in_truth, counts.sum()))
        )
    table = markdown_table(("class", "IoU", "precision", "recall", "share of pixels"), rows)
    return f"{head}\n\n{table}"


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


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(part: float, whole: float) -> str:
    return f"{100.0 * part / whole:.1f}" if whole else "-"
