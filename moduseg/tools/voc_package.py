"""Pack predictions for the VOC 2012 evaluation server, which alone has the truth of the split `test`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import write_label_png
from moduseg.datasets.voc import VOC_CLASSES
from moduseg.errors import DataError
from moduseg.evaluation.predictions import PredictionFolder
from moduseg.evaluation.voc_server import NAME, archive_path, pack
from moduseg.files import file_digest, write_atomic
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.stages.evaluate_folder import content_digest, open_predictions
from moduseg.stages.infer import Infer


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Pack the evaluated split's predictions: the run's own, which `infer` makes first, or `predictions`.

    Every image of the split must have a prediction of its size that labels every pixel; colours are VOC's.

    Returns:
        The artefact's folder, with `results.tgz` in it.

    Raises:
        DataError: another class list than VOC's, or a prediction that is missing or does not fit.
    """
    work = work or Workspace(cfg)
    dataset = work.dataset(work.eval_split)
    if dataset.classes != VOC_CLASSES:
        raise DataError(
            f"{dataset.name} {dataset.split}: got {len(dataset.classes)} classes ({', '.join(dataset.classes[:3])}, "
            f"...), expected VOC's {len(VOC_CLASSES)}, which the server scores; set dataset=voc dataset.val_split=test"
        )
    inputs = {}
    if cfg.predictions is None:
        inputs["infer"] = Infer.run(cfg, work)
        if count_failures(inputs["infer"]):
            log.warning("voc_package: images failed on the way, see failures.jsonl beside %s", inputs["infer"])
        cfg = replace(cfg, predictions=str(inputs["infer"] / "labels"))
    folder = open_predictions(cfg, work)
    name = inputs["infer"].name if inputs else folder.folder.resolve().name
    parts = {"split": dataset.split, "predictions": content_digest(folder)}
    artefact = work.artefact("voc_package", name, parts)
    file = artefact.path / NAME
    if not (artefact.is_complete and file.is_file() and artefact.manifest.get("sha256") == file_digest(file)):
        write_atomic(file, pack(_encode_predictions(dataset, folder)))
        artefact.write_manifest(
            status="complete",
            images=len(dataset.ids),
            failures=0,
            sha256=file_digest(file),
            inputs={stage: str(path) for stage, path in inputs.items()},
        )
    log.info("voc_package: %d images of %s -> %s", len(dataset.ids), dataset.split, file)
    return artefact.path


def _encode_predictions(dataset: Dataset, folder: PredictionFolder) -> Iterator[tuple[str, bytes]]:
    """Yield the path inside the archive and the PNG of each image."""
    for image_id in track(dataset.ids, "pack"):
        labels = folder.read(image_id, dataset.image_size(image_id))
        yield archive_path(dataset.split, image_id), write_label_png(labels)
