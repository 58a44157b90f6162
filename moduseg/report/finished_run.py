"""Open a finished run for a report: its label maps, its figures, and the artefacts it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.config import Config
from moduseg.config.stored import reconfigure
from moduseg.datasets.base import Dataset
from moduseg.datasets.vocabulary import RewordedDataset, WordList
from moduseg.errors import ArtefactError, DataError, MissingError
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.predictions import PredictionFolder
from moduseg.files import read_json
from moduseg.pipeline.manifests import StageFolder, stage_seconds
from moduseg.pipeline.workspace import Workspace

STAGES = ("infer", "evaluate", "pseudo_masks", "segment", "discover", "predict_student")
"""The stages whose folders can be reported on."""
_EMPTY_GROUPS: Mapping[str, Any] = {
    **{name: {} for name in ("proposer", "backbone", "bank", "retrieval")},
    "pseudo_masks": {"generator": {}},
}
"""Groups that a run on PNGs of another tool lacks; a report depends on none of their values."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run whose label maps a report shows.

    Attributes:
        folder: of the stage that wrote the label maps.
        what: `prediction`, `pseudo mask` or `clusters`.
        dataset: the split that was labelled.
        record: its figures; `None` if there is no ground truth.
        counts: pixel counts of each image; `None` if there is no ground truth.
        read_label_map: image id -> `[H, W]` uint8; `DataError` if it cannot be read.
        ids: images with a label map.
        inputs: folders of the artefacts it was made from, by stage, as far as they still exist.
        seconds: name and time of each step behind it, in the order of the data.
    """

    folder: StageFolder
    what: str
    dataset: Dataset
    record: Mapping[str, Any] | None
    counts: SplitCounts | None
    read_label_map: Callable[[str], np.ndarray]
    ids: tuple[str, ...]
    inputs: Mapping[str, StageFolder]
    seconds: Sequence[tuple[str, float]]

    @property
    def path(self) -> Path:
        """The path of its folder."""
        return self.folder.path

    @property
    def ignores_uncovered(self) -> bool:
        """Whether pixels predicted 0 are not scored, in a data set where 0 is no class."""
        return ((self.record or {}).get("uncovered") or {}).get("rule") == "ignore"


def read_run_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a finished run, with overrides such as `dataset.root=<folder>`.

    Raises:
        MissingError: no such folder.
        ArtefactError: it holds no run that can be reported on.
        ConfigError: an override is not allowed.
    """
    folder = _find_label_maps(path)
    content = folder.manifest.get("config")
    if content is None and (folder.path / "results.json").is_file():
        results = read_json(folder.path / "results.json")
        content = results.get("prediction", results).get("config")
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{folder.path}: got a manifest without a configuration, expected a finished run; run it again"
        )
    cfg = reconfigure({**_EMPTY_GROUPS, **content}, overrides)
    outputs = folder.path.resolve().parents[2]
    root = Path(str(cfg.dataset.get("root", "")))
    if not root.is_absolute() and not root.is_dir() and (outputs.parent / root).is_dir():
        # The run was started from a different working directory.
        cfg = dataclasses.replace(cfg, dataset={**cfg.dataset, "root": str(outputs.parent / root)})
    return dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, outputs=str(outputs)))


def open_run(path: Path, work: Workspace) -> FinishedRun:
    """Open the folder of a finished run.

    Args:
        path: an artefact of `infer`, `evaluate`, `segment`, `discover`, `predict_student` or `pseudo_masks`; for
            `evaluate`, the run that it evaluated is opened.
        work: of the run's configuration (`read_run_config`).

    Raises:
        MissingError: no such folder.
        ArtefactError: it holds no run that can be reported on.
        DataError: it has no label map.
    """
    folder = _find_label_maps(path)
    # Pseudo masks are of the training split, everything else of the evaluated one.
    is_pseudo = folder.stage == "pseudo_masks"
    if folder.stage == "discover":
        return _open_clusters(folder, work)
    if folder.stage == "segment":
        dataset = work.reworded_dataset(str(folder.manifest.get("split", work.eval_split)))
    else:
        dataset = work.dataset(str(folder.manifest.get("split", work.train_split)) if is_pseudo else work.eval_split)
    ids = tuple(image_id for image_id in dataset.ids if image_id not in folder.failures)
    if not ids:
        raise DataError(f"{folder.path}: got no label map, expected one or more; see failures.jsonl there")
    # Without ground truth there are no results.
    record = counts = None
    if (folder.path / "results.json").is_file():
        content = read_json(folder.path / "results.json")
        record = content.get("prediction", content)
        counts = SplitCounts.from_bytes((folder.path / FILE).read_bytes(), str(folder.path / FILE))
    return FinishedRun(
        folder=folder,
        what="pseudo mask" if is_pseudo else "prediction",
        dataset=dataset,
        record=record,
        counts=counts,
        read_label_map=_make_reader(folder, dataset),
        ids=ids,
        inputs={stage: StageFolder(location) for stage, location in folder.nearest_inputs().items()},
        seconds=stage_seconds(folder.path),
    )


def _open_clusters(folder: StageFolder, work: Workspace) -> FinishedRun:
    """Open a run of `discover`: its clusters are the classes, named as the matching of the set names them.

    Raises:
        DataError: it has no label map.
    """
    dataset = work.dataset(str(folder.manifest.get("split", work.eval_split)))
    ids = tuple(image_id for image_id in dataset.ids if image_id not in folder.failures)
    if not ids:
        raise DataError(f"{folder.path}: got no label map, expected one or more; see failures.jsonl there")
    file = folder.path / "results.json"
    results = read_json(file) if file.is_file() else {}
    matched = results.get("class_of_cluster") or [None] * int(folder.manifest["clusters"])
    names = [f"cluster {i + 1}" + (f" ({name})" if name else "") for i, name in enumerate(matched)]
    return FinishedRun(
        folder=folder,
        what="clusters",
        dataset=RewordedDataset(dataset, WordList(tuple(names), tuple((name,) for name in names))),
        record=None,
        counts=None,
        read_label_map=folder.label_map,
        ids=ids,
        inputs={},
        seconds=stage_seconds(folder.path),
    )


def _find_label_maps(path: Path) -> StageFolder:
    """Return the folder of a run with label maps: `path` itself, or the run that stage `evaluate` evaluated there."""
    if not path.is_dir():
        raise MissingError(f"report: got '{path}', no such folder; expected the folder of a run; set run=<folder>")
    folder = StageFolder(path)
    stage = folder.manifest.get("stage")
    if stage not in STAGES or folder.manifest.get("status") != "complete":
        got = f"a {stage} artefact" if stage not in STAGES and stage else "no finished run"
        raise ArtefactError(
            f"report: got '{path}', {got}; expected a finished folder of {', '.join(STAGES)}; for PNGs of another tool "
            "set predictions=<folder> dataset=<name>"
        )
    evaluated = folder.manifest.get("inputs", {}).get("infer")
    if stage != "evaluate" or evaluated is None:
        return folder
    location = folder.locate(str(evaluated))
    if location is None:
        raise ArtefactError(f"{path}: its infer artefact {evaluated} is gone; run scripts/infer.py again")
    return _find_label_maps(location)


def _make_reader(folder: StageFolder, dataset: Dataset) -> Callable[[str], np.ndarray]:
    """Return the reader of a run's label maps; those of another tool are checked."""
    if folder.stage != "evaluate":
        return folder.label_map
    predictions = PredictionFolder(Path(str(folder.manifest.get("predictions"))), dataset.ids, len(dataset.classes))
    return lambda image_id: predictions.read(image_id, dataset.image_size(image_id))
