"""A finished run as a report needs it: its label maps, figures, and the artefacts it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg.config import Config, from_hydra
from moduseg.datasets.base import Dataset
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.predictions import PredictionFolder
from moduseg.files import read_json
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace

STAGES = ("infer", "evaluate", "pseudo_masks")
"""The stages whose folders can be reported on."""


@dataclass(frozen=True)
class Source:
    """One run.

    Attributes:
        path: its folder.
        stage: which wrote it.
        what: `prediction` or `pseudo mask`.
        dataset: the split that was labelled.
        record: the figures, `None` where there is no ground truth.
        counts: of each image, likewise.
        read: id -> `[H, W]` uint8 label map; `DataError` where it cannot be read.
        ids: images that have one.
        failed: images without a label map.
        inputs: folders of the artefacts it was made from, by stage; those that are gone are left out.
        seconds: time of each step behind it, in the order of the data.
    """

    path: Path
    stage: str
    what: str
    dataset: Dataset
    record: Mapping[str, Any] | None
    counts: SplitCounts | None
    read: Callable[[str], np.ndarray]
    ids: tuple[str, ...]
    failed: tuple[str, ...]
    inputs: Mapping[str, Path]
    seconds: Sequence[tuple[str, float]]

    @property
    def rule(self) -> str:
        """How pixels predicted 0 count where that is no class: see `label_counts`."""
        uncovered = (self.record or {}).get("uncovered") or {}
        return str(uncovered.get("rule", "wrong"))


def config_of(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a finished run, with overrides such as `dataset.root=<folder>` or `runtime.device=cpu`.

    Raises:
        MissingError: no such folder.
        ArtefactError: it holds no run that can be reported on.
        ConfigError: an override is not allowed.
    """
    manifest = _manifest(path)
    if manifest["stage"] == "evaluate" and "infer" in manifest.get("inputs", {}):
        return config_of(_input(path, manifest, "infer"), overrides)
    content = manifest.get("config")
    if content is None and (path / "results.json").is_file():
        results = read_json(path / "results.json")
        content = results.get("prediction", results).get("config")
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: got a manifest without a configuration, expected a finished run; run it again")
    content = {**_defaults(), **content}
    try:
        changed = OmegaConf.merge(OmegaConf.create(content), OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"report: {' '.join(str(error).split())}; try dataset.root=<folder>") from error
    cfg = from_hydra({str(k): v for k, v in OmegaConf.to_container(changed).items()})  # type: ignore[union-attr]
    outputs = path.resolve().parents[2]
    root = Path(str(cfg.dataset.get("root", "")))
    if not root.is_absolute() and not root.is_dir() and (outputs.parent / root).is_dir():
        # The run was made from another folder than this command is given in.
        cfg = dataclasses.replace(cfg, dataset={**cfg.dataset, "root": str(outputs.parent / root)})
    return dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, outputs=str(outputs)))


def open_source(path: Path, work: Workspace) -> Source:
    """Open the folder of a finished run.

    Args:
        path: an artefact of `infer`, `evaluate` or `pseudo_masks`.
        work: of its configuration (`config_of`).

    Raises:
        MissingError, ArtefactError: see `config_of`.
        DataError: it has no label map.
    """
    manifest = _manifest(path)
    stage = str(manifest["stage"])
    if stage == "evaluate" and "infer" in manifest.get("inputs", {}):
        return open_source(_input(path, manifest, "infer"), work)
    split = str(manifest.get("split", work.train_split)) if stage == "pseudo_masks" else work.eval_split
    dataset = work.dataset(split)
    record = counts = None
    if (path / "results.json").is_file():
        content = read_json(path / "results.json")
        record = content.get("prediction", content)
        counts = SplitCounts.from_bytes((path / FILE).read_bytes(), str(path / FILE))
    failed = tuple(StageFolder(path).failures)
    ids = tuple(image_id for image_id in dataset.ids if image_id not in failed)
    if stage == "evaluate":
        folder = PredictionFolder(Path(str(manifest.get("predictions"))), dataset.ids, len(dataset.classes))
        read: Callable[[str], np.ndarray] = partial(_read_checked, folder, dataset)
    else:
        read = partial(_read_own, path)
    if not ids:
        raise DataError(f"{path}: got no label map, expected one or more; see failures.jsonl there")
    return Source(
        path,
        stage,
        "pseudo mask" if stage == "pseudo_masks" else "prediction",
        dataset,
        record,
        counts,
        read,
        ids,
        failed,
        StageFolder(path).nearest_inputs(),
        _seconds(path),
    )


def _read_own(path: Path, image_id: str) -> np.ndarray:
    return StageFolder(path).label_map(image_id)


def _read_checked(folder: PredictionFolder, dataset: Dataset, image_id: str) -> np.ndarray:
    return folder.read(image_id, dataset.image_size(image_id))


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise MissingError(f"report: got '{path}', no such folder; expected the folder of a run; set run=<folder>")
    file = path / "manifest.json"
    manifest = read_json(file) if file.is_file() else {}
    stage = manifest.get("stage") if isinstance(manifest, dict) else None
    if stage not in STAGES or manifest.get("status") != "complete":
        got = f"a {stage} artefact" if stage not in STAGES and stage else "no finished run"
        raise ArtefactError(
            f"report: got '{path}', {got}; expected a finished folder of {', '.join(STAGES)}; for PNGs of another tool "
            "set predictions=<folder> dataset=<name>"
        )
    return dict(manifest)


def _input(path: Path, manifest: Mapping[str, Any], stage: str) -> Path:
    located = StageFolder(path).locate(str(manifest["inputs"][stage]))
    if located is None:
        raise ArtefactError(
            f"{path}: its {stage} artefact {manifest['inputs'][stage]} is gone; run scripts/{stage}.py again"
        )
    return located


def _seconds(path: Path) -> list[tuple[str, float]]:
    """Return the seconds of every artefact behind a run and of itself, each once, in the order of the data."""
    folders = StageFolder(path).provenance()
    return [(folder.title, folder.seconds) for folder in folders if folder.seconds]


def _defaults() -> dict[str, Any]:
    """Groups that a run on PNGs of another tool does not have; nothing of a report depends on their values."""
    plain: dict[str, Any] = {name: {} for name in ("proposer", "backbone", "bank", "retrieval")}
    return {**plain, "pseudo_masks": {"generator": {}}}
