"""Label maps on disk against ground truth: figures, table and panels, written beside the label maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moduseg.datasets.base import Dataset
from moduseg.datasets.io import read_label_png
from moduseg.errors import DataError
from moduseg.evaluation.bootstrap import bootstrap_miou, image_counts
from moduseg.evaluation.confusion import ConfusionMatrix
from moduseg.evaluation.tables import results_markdown, results_record
from moduseg.proposers import sa1b
from moduseg.report.panel import image_panel
from moduseg.runtime.artefacts import Artefact, read_json, write_atomic, write_json
from moduseg.runtime.engine import Outcome
from moduseg.stages.common import Workspace, log, safe_name
from moduseg.structures import IGNORE_INDEX


def needs_scoring(work: Workspace, artefact: Artefact, outcome: Outcome) -> bool:
    """Whether `results.json` is missing, older than the label maps, or made with other evaluation settings."""
    file = artefact.path / "results.json"
    if outcome.changed or not file.is_file():
        return True
    return bool(read_json(file)["config"]["evaluation"] != work.cfg.as_dict()["evaluation"])


def score_label_maps(
    work: Workspace,
    artefact: Artefact,
    outcome: Outcome,
    dataset: Dataset,
    proposals: Path | None,
    what: str,
    inputs: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Score `labels/*.png` of an artefact; write `results.json`, `results.md` and `panels/`.

    Pixels that a pseudo mask leaves open (255) count as background, as they would on a screen; predictions have none.
    Images without ground truth are left out and named.

    Args:
        work: configuration and rooms.
        artefact: holds the label maps.
        outcome: of the stage that made them.
        dataset: the split they belong to.
        proposals: the artefact of stage `propose`, for the panels; `None` leaves that column out.
        what: `prediction` or `pseudo mask`, for the panels.
        inputs: artefacts it was made from, by stage; their seconds are listed.

    Returns:
        What `results.json` holds.
    """
    settings = work.cfg.evaluation
    matrix = ConfusionMatrix(len(dataset.classes))
    per_image = []
    left_out = list(outcome.failed)
    scored = []
    for image_id in tqdm(dataset.ids, desc=f"score {what}s", unit="img", leave=False):
        if image_id in outcome.failed:
            continue
        try:
            truth = dataset.load(image_id, truth=True, labels=False).semantic
        except DataError as error:
            log.warning("not scored: %s", error)
            truth = None
        if truth is None:
            left_out.append(image_id)
            continue
        labels = read_label_png(artefact.file(safe_name(f"labels/{image_id}", ".png")))
        if what != "prediction":
            labels = np.where(labels == IGNORE_INDEX, 0, labels)
        per_image.append(matrix.update(truth, labels, image_id))
        scored.append(image_id)
    if not scored:
        raise DataError(f"{dataset.name} {dataset.split}: no image has ground truth; check the folder of label maps")
    interval = None
    if settings.bootstrap:
        interval = bootstrap_miou(image_counts(per_image), settings.bootstrap, seed=work.cfg.runtime.seed)
    seconds = {artefact.stage: sum(outcome.seconds.values())}
    for stage, path in (inputs or {}).items():
        seconds[stage] = sum(read_json(path / "manifest.json").get("seconds", {}).values())
    record = results_record(
        matrix.matrix,
        dataset.classes,
        dataset=dataset.name,
        split=dataset.split,
        images=len(scored),
        label_source=work.dataset(work.train_split).label_source,
        config=work.cfg.as_dict(),
        seconds=seconds,
        failures=left_out,
        interval=interval,
        extra={"refinement": "none (no CRF, no test-time augmentation)", "seed": work.cfg.runtime.seed},
    )
    table = results_markdown(record)
    write_json(artefact.path / "results.json", record)
    write_atomic(artefact.path / "results.md", table.encode())
    draw_panels(artefact, dataset, scored, proposals, what, settings.panels)
    log.info("%s\nresults: %s", table.rstrip(), artefact.path / "results.json")
    if settings.panels:
        log.info("panels:  %s", artefact.path / "panels")
    return record


def draw_panels(
    artefact: Artefact, dataset: Dataset, scored: list[str], proposals: Path | None, what: str, count: int
) -> None:
    """Panels of `count` images spread evenly over the split; truth and errors are left out where there is no truth.

    Args:
        artefact: holds `labels/<id>.png`; the pictures go to its `panels/`.
        dataset: the images.
        scored: ids to choose from.
        proposals: the artefact of stage `propose`; `None` leaves that column out.
        what: `prediction` or `pseudo mask`.
        count: how many.
    """
    chosen = sorted({int(i) for i in np.linspace(0, len(scored) - 1, min(count, len(scored)))})
    for image_id in (scored[i] for i in chosen):
        sample = dataset.load(image_id, truth=True, labels=False)
        masks = None
        if proposals is not None:
            masks = sa1b.read_proposals(proposals / safe_name(f"masks/{image_id}", ".json"), sample.size).masks
        picture = image_panel(
            sample.image,
            dataset.classes,
            proposals=masks,
            labels=read_label_png(artefact.file(safe_name(f"labels/{image_id}", ".png"))),
            labels_title=what,
            truth=sample.semantic,
            title=image_id,
        )
        write_atomic(artefact.file(safe_name(f"panels/{image_id}", ".png")), picture)
