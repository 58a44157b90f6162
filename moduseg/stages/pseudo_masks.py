"""Stage `pseudo_masks`: class scores -> label maps of the training images (docs/method.md, step 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.config import PseudoMasksConfig
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import write_label_png
from moduseg.devices import copy_arrays
from moduseg.errors import DataError
from moduseg.files import to_json_values
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, stored_name
from moduseg.pipeline.stage import Stage
from moduseg.pseudo_masks.labels import make_label_map, region_vote
from moduseg.pseudo_masks.refine import pamr, par
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.evaluate_masks import score_or_draw
from moduseg.stages.propose import Propose
from moduseg.structures import Proposals, ScoreMaps

DIFFUSIONS: dict[str, Callable[[Tensor, Tensor, Sequence[int], int], Tensor]] = {"pamr": pamr, "par": par}
"""Refiners that spread scores between similar neighbouring pixels, by the name that the configuration uses."""


@dataclass(frozen=True)
class ScoredImage:
    """What the label map of one image is made from, on the CPU.

    Attributes:
        id: of the image.
        scores: of its classes.
        image: `[H, W, 3]` uint8, if the refiner looks at it.
        proposals: those that vote, if the refiner looks at them.
    """

    id: str
    scores: ScoreMaps
    image: np.ndarray | None = None
    proposals: Proposals | None = None


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
        stages: dict[str, Stage[Any]] = {"scores": ClassScores(self.work)}
        if self.cfg.pseudo_masks.refine == "region_vote":
            stages["propose"] = Propose(self.work, self.split)
        return stages

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.pseudo_masks.generator['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        settings, proposals = self.cfg.pseudo_masks, self.input_folders.get("propose")
        parts = {
            "scores": self.input_folders["scores"].name,
            "background": to_json_values(self.cfg.as_dict()["pseudo_masks"]["background"]),
            "refine": [settings.refine, list(settings.dilations), settings.iterations]
            if settings.refine in DIFFUSIONS
            else settings.refine,
            "proposals": proposals.name if proposals is not None else "",
        }
        if proposals is not None and settings.vote_min_score:
            parts["vote_min_score"] = settings.vote_min_score
        return parts

    def load(self, image_id: str) -> ScoredImage:
        """Return the stored scores of an image with what the refiner looks at."""
        folders = self.input_folders
        return load_scored(self.dataset, self.cfg.pseudo_masks, folders["scores"], folders.get("propose"), image_id)

    def process(self, items: list[ScoredImage]) -> list[Files]:
        """Return the label maps of several images."""
        settings, device = self.cfg.pseudo_masks, self.work.device.torch_device
        return [
            {stored_name("label_map", item.id): partial(_encode_label_map, to_label_map(item, settings, device))}
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
        score_or_draw(self.work, self.artefact, outcome, self.dataset, proposals=proposals, inputs=self.input_folders)
        return {"split": self.split}


def _encode_label_map(label_map: Tensor) -> bytes:
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
        voters = proposals.proposals(image_id, size)
        voters = voters.select(voters.predicted_iou >= settings.vote_min_score)
    if settings.refine in DIFFUSIONS:
        image = dataset.load(image_id, truth=False, labels=False).image
        if image.shape[:2] != size:
            raise DataError(f"{image_id}: scores are {size}, expected the image's {image.shape[:2]}; make them again")
    return ScoredImage(image_id, maps, image, voters)


def to_label_map(item: ScoredImage, settings: PseudoMasksConfig, device: torch.device) -> Tensor:
    """Return the `[H, W]` uint8 label map of one image's scores, on the device.

    Raises:
        ConfigError: a background rule or value that is not allowed for these scores.
    """
    rule, refine = settings.background, None
    if settings.refine in DIFFUSIONS and item.image is not None:
        pixels = copy_arrays([item.image], device)[0].permute(2, 0, 1).float() / 255
        diffuse = DIFFUSIONS[settings.refine]

        def refine(stacked: Tensor) -> Tensor:
            return diffuse(stacked, pixels, settings.dilations, settings.iterations)

    labels = make_label_map(item.scores.to(device), rule.rule, rule.value, rule.low, refine)
    return labels if item.proposals is None else region_vote(labels, item.proposals.to(device))
