"""What a folder of tagged photographs costs: seconds and peak memory of bank, label maps and first result page.

The photographs are coco150's, of both splits; beyond its 150 they come again as mirror images, so that none is equal to
another one and no cache helps.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.common import Row, Setting, make_unmeasured_row
from benchmarks.engine import MemoryWatch, in_process, make_scratch
from moduseg import datasets
from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import write_rgb_png
from moduseg.errors import MissingError
from moduseg.files import write_atomic
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.structures import Sample

COUNTS = (6, 24, 100, 240)
SECONDS = 6.0
"""Of CPU time a photograph, all steps together."""
PEAK_MB = 2000.0
PRESET = ("experiment=photos_light",)
SMALL = ("dataset=folder", "proposer=superpixels", "pseudo_masks=cam_photo", "backbone=miniature_random")
COUNTS_KEY = "MODUSEG_BENCHMARK_PHOTOGRAPHS"
"""Environment variable with other counts, such as `6,24`."""


def photographs(setting: Setting) -> list[Row]:
    """Measure bank and label maps of folders of 6, 24, 100 and 240 tagged photographs, each in its own process."""
    wanted = os.environ.get(COUNTS_KEY)
    counts = (2, 4) if setting.is_small else tuple(map(int, wanted.split(","))) if wanted else COUNTS
    target = f"at most {SECONDS:g} s of CPU time a photograph, {PEAK_MB:g} MB at the peak"
    rows = []
    for count in counts:
        figure = f"{count} tagged photographs: bank, label maps, report"
        with make_scratch() as folder:
            try:
                samples = _list_photographs(count, is_small=setting.is_small)
            except MissingError as error:
                rows.append(make_unmeasured_row(figure, target, str(error)))
                continue
            _write_folder(folder / "photographs", samples)
            arguments = [
                *(SMALL if setting.is_small else PRESET),
                f"runtime.device={setting.device}",
                f"dataset.root={folder / 'photographs'}",
                f"runtime.outputs={folder / 'outputs'}",
            ]
            wall, cpu, megabytes = in_process(_run, arguments)
        text = (
            f"{cpu:.0f} s of CPU time ({cpu / count:.2f} s a photograph), {wall:.0f} s on the clock; {megabytes:.0f} MB"
        )
        details = {"photographs": count, "seconds": wall, "cpu_seconds": cpu, "megabytes": megabytes}
        rows.append(Row(figure, target, text, cpu / count <= SECONDS and megabytes <= PEAK_MB, details))
    return rows


def _list_photographs(count: int, *, is_small: bool) -> list[tuple[Dataset, str]]:
    """Return data set and id of so many photographs; after the last one comes the first one again.

    Raises:
        MissingError: coco150 is not there.
    """
    cfg = compose([] if is_small else ["dataset=coco150"])
    splits = [datasets.build(cfg.dataset, str(cfg.dataset.get(f"{name}_split", name))) for name in ("train", "val")]
    known = [(split, image_id) for split in splits for image_id in split.ids[:count]]
    return [known[index % len(known)] for index in range(count)]


def _write_folder(root: Path, photographs: Sequence[tuple[Dataset, str]]) -> None:
    """Write `images/` and `labels.csv`; a photograph that comes again is mirrored: left and right, then up and down."""
    lines = ["image,labels"]
    seen: dict[str, int] = {}
    for index, (dataset, image_id) in enumerate(photographs):
        sample: Sample = dataset.load(image_id)
        turn = seen[image_id] = seen.get(image_id, -1) + 1
        pixels = sample.image[:: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]
        name = f"{index:04d}.png"
        write_atomic(root / "images" / name, write_rgb_png(np.ascontiguousarray(pixels)))
        lines.append(f"{name}," + ";".join(dataset.classes[label] for label in sample.labels or ()))
    write_atomic(root / "labels.csv", ("\n".join(lines) + "\n").encode())


def _run(pipe: Connection, arguments: list[str]) -> None:
    """Send seconds on the clock, CPU seconds of all threads, imports included, and the peak of memory in megabytes."""
    logging.getLogger("moduseg").setLevel(logging.ERROR)
    begun, watch = time.perf_counter(), MemoryWatch()
    cfg = compose(arguments)
    work = Workspace(cfg)
    BuildBank.run(cfg, work)
    Infer.run(cfg, work)
    pipe.send((time.perf_counter() - begun, time.process_time(), watch.peak_megabytes))
