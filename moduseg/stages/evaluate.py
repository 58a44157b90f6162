"""Stage `evaluate`: the figures of a whole run in one place: predictions, pseudo masks, proposals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.errors import DataError
from moduseg.evaluation.counts import FILE
from moduseg.evaluation.measures import CLASSIFIER_FIGURES, PROPOSAL_FIGURES, format_value
from moduseg.evaluation.proposals import ProposalQuality
from moduseg.evaluation.tables import markdown_table, measure_rows, results_markdown
from moduseg.files import file_digest, read_json, to_json_values, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.report import build
from moduseg.stages import evaluate_folder
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.class_scores import measure_classifier
from moduseg.stages.evaluate_masks import scoring_settings
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks


@dataclass(frozen=True)
class ScoredFolders:
    """The folders of the run that is scored.

    Attributes:
        predictions: of stage `infer`.
        proposals: of stage `propose`.
        bank: of stage `build_bank`, or the bank that `bank.path` names.
        pseudo_masks: of stage `pseudo_masks`; `None` if the bank was made elsewhere, of other pseudo masks.
        has_mask_scores: whether the pseudo masks could be scored.
    """

    predictions: Path
    proposals: Path
    bank: Path
    pseudo_masks: Path | None
    has_mask_scores: bool


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Score predictions of the evaluated split, pseudo masks of the training split, and the proposals.

    If `predictions` names a folder, its PNGs are scored and nothing else.

    Returns:
        The artefact's folder: `results.json` (`prediction`, `pseudo_masks`, `proposals`, `bank`), `results.md` and the
        counts of each image.

    Raises:
        DataError: the evaluated split has no ground truth.
    """
    work = work or Workspace(cfg)
    if cfg.predictions is not None:
        path = evaluate_folder.run(cfg, work)
        build.write_report_of_run(work, path, changed=False)
        return path
    dataset = work.dataset(work.eval_split)
    if not dataset.has_truth:
        raise DataError(
            f"{dataset.name} {dataset.split}: got no ground truth, expected label maps to score against; "
            "use scripts/infer.py, which needs none"
        )
    folders = _run_stages(work)
    artefact = work.artefact("evaluate", f"{cfg.backbone['name']}-{work.eval_split}", _make_key(cfg, folders))
    work.peers.leader_first("evaluate", partial(_complete, work, artefact, folders))
    log.info("%s\nevaluate -> %s", (artefact.path / "results.md").read_text(encoding="utf-8").rstrip(), artefact.path)
    return artefact.path


def _run_stages(work: Workspace) -> ScoredFolders:
    """Run what is scored; stages that are complete return at once."""
    cfg = work.cfg
    predictions, proposals = Infer.run(cfg, work), Propose.run(cfg, work)
    masks = None if cfg.bank.path is not None else PseudoMasks.run(cfg, work)
    has_mask_scores = masks is not None and work.dataset(work.train_split).has_truth
    return ScoredFolders(predictions, proposals, BuildBank.run(cfg, work), masks, has_mask_scores)


def _make_key(cfg: Config, folders: ScoredFolders) -> dict[str, Any]:
    """Return everything that decides the figures."""
    masks = folders.pseudo_masks
    scored = {"infer": folders.predictions}
    if masks is not None and folders.has_mask_scores:
        scored["pseudo_masks"] = masks
    return {
        "infer": folders.predictions.name,
        "proposals": folders.proposals.name,
        "pseudo_masks": "" if masks is None else masks.name,
        "scored": {stage: file_digest(path / "results.json") for stage, path in scored.items()},
        "evaluation": to_json_values(scoring_settings(cfg)),
    }


def _complete(work: Workspace, artefact: Artefact, folders: ScoredFolders) -> None:
    """Write the figures unless they are there, and show them in the report of the predictions."""
    file = artefact.path / "results.json"
    if not artefact.is_intact(work.cfg.runtime.verify):
        dataset, masks = work.dataset(work.eval_split), folders.pseudo_masks
        min_area = work.cfg.evaluation.object_min_area
        record: dict[str, Any] = {
            "prediction": read_json(folders.predictions / "results.json"),
            "pseudo_masks": read_json(masks / "results.json") if masks and folders.has_mask_scores else None,
            "proposals": _measure_proposals(dataset, StageFolder(folders.proposals), min_area),
            "bank": {"vectors": read_json(folders.bank / "bank.json")["counts"]},
        }
        classifier = measure_classifier(work)
        if classifier is not None:
            record["classifier"] = classifier
        write_atomic(artefact.path / FILE, (folders.predictions / FILE).read_bytes())
        write_json(file, record)
        write_atomic(artefact.path / "results.md", _make_table(record).encode())
        inputs = {"infer": folders.predictions, "propose": folders.proposals}
        if masks is not None:
            inputs["pseudo_masks"] = masks
        artefact.write_manifest(
            status="complete",
            images=len(dataset.ids),
            failures=count_failures(folders.predictions),
            inputs={stage: str(path) for stage, path in inputs.items()},
        )
    build.add_figures(folders.predictions, read_json(file))


_measured: dict[tuple[str, str, int], dict[str, Any]] = {}
"""What `_measure_proposals` returned: a table asks for the same proposals in most of its runs."""


def _measure_proposals(dataset: Dataset, proposals: StageFolder, min_area: int) -> dict[str, Any]:
    """Return recall at IoU 0.5 and mean best IoU of objects: instances if the data set has them, else components."""
    # The manifest holds a digest of the files and the key, in which the images and their truth are.
    key = (str(proposals.path.resolve()), file_digest(proposals.path / "manifest.json"), min_area)
    if key not in _measured:
        _measured[key] = _compare_with_objects(dataset, proposals, min_area)
    return dict(_measured[key])


def _compare_with_objects(dataset: Dataset, proposals: StageFolder, min_area: int) -> dict[str, Any]:
    """Return what `_measure_proposals` does, from the files."""
    quality = ProposalQuality(0.5, min_area)
    for image_id in track(dataset.ids, "score proposals"):
        if image_id in proposals.failures:
            continue
        sample = dataset.load(image_id, truth=True, labels=False)
        if sample.semantic is None:
            continue
        masks = proposals.proposals(image_id, sample.size).masks
        with torch.inference_mode():
            quality.update(sample.semantic, masks, sample.instances)
    return quality.summary()


def _make_table(record: dict[str, Any]) -> str:
    """Return the figures of the whole run as Markdown, then those of its predictions class by class."""
    prediction, masks, proposals = record["prediction"], record["pseudo_masks"], record["proposals"]
    rows = measure_rows(prediction)
    if interval := prediction.get("miou_interval"):
        ends = f"{format_value(interval['low'])} to {format_value(interval['high'])}"
        rows.insert(1, ("mIoU, 95 % interval over images", ends))
    if masks is not None:
        rows += [(f"{title}, pseudo masks of {masks['split']}", value) for title, value in measure_rows(masks)]
    if (classifier := record.get("classifier")) is not None:
        rows += [(figure.label(figure.title), figure.format(figure.read(classifier))) for figure in CLASSIFIER_FIGURES]
    rows += [
        (figure.label(figure.title.format_map(proposals)), figure.format(figure.read(proposals)))
        for figure in PROPOSAL_FIGURES
    ]
    rows.append(("vectors in the bank", str(sum(record["bank"]["vectors"].values()))))
    head = f"{prediction['dataset']} {prediction['split']}, {prediction['images']} images, percent"
    return f"{markdown_table((head, 'value'), rows)}\n{results_markdown(prediction)}"
