"""What a generator's fit drew, in the report of a run that used it: its training, and where its heads look."""

from __future__ import annotations

import re
from pathlib import Path

from moduseg.report.finished_run import FinishedRun
from moduseg.report.page import Page
from moduseg.training.books import CURVE

_HEADS = re.compile(r"heads_(\d+)\.png")


def write_fit_pictures(run: FinishedRun, page: Page) -> list[list[str]]:
    """Copy the pictures of the fit behind a run into its report.

    Args:
        run: the run; its class scores name the fit.
        page: the report.

    Returns:
        `[title, path inside the report]` of each picture: the training's curves, then the classes in their order;
        nothing if there was no fit, or one that drew nothing.
    """
    scores = run.inputs.get("scores")
    written = None if scores is None else scores.manifest.get("fit")
    folder = None if scores is None or written is None else scores.locate(str(written))
    if folder is None:
        return []
    sources: list[tuple[str, Path]] = [("training", path) for path in sorted(folder.glob(f"training-*/{CURVE}"))]
    for path in sorted(folder.glob("figures/heads_*.png")):
        match = _HEADS.fullmatch(path.name)
        if match is not None and int(match[1]) < len(run.dataset.classes):
            sources.append((f"heads of {run.dataset.classes[int(match[1])]}", path))
    pictures = []
    for index, (title, path) in enumerate(sources):
        name = f"fit/{index}.png"
        page.write_picture(name, path.read_bytes())
        pictures.append([title, name])
    return pictures
