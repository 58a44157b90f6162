"""Class activation of regions, corrected by other images: needs image-level labels, a backbone and proposals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, coverage
from moduseg.errors import DataError
from moduseg.pseudo_masks.base import get_fitted
from moduseg.pseudo_masks.cam import ActivationGenerator, ActivationOptions, paint_regions, scale_scores
from moduseg.pseudo_masks.training_regions import RegionCollector, TrainingRegions
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap


@dataclass(frozen=True, kw_only=True)
class NeighbourCamOptions(ActivationOptions):
    """Settings of `NeighbourCamGenerator`.

    Attributes:
        neighbours: images of the class whose mean similarity counts, 1 or more; all that there are if there are fewer.
        others: images without the class whose mean similarity counts, 1 or more.
        weight: of the neighbours' evidence, 0 or more.
        relative: the evidence is measured from its mean over the image (`NeighbourCamGenerator`).
        max_images: training images that an image is compared with at most, an equal number for each of its classes and
            for none of them; so the time for an image does not grow with a large training set. 2 or more.

    Raises:
        ValueError: a number out of range.
    """

    neighbours: int = 8
    others: int = 5
    weight: float = 5.0
    relative: bool = False
    max_images: int = 500

    def __post_init__(self) -> None:
        for name in ("neighbours", "others"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more; try 5")
        if not self.weight >= 0:
            raise ValueError(f"weight: got {self.weight}, expected 0 or more; try 5")
        if self.max_images < 2:
            raise ValueError(f"max_images: got {self.max_images}, expected 2 or more; try 500")
        super().__post_init__()


class NeighbourCamGenerator(ActivationGenerator):
    """Class activation of regions plus evidence from other images, which tell apart classes that occur together.

    A region's mean activation `a` of a class is scaled into [0, 1] over the image. The evidence

        e = mean of the `neighbours` largest of s(j), j the other images of the class
          - mean of the `others` largest of s(j), j the images without the class

    is added, `s(j)` being the largest cosine between the region and a region of training image `j`, centred: what looks
    like something in images that have the class, and like nothing in those that do not, is the class. This is
    multiple-instance learning by nearest neighbours (Wang and Zucker, Solving the multiple-instance problem, ICML 2000)
    on top of the closed form of `ActivationGenerator`. A region scores `max(0, a + weight * e)`, scaled into [0, 1] by
    class and image.

    For classes with few images `e` is below 0 nearly everywhere: the best of two images are farther away than the
    best of a hundred, and what falls below 0 is clipped. `relative` measures it from its mean over the image's regions
    and classes: what counts is which region, and which of its classes, other images support most. A class that no
    other image has gets no evidence, and keeps its activation.

    All regions of the training images are kept, in half precision: for training sets of thousands of images, not more.
    In float32 there are those of one image while fitting, and a few thousand while they are compared.

    Args:
        options: how the weights are learned, and how evidence is collected.
        backbone: called once, when tokens are first needed.
        classes: class names, background first.
    """

    needs_proposals = True
    fits_proposals = True

    def __init__(self, options: NeighbourCamOptions, backbone: Callable[[], Backbone], classes: Sequence[str]) -> None:
        super().__init__(options, backbone, classes)
        self._options = options
        self._training_regions: TrainingRegions | None = None

    @property
    def num_fit_passes(self) -> int:
        """Those of `ActivationGenerator`, and one that collects the regions."""
        return super().num_fit_passes + 1

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Learn the class weights, and keep the vectors of all regions of the training images.

        Args:
            samples: each call starts a new pass over the training images (with labels, without ground truth).
            num_classes: foreground classes, ids 1..num_classes.
            proposals: the regions of a sample.

        Returns:
            What `ActivationGenerator.fit` returns, and of the training images: `regions` `[M, C]` float16, centred and
            L2-normalised; `centre` `[C]` float32, the mean of the regions' vectors; `image` `[M]` int64, the image of
            each region; `ids` `[N]` int64, hashes that identify the images; `tags` `[N, num_classes]` uint8, labels.

        Raises:
            DataError: no proposals, no region in any image, no image, or one without image-level labels.
        """
        if proposals is None:
            raise DataError(
                "pseudo_masks.generator: no proposals to fit on, which cam_neighbours needs; run them first"
            )
        state = super().fit(samples, num_classes)
        regions, ids, tags = RegionCollector(state["mean"]), [], []
        for sample, token_map in self.iterate_tokens(samples):
            pooled = _pool(proposals(sample), token_map)
            regions.add(pooled[(pooled != 0).any(1)])
            ids.append(_hash_image_id(sample))
            tags.append([int(label in (sample.labels or ())) for label in range(1, num_classes + 1)])
        num_regions = regions.counts
        if not int(num_regions.sum()):
            raise DataError("pseudo_masks.generator: no region in any training image; check the proposals")
        vectors, centre = regions.centre()
        return {
            **state,
            "regions": vectors,
            "centre": centre,
            "image": torch.arange(len(ids)).repeat_interleave(num_regions),
            "ids": torch.tensor(ids),
            "tags": torch.tensor(tags, dtype=torch.uint8).reshape(len(ids), num_classes),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned.

        Raises:
            ArtefactError: it is of another class list or incomplete.
        """
        super().load_state(state)
        self._training_regions = TrainingRegions(state, self._num_classes)

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return scores of the classes in `labels`, the same for all pixels of a proposal; no background.

        Where proposals overlap the smallest decides; pixels of no proposal score 0.

        Raises:
            DataError: a label that is no class, or no proposals.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        training = get_fitted(self._training_regions, "class activation by neighbours")
        if proposals is None:
            raise DataError(f"{sample.id}: no proposals, which cam_neighbours needs; run the proposals first")
        token_map, activation = self.compute_activation(sample, labels)
        device = activation.device
        training.to(device)
        proposals = proposals.to(device)
        weights = coverage(proposals.masks, token_map)
        means = aggregate(activation.permute(1, 2, 0), weights, normalize=False)
        pooled = aggregate(token_map.tokens, weights, normalize=False)
        evidence = self._measure_evidence(pooled, labels, sample, training)
        values = scale_scores(scale_scores(means.T) + self._options.weight * evidence.T)
        empty = torch.zeros((len(labels), *sample.size), device=device)
        return ScoreMaps(tuple(labels), paint_regions(empty, values, proposals))

    def _measure_evidence(
        self, pooled: Tensor, labels: tuple[int, ...], sample: Sample, training: TrainingRegions
    ) -> Tensor:
        """Return `e` of each region and class, `[P, R]`; 0 without a vector of the region or evidence of the class."""
        # Images without a region say nothing, and an image is no evidence about itself.
        images = training.choose_images(labels, self._options.max_images, without_id=_hash_image_id(sample))
        best_by_image = training.find_best(pooled, images)
        evidence = torch.zeros(len(pooled), len(labels), device=pooled.device)
        has_evidence = torch.zeros_like(evidence, dtype=torch.bool)
        has_vector = (pooled != 0).any(1)
        for column, label in enumerate(labels):
            has_class = training.tags[images, label - 1]
            with_class, without = (
                best_by_image[:, torch.from_numpy(np.flatnonzero(is_asked)).to(pooled.device)]
                for is_asked in (has_class, ~has_class)
            )
            if with_class.shape[1] and without.shape[1]:
                evidence[:, column] = _average_best(with_class, self._options.neighbours) - _average_best(
                    without, self._options.others
                )
                has_evidence[:, column] = has_vector
        if self._options.relative and has_evidence.any():
            evidence = evidence - evidence[has_evidence].mean()
        return evidence * has_evidence


def _pool(proposals: Proposals, token_map: TokenMap) -> Tensor:
    """Return the vector of each proposal, `[N, C]`; nothing of the masks is kept."""
    weights = coverage(proposals.masks.to(token_map.tokens.device), token_map)
    return aggregate(token_map.tokens, weights, normalize=False)


def _average_best(similarities: Tensor, count: int) -> Tensor:
    """Return the mean of each row's `count` largest values; of all if there are fewer."""
    return similarities.topk(min(count, similarities.shape[1]), 1).values.mean(1)


def _hash_image_id(sample: Sample) -> int:
    """Return a 64-bit hash of the image id."""
    return int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big", signed=True)
