"""From one image's class scores to its label map, as the group `pseudo_masks` says: rule, refiner, region vote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moduseg.config import BackgroundConfig, PseudoMasksConfig
from moduseg.devices import copy_arrays
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pseudo_masks.labels import make_label_map, region_vote, spill_scores
from moduseg.pseudo_masks.refine import pamr, par
from moduseg.structures import ScoreMaps

DIFFUSIONS: dict[str, Callable[[Tensor, Tensor, Sequence[int], int], Tensor]] = {"pamr": pamr, "par": par}
"""Refiners that spread scores between similar neighbouring pixels, by the name that the configuration uses."""


@dataclass(frozen=True)
class ScoredImage:
    """What the label map of one image is made from.

    Attributes:
        id: of the image.
        scores: of its classes.
        image: `[H, W, 3]` uint8, if the refiner looks at it.
        proposals: if the refiner looks at them; those of `vote_min_score` or more vote.
    """

    id: str
    scores: ScoreMaps
    image: np.ndarray | None = None
    proposals: WaitingProposals | None = None


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

    scores, share = item.scores.to(device), settings.min_class_share
    if settings.spill:
        scores = spill_scores(scores, settings.spill)
    labels = make_label_map(scores, rule.rule, rule.value, rule.low, refine, min_class_share=share)
    if item.proposals is None:
        return labels
    proposals = decode(item.proposals)
    is_voter = proposals.predicted_iou >= settings.vote_min_score
    if not bool(is_voter.all()):  # a copy of all masks takes the time of the vote
        proposals = proposals.select(is_voter)
    return region_vote(labels, proposals.to(device))


def fit_rule(settings: PseudoMasksConfig, *, has_background_words: bool) -> PseudoMasksConfig:
    """Return settings whose background rule works for a vocabulary.

    Rules that read the score of background words (`given`, `words`) have none if the vocabulary names no word of label
    0: then every pixel gets the class that scores best.
    """
    if has_background_words or settings.background.rule not in ("given", "words"):
        return settings
    return dataclasses.replace(settings, background=BackgroundConfig("probability", 0.0))
