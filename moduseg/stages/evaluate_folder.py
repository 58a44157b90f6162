"""Anyone's predictions scored: a folder of PNGs in place of a run's own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.config import Config
from moduseg.errors import ConfigError, DataError
from moduseg.evaluation.counts import FILE
from moduseg.evaluation.predictions import PredictionFolder
from moduseg.evaluation.tables import ScoredRun, results_markdown
from moduseg.files import read_json, to_json_values, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.workspace import Workspace, log
from moduseg.stages.evaluate_masks import count_split, draw_panels, lacks_measures, make_record, scoring_settings

UNKNOWN = "unknown (predictions made elsewhere)"


def open_predictions(cfg: Config, work: Workspace) -> PredictionFolder:
    """The folder that `predictions` names, with a file for every image of the evaluated split.

    Raises:
        ConfigError: none is named.
        MissingError, DataError: see `PredictionFolder`.
    """
    if not cfg.predictions:
        raise ConfigError("predictions: got nothing, expected a folder of <id>.png; set predictions=<folder>")
    dataset = work.dataset(work.eval_split)
    return PredictionFolder(Path(cfg.predictions).expanduser(), dataset.ids, len(dataset.classes))


def content_digest(folder: PredictionFolder) -> str:
    """sha256, hexadecimal, of every image's id and file."""
    digest = hashlib.sha256()
    for image_id in folder.ids:
        content = hashlib.sha256(folder.path(image_id).read_bytes()).hexdigest()
        digest.update(f"{image_id}\n{content}\n".encode())
    return digest.hexdigest()


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Score the PNGs of `cfg.predictions` on the evaluated split.

    Returns:
        The artefact's folder: `results.json` (as stage `evaluate` writes it, without the figures that need a run),
        `results.md`, the counts of each image and `panels/`.

    Raises:
        DataError: a prediction is missing or does not fit, or the split has no ground truth.
    """
    work = work or Workspace(cfg)
    dataset = work.dataset(work.eval_split)
    if not dataset.has_truth:
        raise DataError(
            f"{dataset.name} {dataset.split}: got no ground truth, expected label maps to score against; set "
            "dataset.val_split=<a split with truth>, or pack the predictions with scripts/voc_package.py"
        )
    folder = open_predictions(cfg, work)
    name = folder.folder.resolve().name or "predictions"
    parts = {
        "dataset": work.dataset_parts(work.eval_split),
        "predictions": content_digest(folder),
        "evaluation": to_json_values(scoring_settings(cfg)),
        "seed": cfg.runtime.seed,
    }
    artefact = work.artefact("evaluate", f"{name}-{work.eval_split}", parts)
    file = artefact.path / "results.json"
    is_done = artefact.is_intact(cfg.runtime.verify)
    if not is_done or lacks_measures(read_json(file)["prediction"], dataset, cfg.evaluation):
        _score(cfg, work, folder, artefact)
    text = (artefact.path / "results.md").read_text(encoding="utf-8").rstrip()
    log.info("%s\nevaluate: %s -> %s", text, folder.folder, artefact.path)
    return artefact.path


def _score(cfg: Config, work: Workspace, folder: PredictionFolder, artefact: Artefact) -> None:
    dataset = work.dataset(work.eval_split)
    counts, left_out = count_split(work, dataset, dataset.ids, folder.read, "score predictions")
    settings = cfg.as_dict()
    run = ScoredRun(
        dataset.name,
        dataset.split,
        len(counts),
        label_source=UNKNOWN,
        config={key: settings[key] for key in ("predictions", "dataset", "evaluation", "runtime")},
        failures=left_out,
        extra={"refinement": UNKNOWN, "seed": cfg.runtime.seed},
    )
    record = make_record(work, dataset, counts, run)

    def read_prediction(image_id: str) -> np.ndarray:
        return folder.read(image_id, dataset.image_size(image_id))

    results: dict[str, Any] = {"prediction": record, "pseudo_masks": None, "proposals": None, "bank": None}
    write_atomic(artefact.path / FILE, counts.to_bytes())
    write_json(artefact.path / "results.json", results)
    write_atomic(artefact.path / "results.md", results_markdown(record).encode())
    try:
        draw_panels(artefact, dataset, counts.ids, cfg.evaluation, read=read_prediction)
    except DataError as error:
        # The figures need the truth alone; a photograph that is not at hand costs the pictures, not them.
        log.warning("evaluate: no panels: %s", error)
    artefact.write_manifest(status="complete", images=len(dataset.ids), failures=0, predictions=str(folder.folder))
