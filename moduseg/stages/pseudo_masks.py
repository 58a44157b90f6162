"""Stage `pseudo_masks`: class scores -> label maps of the training images (docs/method.md, step 1)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduseg.config import Config, PseudoMasksConfig
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import write_label_png
from moduseg.errors import DataError
from moduseg.files import to_json_values
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.stage import Stage
from moduseg.pseudo_masks.labelling import DIFFUSIONS, ScoredImage, to_label_map
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.evaluate_masks import LabelOrigin, score_or_draw
from moduseg.stages.propose import Propose


class PseudoMasks(Stage[ScoredImage]):
    """Labels the training images from the scores of the classes that their image-level labels name.

    The folder holds `labels/<id>.png` (VOC palette), `failures.jsonl` and `manifest.json`; if the split has ground
    truth, also `results.json`, `results.md` and `panels/`.
    """

    name = "pseudo_masks"
    uses = "train"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"pseudo masks {self.split}"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `scores`, and `propose` on the training split if the refiner looks at proposals."""
        stages: dict[str, Stage[Any]] = {"scores": ClassScores(self.work, self.split)}
        if self.cfg.pseudo_masks.refine == "region_vote":
            stages["propose"] = Propose(self.work, self.split)
        return stages

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.pseudo_masks.generator['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        scores, proposals = self.input_folders["scores"], self.input_folders.get("propose")
        return {"scores": scores.name, **labelling_parts(self.cfg, proposals)}

    def load(self, image_id: str) -> ScoredImage:
        """Return the stored scores of an image with what the refiner looks at."""
        folders = self.input_folders
        return load_scored(self.dataset, self.cfg.pseudo_masks, folders["scores"], folders.get("propose"), image_id)

    def process(self, items: list[ScoredImage]) -> list[Files]:
        """Return the label maps of several images."""
        settings, device = self.cfg.pseudo_masks, self.work.device.torch_device
        return [
            {stored_name("label_map", item.id): partial(encode_label_map, to_label_map(item, settings, device))}
            for item in items
        ]

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image, its scores and, if the refiner looks at them, its proposals."""
        folders = self.input_folders
        files = [self.image_file(image_id), folders["scores"].file("scores", image_id)]
        return files if "propose" not in folders else [*files, folders["propose"].file("proposals", image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score the label maps or draw panels of them, and return the split, for the manifest."""
        # The panels show the proposals that the refiner looked at, or else the generator.
        proposals = self.input_folders.get("propose") or self.input_folders["scores"].inputs.get("propose")
        score_or_draw(
            self.work,
            self.artefact,
            outcome,
            self.dataset,
            proposals=proposals,
            inputs=self.input_folders,
            origin=LabelOrigin(supervision=self.work.generator.supervision),
        )
        return {"split": self.split, **name_supervision(self.work.generator.supervision)}


def labelling_parts(cfg: Config, proposals: StageFolder | None) -> dict[str, Any]:
    """Return the part of a key that stands for what makes label maps of scores.

    Args:
        cfg: the configuration.
        proposals: the folder of those that the refiner or the generator looks at, if one does.
    """
    settings = cfg.pseudo_masks
    parts: dict[str, Any] = {
        "background": to_json_values(cfg.as_dict()["pseudo_masks"]["background"]),
        "refine": [settings.refine, list(settings.dilations), settings.iterations]
        if settings.refine in DIFFUSIONS
        else settings.refine,
        "proposals": proposals.name if proposals is not None else "",
    }
    if settings.min_class_share:
        parts["min_class_share"] = settings.min_class_share
    if settings.spill:
        parts["spill"] = settings.spill
    if proposals is not None and settings.vote_min_score:
        parts["vote_min_score"] = settings.vote_min_score
    return parts


def encode_label_map(label_map: Tensor) -> bytes:
    """Return a `[H, W]` uint8 label map as the bytes of its PNG."""
    return write_label_png(label_map.cpu().numpy())


def label_stored_scores(
    dataset: Dataset,
    settings: PseudoMasksConfig,
    scores: StageFolder,
    proposals: StageFolder | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield label maps of stored scores under any background rule and refiner, running no model and writing nothing.

    A rule or a threshold that is chosen by the quality of these maps is chosen on `dataset`'s split: report it on
    another one.

    Args:
        dataset: the split that was scored.
        settings: rule and refiner; the generator does not matter.
        scores: the folder of stage `scores`.
        proposals: the folder of stage `propose`, for `region_vote`.
        device: where the computation happens; the CPU if omitted.

    Yields:
        Id and `[H, W]` uint8 label map of each image that has scores, in the order of the data set.

    Raises:
        ConfigError: a rule or value that is not allowed.
        DataError: a damaged file, or no proposals for `region_vote`.
    """
    for image_id in dataset.ids:
        if image_id not in scores.failures:
            item = load_scored(dataset, settings, scores, proposals, image_id)
            yield image_id, to_label_map(item, settings, device or torch.device("cpu"))


def load_scored(
    dataset: Dataset, settings: PseudoMasksConfig, scores: StageFolder, proposals: StageFolder | None, image_id: str
) -> ScoredImage:
    """Return what the label map of one image is made from; arguments as those of `label_stored_scores`.

    Raises:
        DataError: a file is missing, damaged or of another size.
    """
    maps = scores.scores(image_id)
    size = (maps.scores.shape[1], maps.scores.shape[2])
    voters = image = None
    if settings.refine == "region_vote":
        if proposals is None:
            raise DataError(f"{image_id}: no proposals, which refine=region_vote needs; name their artefact")
        voters = proposals.waiting_proposals(image_id, size)
    if settings.refine in DIFFUSIONS:
        image = dataset.load(image_id, truth=False, labels=False).image
        if image.shape[:2] != size:
            raise DataError(f"{image_id}: scores are {size}, expected the image's {image.shape[:2]}; make them again")
    return ScoredImage(image_id, maps, image, voters)
