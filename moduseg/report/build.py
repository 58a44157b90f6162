"""Write the report of a finished run: a folder `report/` beside its results, whose page a browser opens from disk.

`infer` and `evaluate` write it if `evaluation.report` is set; `scripts/report.py` writes it for any finished run, for
PNGs of another tool, and for two runs side by side. Everything is read from what the stages stored: no model runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.bank.derived import digest_bank
from moduseg.bank.edit import remap_classes
from moduseg.bank.store import Bank
from moduseg.config import Config
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.files import digest_of, file_digest, read_json, write_atomic, write_json
from moduseg.pipeline.workspace import Workspace, log
from moduseg.report.bank_data import write_bank
from moduseg.report.finished_run import FinishedRun, open_run
from moduseg.report.fit_pictures import write_fit_pictures
from moduseg.report.image_data import RetrievalReplay, write_images
from moduseg.report.overview_data import list_changes, list_figures, make_image_list, make_overview
from moduseg.report.page import Page, digest_program, make_script, read_script
from moduseg.retrieval.ranking import find_ranking

FOLDER = "report"
"""Folder of the report inside that of its run."""


def choose_ids(cfg: Config, ids: Sequence[str]) -> list[str]:
    """Return the images that a report shows: all, or `evaluation.report_images` of them, evenly spaced."""
    max_shown = cfg.evaluation.report_images
    if len(ids) <= max_shown:
        return list(ids)
    return [ids[int(index)] for index in np.linspace(0, len(ids) - 1, max_shown).round()]


@dataclass(frozen=True)
class Comparison:
    """A second run that a report shows beside the first.

    Attributes:
        second: the run.
        record: what `moduseg.evaluation.compare.compare` says of the two.
    """

    second: FinishedRun
    record: Mapping[str, Any]


def write_report_of_run(work: Workspace, path: Path, changed: bool) -> None:
    """Write the report of a run that a stage has just ended, if `evaluation.report` asks for it.

    Args:
        work: of the run.
        path: its folder, complete.
        changed: whether its label maps differ from those of an earlier report.

    A report that cannot be written (a photograph that is gone) costs a warning, never the run.
    """
    if not work.cfg.evaluation.report:
        return
    folder = path / FOLDER
    if not changed and (folder / "index.html").is_file() and _stored_key(folder) == report_key(work.cfg, path):
        return
    try:
        write_report(work, open_run(path, work), folder)
    except (ConfigError, DataError, ArtefactError, MissingError) as error:
        log.warning("report: not written: %s", error)


def add_figures(path: Path, record: Mapping[str, Any]) -> None:
    """Add the figures of pseudo masks and proposals to the report of the run that stage `evaluate` evaluated."""
    file = path / FOLDER / "data" / "summary.js"
    if not (path / FOLDER / "index.html").is_file() or not file.is_file():
        return
    content = read_script(file)
    rows = list_figures(record)
    if content["figures"] != rows:
        content["figures"] = rows
        write_atomic(file, make_script("summary", content))


def write_report(work: Workspace, run: FinishedRun, folder: Path, comparison: Comparison | None = None) -> Path:
    """Write the report of an opened run, and return the path of `index.html`.

    Args:
        work: of its configuration.
        run: the run.
        folder: where it goes; an earlier report there is replaced.
        comparison: a second run to show beside it.

    Raises:
        DataError: a label map cannot be read.
    """
    start = time.perf_counter()
    second = comparison.second if comparison else None
    ids = _choose_shared_ids(work.cfg, run, second)
    page = Page(folder)
    # Without the bank and the query vectors, label maps are shown, but not why they came out so.
    stored = bank = replay = None
    if {"build_bank", "queries", "propose"} <= set(run.inputs):
        stored = bank = Bank.load(run.inputs["build_bank"].path)
        if work.cfg.bank.path is not None:
            bank = remap_classes(stored, run.dataset.classes)
        words = work.region_encoder.words if work.cfg.uses_words else None
        ranking = None
        if work.cfg.retrieval.selection == "learnt":
            ranking = find_ranking(run.inputs.get("fit_ranking", run.inputs["build_bank"]).path).align(bank.classes)
        device = work.device.torch_device
        replay = RetrievalReplay(work.cfg, bank, run.inputs["queries"], device, words=words, ranking=ranking)
    images = write_images(work, run, page, ids, replay=replay, second=second)
    if stored is not None and bank is not None and replay is not None:
        write_bank(work, run, page, bank=bank, digest=digest_bank(stored), replay=replay, images=images)
    # The scripts that the page loads at once: the list of images and the head.
    page.write_data("images", make_image_list(run, ids, images.entries, second))
    overview = make_overview(work, run, len(ids))
    overview |= {"why": any(entry.num_proposals is not None for entry in images.entries), "bank": bank is not None}
    if any(entry.has_heat for entry in images.entries):
        overview["heat"] = work.generator.score_title
    overview["fit"] = write_fit_pictures(run, page)
    if comparison is not None:
        overview["compare"] = {**comparison.record, "changes": list_changes(run, comparison.second)}
    page.write_data("summary", overview)
    # A report of two runs is written on demand alone, so it has no key to compare with.
    key = report_key(work.cfg, run.path) if comparison is None else ""
    write_json(folder / "report.json", {"stamp": key, "images": len(ids)})
    index = page.write_index()
    log.info("report:  %s (%.1f s)", index, time.perf_counter() - start)
    return index


def _choose_shared_ids(cfg: Config, run: FinishedRun, second: FinishedRun | None) -> list[str]:
    """Return the images to show, those that both runs have."""
    labelled = set(run.ids if second is None else second.ids)
    shared = [image_id for image_id in run.ids if image_id in labelled]
    shown = choose_ids(cfg, shared)
    if len(shown) < len(shared):
        log.warning(
            "report: %d of %d images are shown, evenly spaced; set evaluation.report_images", len(shown), len(shared)
        )
    return shown


def report_key(cfg: Config, path: Path) -> str:
    """Return a digest of all that a run's report depends on: the page's scripts, its settings and the results."""
    results = path / "results.json"
    settings = {key: value for key, value in cfg.as_dict()["evaluation"].items() if key.startswith("report")}
    scored = file_digest(results) if results.is_file() else None
    return digest_of({"program": digest_program(), "settings": settings, "results": scored})


def _stored_key(folder: Path) -> str:
    file = folder / "report.json"
    return str(read_json(file).get("stamp")) if file.is_file() else ""
