"""What the models say of a photograph, before any bank is searched: proposals, tokens, pooled vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, harden, proposal_coverage
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.drawn import find_region
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from moduseg.structures import Proposals, Sample, TokenMap


@dataclass(frozen=True)
class Observation:
    """What the models say of one image, before any bank is searched. All tensors are on the segmenter's device.

    Attributes:
        proposals: those that `retrieval.min_area` and `min_predicted_iou` let through, `N` of them.
        tokens: the image's patch tokens.
        pooled: `[N, C]` float32, the vector of each proposal before centring and normalisation.
        word_values: `[N, D]` float32, their CLIP features; `None` unless `retrieval.answer` is `words`.
    """

    proposals: Proposals
    tokens: TokenMap
    pooled: Tensor
    word_values: Tensor | None = None


@dataclass(frozen=True)
class Observer:
    """The models of a segmenter, through which one batch of images at a time goes.

    Models keep state during a pass (SAM's predictor its image, a ViT its resampled positions), hence the lock, which
    all that use the same models share.

    Attributes:
        proposer: says where things are.
        backbone: says what they look like.
        device: where the models run.
        is_hard: whether a token counts for a region wholly or not at all (`bank.aggregation=hard`).
        lock: held during a pass.
    """

    proposer: Proposer
    backbone: Backbone
    device: Device
    is_hard: bool
    lock: threading.RLock = field(default_factory=threading.RLock)

    @torch.inference_mode()
    def observe(
        self,
        samples: Sequence[Sample],
        is_searched: Callable[[Proposals], Tensor],
        region_encoder: ClipWordsGenerator | None,
    ) -> list[Observation]:
        """Run the models on several images.

        Args:
            samples: the images.
            is_searched: which proposals of an image retrieval keeps, `[N]` bool; the others need no vector.
            region_encoder: gives the proposals their CLIP features; `None` if nothing asks for them.
        """
        with self.lock:
            is_batch = len(samples) > 1
            proposals = self.proposer.propose_batch(samples) if is_batch else [self.proposer.propose(samples[0])]
            token_maps = self.backbone.tokens([sample.image for sample in samples])
        return [
            self._pool(sample.image, regions.select(is_searched(regions)), tokens, region_encoder)
            for sample, regions, tokens in zip(samples, proposals, token_maps, strict=True)
        ]

    def _pool(
        self, image: np.ndarray, proposals: Proposals, tokens: TokenMap, region_encoder: ClipWordsGenerator | None
    ) -> Observation:
        proposals = proposals.to(self.device.torch_device)
        weights = proposal_coverage(proposals, tokens)
        if self.is_hard:
            weights = harden(weights)
        values = self.encode_regions(image, proposals, region_encoder)
        return Observation(proposals, tokens, aggregate(tokens.tokens, weights, normalize=False), values)

    def find_region(self, sample: Sample, box: PromptBox) -> np.ndarray:
        """Return the region that a person means who drew a box or a point, as `moduseg.proposers.drawn` does."""
        with self.lock:
            return find_region(self.proposer, sample, box)

    @torch.inference_mode()
    def append(
        self,
        image: np.ndarray,
        observation: Observation,
        masks: Sequence[np.ndarray],
        region_encoder: ClipWordsGenerator | None,
        *,
        min_area: int = 1,
    ) -> Observation:
        """Return an observation with more proposals.

        Args:
            image: `[H, W, 3]` uint8.
            observation: of it.
            masks: `[H, W]` bool each, appended in their order.
            region_encoder: as for `observe`.
            min_area: fewest pixels of a mask.

        Raises:
            ConfigError: a smaller one.
        """
        if not len(masks):
            return observation
        smallest = min(int(mask.sum()) for mask in masks)
        if smallest < max(min_area, 1):
            raise ConfigError(
                f"region: got {smallest} pixels, expected retrieval.min_area={min_area} or more; draw a larger one"
            )
        regions = Proposals(torch.from_numpy(np.stack(masks)))
        added = self._pool(image, regions, observation.tokens, region_encoder)
        values = observation.word_values
        if values is not None and added.word_values is not None:
            values = torch.cat((values, added.word_values))
        return Observation(
            Proposals.concatenate((observation.proposals, added.proposals)),
            observation.tokens,
            torch.cat((observation.pooled, added.pooled)),
            values,
        )

    @torch.inference_mode()
    def encode_regions(
        self, image: np.ndarray, proposals: Proposals, region_encoder: ClipWordsGenerator | None
    ) -> Tensor | None:
        """Return the CLIP features of an image's proposals, `[N, D]` float32; `None` without an encoder."""
        if region_encoder is None:
            return None
        with self.lock:
            return region_encoder.pool_regions(image, proposals.masks)
