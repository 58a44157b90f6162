"""What is done with finished banks: `info`, `add`, `remove`, `merge`, `export`.

A bank that is made of others is written into a folder of its own; the others stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moduseg.bank import edit
from moduseg.bank.derived import open_bank, write_derived
from moduseg.bank.export import export
from moduseg.bank.statistics import (
    RegionStatistics,
    compute_class_statistics,
    compute_region_statistics,
    find_other_neighbours,
    format_statistics,
)
from moduseg.bank.store import Bank, SearchBank
from moduseg.cli.options import configured, parse
from moduseg.config import Config, OutliersConfig
from moduseg.errors import ConfigError
from moduseg.evaluation.tables import markdown_table
from moduseg.pipeline.workspace import count_failures, log
from moduseg.retrieval.search import search
from moduseg.stages import extend_bank

CLASS_HEADER = (
    "class", "vectors", "left out", "images", "pixels", "spread", "nearest class", "cosine", "overlap", "with",
)  # fmt: skip
"""Columns of `info`; see `moduseg.bank.statistics.ClassStatistics`."""


@dataclass(frozen=True)
class InfoOptions:
    """Keys of `info`.

    Attributes:
        bank: folder of the bank.
        class_: a class whose regions are listed, those to look at first on top; the classes where left out.
        json: whether to print JSON in place of a table.
    """

    bank: str
    class_: str | None = None
    json: bool = False


@dataclass(frozen=True)
class RemoveOptions:
    """Keys of `remove`.

    Attributes:
        bank: folder of the bank.
        class_: names of classes, which lose their regions and their names.
        image: ids of training images.
        region: rows of the bank, or `<image id>:<class>`.
        out: folder to write; chosen below `runtime.outputs` where left out.
    """

    bank: str
    class_: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    out: str | None = None


@dataclass(frozen=True)
class MergeOptions:
    """Keys of `merge`.

    Attributes:
        banks: folders of two or more banks of one backbone.
        prefix: whether the images of each bank get the name of its folder in front.
        out: see `RemoveOptions`.
    """

    banks: tuple[str, ...]
    prefix: bool = False
    out: str | None = None


@dataclass(frozen=True)
class ExportOptions:
    """Keys of `export`.

    Attributes:
        bank: folder of the bank.
        out: folder for the files.
        format: see `moduseg.bank.export.FORMATS`.
        outliers: whether the outlier filter of the bank's configuration leaves vectors out, as it does in searches.
    """

    bank: str
    out: str
    format: Literal["npz", "faiss", "csv", "projector"] = "npz"
    outliers: bool = True


def main(arguments: Sequence[str]) -> int:
    """`<verb> key=value ...`; see `run`."""
    return run(arguments[0] if arguments else "nothing", arguments[1:])


def run(verb: str, arguments: Sequence[str]) -> int:
    """Do what `verb` says, print what was done.

    Args:
        verb: one of `VERBS`.
        arguments: its `key=value` arguments; `group.key=value` are overrides of the bank's configuration.

    Returns:
        0, or 1 where images were left out.

    Raises:
        ConfigError, ArtefactError, DataError, MissingError: nothing could be done.
    """
    if verb not in VERBS:
        raise ConfigError(
            f"bank: got {verb!r}, expected one of {', '.join(VERBS)}; try: python scripts/bank.py info bank=<folder>"
        )
    return VERBS[verb](arguments)


def describe(bank: Bank, cfg: Config) -> tuple[Tensor, Tensor, SearchBank]:
    """What the functions of `moduseg.bank.statistics` take: vectors, nearest other rows, and what is searched."""
    whole = bank.select_vectors(cfg.bank.centre, OutliersConfig(enabled=False))
    _, neighbours = search(whole.vectors, whole.vectors, 2)
    return whole.vectors, find_other_neighbours(neighbours), bank.select_vectors(cfg.bank.centre, cfg.bank.outliers)


def _info(arguments: Sequence[str]) -> int:
    options, overrides = parse(arguments, InfoOptions, "info")
    bank = open_bank(options.bank)
    cfg = configured(bank.info["config"], overrides)
    vectors, nearest, searched = describe(bank, cfg)
    if options.class_ is not None:
        if options.class_ not in bank.classes:
            raise ConfigError(f"class: got {options.class_!r}, expected one of {', '.join(bank.classes)}")
        label = bank.classes.index(options.class_)
        regions = compute_region_statistics(bank, vectors, nearest, searched.rows, label)
        record: Any = [vars(region) for region in regions]
        text = _regions_table(options.class_, regions)
    else:
        statistics = compute_class_statistics(bank, vectors, nearest, searched.rows)
        record = {
            "bank": options.bank,
            "vectors": len(bank),
            "images": len(bank.image_ids),
            "dim": bank.pooled.shape[1],
            "classes": [s.as_dict() for s in statistics],
        }
        text = (
            f"{len(bank)} vectors of {bank.pooled.shape[1]} numbers from {len(bank.image_ids)} images of "
            f"{bank.info.get('dataset', '?')} {bank.info.get('split', '')}, {len(bank.classes)} classes; backbone "
            f"{cfg.backbone.get('model', cfg.backbone['name'])}, weights {str(bank.info.get('backbone_digest'))[:12]}"
            f"\n\n{markdown_table(CLASS_HEADER, format_statistics(statistics))}"
        )
    print(json.dumps(record, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def _regions_table(name: str, regions: Sequence[RegionStatistics]) -> str:
    rows = [
        [r.row, r.image, r.area, f"{r.distance:.2f}", r.nearest_label or "-", r.nearest_row, "yes" * r.dropped]
        for r in regions
    ]
    header = ("row", "image", "pixels", "distance", "nearest other", "its row", "left out")
    return f"{len(rows)} regions of {name}, those to look at first on top\n\n{markdown_table(header, rows)}"


def _remove(arguments: Sequence[str]) -> int:
    options, overrides = parse(arguments, RemoveOptions, "remove")
    bank = open_bank(options.bank)
    if not (options.class_ or options.image or options.region):
        raise ConfigError("remove: got nothing to remove, expected class=<name>, image=<id> or region=<row>")
    rows = [_row(bank, text) for text in options.region]
    left = edit.remove(bank, options.class_, options.image, rows)
    details = {"class": list(options.class_), "image": list(options.image), "region": sorted(rows)}
    return _written(left, "remove", [Path(options.bank)], details, options.out, overrides, [bank])


def _merge(arguments: Sequence[str]) -> int:
    options, overrides = parse(arguments, MergeOptions, "merge")
    if len(options.banks) < 2:
        raise ConfigError(f"banks: got {len(options.banks)} folder, expected two or more; write banks=[a,b]")
    banks = [open_bank(path) for path in options.banks]
    named = banks
    if options.prefix:
        names = [Path(path).name for path in options.banks]
        if len(set(names)) < len(names):
            raise ConfigError(f"prefix: got folders called {', '.join(names)}, expected different names; rename one")
        named = [edit.prefix_images(bank, name) for bank, name in zip(banks, names, strict=True)]
    details = {"prefix": options.prefix}
    return _written(
        edit.merge(named), "merge", [Path(p) for p in options.banks], details, options.out, overrides, banks
    )


def _export(arguments: Sequence[str]) -> int:
    options, overrides = parse(arguments, ExportOptions, "export")
    bank = open_bank(options.bank)
    cfg = configured(bank.info["config"], overrides)
    outliers = cfg.bank.outliers if options.outliers else OutliersConfig(enabled=False)
    found = bank.select_vectors(cfg.bank.centre, outliers)
    files = export(bank, found, options.format, Path(options.out).expanduser())
    print(f"export: {len(found.rows)} of {len(bank)} vectors -> {', '.join(str(file) for file in files)}")
    return 0


def _add(arguments: Sequence[str]) -> int:
    options, overrides = parse(arguments, extend_bank.AddOptions, "add")
    path = extend_bank.run(options, overrides)
    failures = count_failures(path)
    return 1 if failures else 0


def _row(bank: Bank, text: str) -> int:
    """The row that `12` or `<image id>:<class>` names."""
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


def _written(
    bank: Bank,
    operation: str,
    sources: Sequence[Path],
    details: dict[str, Any],
    out: str | None,
    overrides: Sequence[str],
    before: Sequence[Bank],
) -> int:
    cfg = configured(bank.info["config"], ["runtime.outputs=outputs", *overrides])
    folder = None if out is None else Path(out).expanduser()
    path = write_derived(
        bank,
        operation,
        sources=sources,
        details=details,
        folder=folder,
        outputs=Path(cfg.runtime.outputs),
        config=bank.info["config"],
    )
    counts = " + ".join(str(len(b)) for b in before)
    log.info("%s: %s -> %d vectors, %d classes -> %s", operation, counts, len(bank), len(bank.classes), path)
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "info": _info,
    "add": _add,
    "remove": _remove,
    "merge": _merge,
    "export": _export,
}
"""What `scripts/bank.py` can do."""
