"""Stage `pseudo_masks`: class scores -> label maps of the training images, as PNG with the VOC palette."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moduseg.config import Config, PseudoMasksConfig
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import write_label_png
from moduseg.errors import DataError
from moduseg.pipeline.batches import Files, Loop, Outcome, sizes
from moduseg.pipeline.workspace import Plan, Workspace, carry_out, failures_of, finish, image_file, plain, safe_name
from moduseg.proposers import sa1b
from moduseg.pseudo_masks.labels import make_label_map, region_vote
from moduseg.pseudo_masks.refine import pamr, par
from moduseg.pseudo_masks.store import SUFFIX, unpack
from moduseg.stages import class_scores, propose
from moduseg.stages.evaluate_masks import draw_panels, needs_scoring, score_label_maps
from moduseg.structures import Proposals, ScoreMaps

DIFFUSIONS: dict[str, Callable[[Tensor, Tensor, Sequence[int], int], Tensor]] = {"pamr": pamr, "par": par}
Ingredients = tuple[str, ScoreMaps, np.ndarray | None, Proposals | None]
"""Of one image: id, scores, the image and the proposals, where the refiner looks at them."""


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Label the training images from their image-level labels.

    Returns:
        The artefact's folder: `labels/<id>.png`, `failures.jsonl`, `manifest.json`; where the split has ground truth,
        also `results.json`, `results.md` and `panels/`.
    """
    work = work or Workspace(cfg)
    split = work.train_split

    def make() -> Path:
        dataset, todo = work.dataset(split), plan(cfg, work)
        artefact, inputs = todo.loop.artefact, todo.inputs
        # The proposals are shown in the panels of generators that use them, too.
        shown = propose.run(cfg, work, split) if work.generator.needs_proposals else inputs.get("propose")

        def merge(outcome: Outcome) -> Path:
            if dataset.has_truth and needs_scoring(work, artefact, outcome):
                score_label_maps(work, artefact, outcome, dataset, shown, "pseudo mask", inputs)
            elif not dataset.has_truth and outcome.changed:
                done = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
                draw_panels(artefact, dataset, done, shown, "pseudo mask", cfg.evaluation.panels)
            return finish(artefact, outcome, len(dataset.ids), inputs, split=split)

        return carry_out(work, todo, __name__, merge)

    return work.once(cfg, "pseudo_masks", split, make)


def plan(cfg: Config, work: Workspace) -> Plan:
    """What `run` does with each image."""
    split, settings = work.train_split, cfg.pseudo_masks
    dataset = work.dataset(split)
    inputs = {"scores": class_scores.run(cfg, work)}
    if settings.refine == "region_vote":
        inputs["propose"] = propose.run(cfg, work, split)
    artefact = work.artefact(
        "pseudo_masks",
        f"{settings.generator['name']}-{split}",
        {
            "scores": inputs["scores"].name,
            "background": plain(cfg.as_dict()["pseudo_masks"]["background"]),
            "refine": [settings.refine, list(settings.dilations), settings.iterations]
            if settings.refine in DIFFUSIONS
            else settings.refine,
            "proposals": inputs["propose"].name if "propose" in inputs else "",
            **({"vote_min_score": settings.vote_min_score} if "propose" in inputs and settings.vote_min_score else {}),
        },
    )
    load = partial(ingredients, dataset, settings, inputs["scores"], inputs.get("propose"))

    def process(items: list[Ingredients]) -> list[Files]:
        device = work.device.torch_device
        return [
            {safe_name(f"labels/{item[0]}", ".png"): write_label_png(labels(item, settings, device).cpu().numpy())}
            for item in items
        ]

    def stamp(image_id: str) -> list[int]:
        files = [inputs["scores"] / safe_name(f"maps/{image_id}", SUFFIX)]
        if "propose" in inputs:
            files.append(inputs["propose"] / safe_name(f"masks/{image_id}", ".json"))
        return sizes(image_file(dataset, image_id), *files)

    return Plan(
        Loop(
            artefact,
            dataset.ids,
            load,
            process,
            cfg.runtime.batch_size,
            {i: e for stage, path in inputs.items() for i, e in failures_of(path, stage).items()},
            f"pseudo masks {split}",
            stamp,
            work.spread,
        ),
        inputs,
    )


def apply(
    dataset: Dataset,
    settings: PseudoMasksConfig,
    stored: Path,
    proposals: Path | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Label maps of stored scores under any background rule and refiner: no model runs and nothing is written.

    A rule or a threshold that is chosen by looking at the maps' quality is chosen on `dataset`'s split: report it on
    another one.

    Args:
        dataset: the split that was scored.
        settings: rule and refiner; the generator is not looked at.
        stored: the artefact of stage `scores`.
        proposals: the artefact of stage `propose`, for `region_vote`.
        device: where it happens.

    Yields:
        Id and `[H, W]` uint8 label map of each image that has scores, in the order of the data set.

    Raises:
        ConfigError: a rule or value that is not allowed.
        DataError: a damaged file, or no proposals for `region_vote`.
    """
    failed = failures_of(stored, "scores")
    for image_id in dataset.ids:
        if image_id not in failed:
            item = ingredients(dataset, settings, stored, proposals, image_id)
            yield image_id, labels(item, settings, device or torch.device("cpu"))


def ingredients(
    dataset: Dataset, settings: PseudoMasksConfig, stored: Path, proposals: Path | None, image_id: str
) -> Ingredients:
    """What the labels of one image are made of, on the CPU.

    Raises:
        DataError: a file that is missing, damaged or of another size.
    """
    file = stored / safe_name(f"maps/{image_id}", SUFFIX)
    if not file.is_file():
        raise DataError(f"{file}: no such file; run scripts/pseudo_masks.py again")
    maps = unpack(file.read_bytes(), name=str(file))
    size = (maps.scores.shape[1], maps.scores.shape[2])
    found = image = None
    if settings.refine == "region_vote":
        if proposals is None:
            raise DataError(f"{image_id}: no proposals, which refine=region_vote needs; name their artefact")
        found = sa1b.read_proposals(proposals / safe_name(f"masks/{image_id}", ".json"), size)
        found = found.select(found.predicted_iou >= settings.vote_min_score)
    if settings.refine in DIFFUSIONS:
        image = dataset.load(image_id, truth=False, labels=False).image
        if image.shape[:2] != size:
            raise DataError(f"{image_id}: scores are {size}, expected the image's {image.shape[:2]}; make them again")
    return image_id, maps, image, found


def labels(item: Ingredients, settings: PseudoMasksConfig, device: torch.device) -> Tensor:
    """`[H, W]` uint8 label map of one image's scores, on the device.

    Raises:
        ConfigError: see `moduseg.pseudo_masks.labels.make_label_map`.
    """
    _, maps, image, proposals = item
    rule, refine = settings.background, None
    if settings.refine in DIFFUSIONS and image is not None:
        pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1).float() / 255
        diffuse = DIFFUSIONS[settings.refine]

        def refine(stacked: Tensor) -> Tensor:
            return diffuse(stacked, pixels, settings.dilations, settings.iterations)

    result = make_label_map(maps.to(device), rule.rule, rule.value, rule.low, refine)
    return result if proposals is None else region_vote(result, proposals.to(device))
