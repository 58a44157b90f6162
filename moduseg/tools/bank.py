"""The commands `bank info`, `add`, `remove`, `merge`, `apply` and `export`, which work with finished banks.

A bank that is made of others is written into a folder of its own; the others stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduseg.bank import edit
from moduseg.bank.corrections import apply_corrections, describe, read_corrections
from moduseg.bank.derived import open_bank, write_derived
from moduseg.bank.export import export as export_bank
from moduseg.bank.overlaps import count_nearest_classes, describe_bank
from moduseg.bank.statistics import (
    RegionStatistics,
    compute_class_statistics,
    compute_region_statistics,
    find_other_neighbours,
    format_statistics,
)
from moduseg.bank.store import Bank
from moduseg.config import Config, OutliersConfig
from moduseg.config.command_keys import (
    AddOptions,
    ApplyOptions,
    ExportOptions,
    InfoOptions,
    MergeOptions,
    RemoveOptions,
)
from moduseg.config.stored import reconfigure
from moduseg.errors import ConfigError
from moduseg.evaluation.tables import markdown_table
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import log
from moduseg.retrieval.search import search
from moduseg.stages import extend_bank

CLASS_HEADER = (
    "class", "vectors", "left out", "images", "pixels", "spread", "nearest class", "cosine", "overlap", "with",
)  # fmt: skip
"""Columns of `bank info`: the fields of `moduseg.bank.statistics.ClassStatistics`."""


@dataclass(frozen=True)
class DerivedBank:
    """A bank made of others, and how it was made.

    Attributes:
        bank: the new bank.
        operation: `remove`, `merge` or `correct`.
        sources: folders of the banks it was made of.
        details: what was asked for, JSON values.
        num_before: vectors of each bank it was made of.
    """

    bank: Bank
    operation: str
    sources: Sequence[str]
    details: dict[str, Any]
    num_before: Sequence[int]


def info(options: InfoOptions, overrides: Sequence[str]) -> int:
    """Print the classes of a bank and which cannot be told apart, or the regions of one class, as a table or JSON."""
    bank = open_bank(options.bank)
    cfg = reconfigure(bank.info["config"], overrides)
    vectors = bank.select_vectors(cfg.bank.centre, OutliersConfig(enabled=False)).vectors
    nearest = find_other_neighbours(search(vectors, vectors, 2)[1])
    searched_rows = bank.select_vectors(cfg.bank.centre, cfg.bank.outliers).rows
    if options.class_ is None:
        statistics = compute_class_statistics(bank, vectors, nearest, searched_rows)
        told_apart = describe_bank(count_nearest_classes(bank, vectors))
        record: Any = {
            "bank": options.bank,
            "vectors": len(bank),
            "images": len(bank.image_ids),
            "dim": bank.pooled.shape[1],
            "classes": [s.as_dict() for s in statistics],
            "told_apart": told_apart,
        }
        words = "\n".join(f"- {line}" for line in told_apart)
        table = markdown_table(CLASS_HEADER, format_statistics(statistics)).rstrip()
        text = f"{_headline(bank, cfg)}\n\n{table}\n\n{words}"
    elif options.class_ in bank.classes:
        label = bank.classes.index(options.class_)
        regions = compute_region_statistics(bank, vectors, nearest, searched_rows, label)
        record = [vars(region) for region in regions]
        text = _regions_table(options.class_, regions)
    else:
        raise ConfigError(f"class: got {options.class_!r}, expected one of {', '.join(bank.classes)}")
    print(json.dumps(record, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def add(options: AddOptions, overrides: Sequence[str]) -> int:
    """Add tagged images to a bank; 1 if some could not be processed, else 0."""
    return 1 if count_failures(extend_bank.run(options, overrides)) else 0


def remove(options: RemoveOptions, overrides: Sequence[str]) -> int:
    """Write a bank without some classes, images or regions."""
    bank = open_bank(options.bank)
    if not (options.class_ or options.image or options.region):
        raise ConfigError("remove: got nothing to remove, expected class=<name>, image=<id> or region=<row>")
    rows = [_find_row(bank, text) for text in options.region]
    smaller = edit.remove(bank, options.class_, options.image, rows)
    details = {"class": list(options.class_), "image": list(options.image), "region": sorted(rows)}
    _write(DerivedBank(smaller, "remove", [options.bank], details, [len(bank)]), options.out, overrides)
    return 0


def merge(options: MergeOptions, overrides: Sequence[str]) -> int:
    """Write the bank that holds the vectors of several."""
    if len(options.banks) < 2:
        raise ConfigError(f"banks: got {len(options.banks)} folder, expected two or more; write banks=[a,b]")
    banks = [open_bank(path) for path in options.banks]
    if options.prefix:
        names = [Path(path).name for path in options.banks]
        if len(set(names)) < len(names):
            raise ConfigError(f"prefix: got folders called {', '.join(names)}, expected different names; rename one")
        banks = [edit.prefix_images(bank, name) for bank, name in zip(banks, names, strict=True)]
    num_before = [len(bank) for bank in banks]
    merged = DerivedBank(edit.merge(banks), "merge", options.banks, {"prefix": options.prefix}, num_before)
    _write(merged, options.out, overrides)
    return 0


def apply(options: ApplyOptions, overrides: Sequence[str]) -> int:
    """Write a bank whose regions are corrected as a file says that the report saved."""
    bank = open_bank(options.bank)
    file = read_corrections(Path(options.corrections).expanduser())
    corrected = apply_corrections(bank, file)
    details = {"corrections": describe(file.corrections)}
    _write(DerivedBank(corrected, "correct", [options.bank], details, [len(bank)]), options.out, overrides)
    return 0


def export(options: ExportOptions, overrides: Sequence[str]) -> int:
    """Write the vectors of a bank for another program."""
    bank = open_bank(options.bank)
    cfg = reconfigure(bank.info["config"], overrides)
    outliers = cfg.bank.outliers if options.outliers else OutliersConfig(enabled=False)
    searched = bank.select_vectors(cfg.bank.centre, outliers)
    files = export_bank(bank, searched, options.format, Path(options.out).expanduser())
    print(f"export: {len(searched.rows)} of {len(bank)} vectors -> {', '.join(str(file) for file in files)}")
    return 0


def _headline(bank: Bank, cfg: Config) -> str:
    """Return one line on what a bank holds and what made it."""
    return (
        f"{len(bank)} vectors of {bank.pooled.shape[1]} numbers from {len(bank.image_ids)} images of "
        f"{bank.info.get('dataset', '?')} {bank.info.get('split', '')}, {len(bank.classes)} classes; backbone "
        f"{cfg.backbone.get('model', cfg.backbone['name'])}, weights {str(bank.info.get('backbone_digest'))[:12]}"
    )


def _regions_table(name: str, regions: Sequence[RegionStatistics]) -> str:
    rows = [
        [r.row, r.image, r.area, f"{r.distance:.2f}", r.nearest_label or "-", r.nearest_row, "yes" * r.dropped]
        for r in regions
    ]
    header = ("row", "image", "pixels", "distance", "nearest other", "its row", "left out")
    return f"{len(rows)} regions of {name}, those to look at first on top\n\n{markdown_table(header, rows)}"


def _find_row(bank: Bank, text: str) -> int:
    """Return the row that `12` or `<image id>:<class>` names."""
    if text.isdigit():
        return int(text)
    image, _, name = text.rpartition(":")
    for row in range(len(bank)):
        if bank.image_ids[int(bank.image_index[row])] == image and bank.classes[int(bank.labels[row])] == name:
            return row
    raise ConfigError(
        f"region: got {text!r}, expected a row (a whole number) or <image id>:<class> of a region that the bank has; "
        "scripts/bank.py info bank=<folder> class=<name> lists them"
    )


def _write(derived: DerivedBank, out: str | None, overrides: Sequence[str]) -> None:
    """Write a bank made of others, and log its size beside theirs."""
    bank = derived.bank
    cfg = reconfigure(bank.info["config"], ["runtime.outputs=outputs", *overrides])
    path = write_derived(
        bank,
        derived.operation,
        sources=[Path(source) for source in derived.sources],
        details=derived.details,
        folder=None if out is None else Path(out).expanduser(),
        outputs=Path(cfg.runtime.outputs),
        config=bank.info["config"],
    )
    log.info(
        "%s: %s -> %d vectors, %d classes -> %s",
        derived.operation,
        " + ".join(str(num_vectors) for num_vectors in derived.num_before),
        len(bank),
        len(bank.classes),
        path,
    )
