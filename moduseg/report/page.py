"""The folder of a report: its scripts of data, its program, what the head of the page says.

A page that is opened from disk may not fetch files, so data are scripts: `data/<key>.js` hands its value to the page by
`Report.receive("<key>", value)`, whenever the page asks for it by adding the script.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from moduseg.evaluation.counts import SplitCounts
from moduseg.evaluation.measures import MEASURES, PROPOSAL_FIGURES
from moduseg.evaluation.published import BENCHMARKS, PUBLISHED
from moduseg.files import write_atomic
from moduseg.masks.palette import voc_palette
from moduseg.structures import IGNORE_INDEX

FORMAT = 1
"""Raised when the files of a report change meaning, so that older pages are written again."""
_FOLDERS = ("app", "bank", "data", "photos")
_NONE: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.uint16), np.zeros(0, np.uint32))


class Page:
    """A folder that becomes a report.

    Args:
        folder: where `index.html` goes; what an earlier report left there is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "index.html").unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)

    def script(self, key: str, value: Any) -> None:
        """Write `data/<key>.js`."""
        write_atomic(self.folder / "data" / f"{key}.js", script(key, value))

    def file(self, relative: str, data: bytes) -> None:
        """Write a picture."""
        write_atomic(self.folder / relative, data)

    def finish(self) -> Path:
        """Add the program and, at last, `index.html`, whose presence says that the report is whole.

        Returns:
            The path of `index.html`.
        """
        last = b""
        for name, content in sorted(program().items()):
            if name == "index.html":
                last = content
            else:
                write_atomic(self.folder / "app" / name, content)
        write_atomic(self.folder / "index.html", last)
        return self.folder / "index.html"


def program() -> dict[str, bytes]:
    """Return the files of the page itself, by path: `index.html`, style sheets, `main.js`, `lib/`, `views/`."""
    static = resources.files("moduseg.report") / "static"
    folders = [("", static), *((f"{name}/", static / name) for name in ("lib", "views"))]
    return {
        prefix + entry.name: entry.read_bytes()
        for prefix, folder in folders
        for entry in folder.iterdir()
        if entry.is_file()
    }


def program_digest() -> str:
    """sha256, hexadecimal, of `program()`, so that a newer program writes older reports again."""
    whole = hashlib.sha256()
    for name, content in sorted(program().items()):
        whole.update(f"{name}\n{len(content)}\n".encode() + content)
    return whole.hexdigest()


def script(key: str, value: Any) -> bytes:
    """A script that hands `value` to the page under `key`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f"Report.receive({json.dumps(key)},{text});\n".encode("ascii")


def read_script(path: Path) -> Any:
    """The value in a file that `script` made."""
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def figures_of(record: Mapping[str, Any]) -> list[list[Any]]:
    """What stage `evaluate` adds to the head: `[name, value, unit]` rows."""
    rows: list[list[Any]] = []
    masks, proposals = record.get("pseudo_masks"), record.get("proposals")
    if masks:
        rows.append([f"mIoU of pseudo masks, {masks['split']}", masks["miou"], "%"])
    if proposals:
        rows += [[f.title.format_map(proposals), f.read(proposals), f.unit] for f in PROPOSAL_FIGURES]
    return rows


def summary(
    record: Mapping[str, Any] | None,
    *,
    dataset: str,
    split: str,
    what: str,
    classes: Sequence[str],
    has_background: bool,
    uncovered: str,
    label_source: str,
    total: int,
    shown: int,
    config: Mapping[str, Any],
    seconds: Sequence[tuple[str, float]],
    versions: Mapping[str, str | None],
    run: str,
) -> dict[str, Any]:
    """The head of a report, JSON values.

    Args:
        record: what `results.json` says of the label maps; `None` where there is no ground truth.
        dataset, split: whose images these are.
        what: `prediction` or `pseudo mask`.
        classes: names, background first.
        has_background, uncovered: see `moduseg.evaluation.confusion.label_counts`.
        label_source: of the image-level labels.
        total: images of the split.
        shown: images in the report.
        config: of the run, plain values.
        seconds: time of each step, in the order of the data.
        versions: of the packages.
        run: name of the run's folder.
    """
    kept = dict.fromkeys(
        (*(measure.path[0] for measure in MEASURES), "miou_interval", "confusion", "images", "left_out")
    )
    benchmark = f"{dataset}/{split}"
    published = [
        {"method": row.method, "value": row.value, "note": row.note, "source": row.source}
        for row in PUBLISHED
        if benchmark in BENCHMARKS and row.benchmark == benchmark and row.table == "main" and what == "prediction"
    ]
    return {
        "format": FORMAT,
        "run": run,
        "dataset": dataset,
        "split": split,
        "what": what,
        "classes": list(classes),
        "colours": [
            f"#{bytes(colour).hex()}" for colour in voc_palette()[[*range(len(classes)), IGNORE_INDEX]].tolist()
        ],
        "ignore": IGNORE_INDEX,
        "has_background": has_background,
        "ignore_uncovered": uncovered == "ignore",
        "label_source": label_source,
        "total": total,
        "shown": shown,
        "record": None if record is None else {key: record[key] for key in kept if key in record},
        "measures": [measure.describe() for measure in MEASURES],
        "published": published,
        "figures": [],
        "config": OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        "retrieval": dict(config.get("retrieval") or {}),
        "seconds": [[name, round(value, 2)] for name, value in seconds],
        "versions": {name: version for name, version in versions.items() if version},
        "why": False,
        "bank": False,
        "compare": None,
    }


def cells_of(counts: SplitCounts, ids: Sequence[str]) -> list[list[list[int]]]:
    """Of each image the confusion's cells that are not zero: `[cells, values]`, empty for one that was not scored."""
    position = {image_id: i for i, image_id in enumerate(counts.ids)}
    found = []
    for image_id in ids:
        cells, values = counts.cells(position[image_id]) if image_id in position else _NONE
        found.append([[int(v) for v in cells], [int(v) for v in values]])
    return found
