"""Class activation of regions, corrected by other images: needs image-level labels, a backbone and proposals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, coverage
from moduseg.errors import ArtefactError, DataError
from moduseg.pseudo_masks.cam import ActivationGenerator, ActivationOptions, paint_regions, scale_scores
from moduseg.structures import Proposals, Sample, ScoreMaps

_CHUNK = 1 << 15
"""Training regions that are held in float32 at once."""
_PARTS = ("regions", "centre", "image", "ids", "tags")


@dataclass(frozen=True, kw_only=True)
class NeighbourCamOptions(ActivationOptions):
    """Settings of `NeighbourCamGenerator`.

    Attributes:
        neighbours: images of the class whose mean similarity counts, 1 or more; all that there are if there are fewer.
        others: images without the class whose mean similarity counts, 1 or more.
        weight: of the neighbours' evidence, 0 or more.
        relative: the evidence is measured from its mean over the image (`NeighbourCamGenerator`).

    Raises:
        ValueError: a number out of range.
    """

    neighbours: int = 8
    others: int = 5
    weight: float = 5.0
    relative: bool = False

    def __post_init__(self) -> None:
        for name in ("neighbours", "others"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more; try 5")
        if not self.weight >= 0:
            raise ValueError(f"weight: got {self.weight}, expected 0 or more; try 5")
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
        self._training_regions: dict[str, Tensor] | None = None

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
        vectors, image_of_region, ids, tags = [], [], [], []
        for index, (sample, token_map) in enumerate(self.iterate_tokens(samples)):
            masks = proposals(sample).to(token_map.tokens.device).masks
            pooled = aggregate(token_map.tokens, coverage(masks, token_map), normalize=False)
            vectors.append(pooled[(pooled != 0).any(1)])
            image_of_region.append(torch.full((len(vectors[-1]),), index))
            ids.append(_hash_image_id(sample))
            tags.append([int(label in (sample.labels or ())) for label in range(1, num_classes + 1)])
        pooled = torch.cat(vectors)
        vectors.clear()
        if not len(pooled):
            raise DataError("pseudo_masks.generator: no region in any training image; check the proposals")
        centre = pooled.mean(0)
        return {
            **state,
            "regions": torch.cat([F.normalize(part - centre, dim=1).half() for part in pooled.split(_CHUNK)]),
            "centre": centre,
            "image": torch.cat(image_of_region),
            "ids": torch.tensor(ids),
            "tags": torch.tensor(tags, dtype=torch.uint8).reshape(len(ids), num_classes),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned.

        Raises:
            ArtefactError: it is of another class list or incomplete.
        """
        super().load_state(state)
        regions = {name: state[name] for name in _PARTS if name in state}
        if (
            len(regions) < len(_PARTS)
            or regions["regions"].shape[1:] != regions["centre"].shape
            or regions["image"].shape != regions["regions"].shape[:1]
            or regions["tags"].shape != (len(regions["ids"]), self._num_classes)
            or not len(regions["image"])
            or not 0 <= int(regions["image"].min()) <= int(regions["image"].max()) < len(regions["ids"])
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in regions.items()}
            raise ArtefactError(
                f"class activation by neighbours: got {shapes}, expected regions (M, C), centre (C,), image (M,), ids "
                f"(N,) and tags (N, {self._num_classes}); remove the fit's folder and run again"
            )
        self._training_regions = regions

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return scores of the classes in `labels`, the same for all pixels of a proposal; no background.

        Where proposals overlap the smallest decides; pixels of no proposal score 0.

        Raises:
            DataError: a label that is no class, or no proposals.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        if self._training_regions is None:
            raise ArtefactError("class activation by neighbours: not fitted; call fit and load_state first")
        if proposals is None:
            raise DataError(f"{sample.id}: no proposals, which cam_neighbours needs; run the proposals first")
        token_map, activation = self.compute_activation(sample, labels)
        device = activation.device
        self._training_regions = {name: tensor.to(device) for name, tensor in self._training_regions.items()}
        proposals = proposals.to(device)
        weights = coverage(proposals.masks, token_map)
        means = aggregate(activation.permute(1, 2, 0), weights, normalize=False)
        pooled = aggregate(token_map.tokens, weights, normalize=False)
        evidence = self._measure_evidence(pooled, labels, sample, self._training_regions)
        values = scale_scores(scale_scores(means.T) + self._options.weight * evidence.T)
        empty = torch.zeros((len(labels), *sample.size), device=device)
        return ScoreMaps(tuple(labels), paint_regions(empty, values, proposals))

    def _measure_evidence(
        self, pooled: Tensor, labels: tuple[int, ...], sample: Sample, training: dict[str, Tensor]
    ) -> Tensor:
        """Return `e` of each region and class, `[P, R]`; 0 without a vector of the region or evidence of the class."""
        # The similarity of each region to its most similar region of each training image.
        num_images = len(training["ids"])
        unit_vectors = F.normalize(pooled - training["centre"], dim=1)
        best_by_image = torch.full((len(unit_vectors), num_images), -torch.inf, device=pooled.device)
        # The training regions stay in half precision; a part of them at a time is multiplied in float32.
        for regions, image in zip(training["regions"].split(_CHUNK), training["image"].split(_CHUNK), strict=True):
            similarities = unit_vectors @ regions.float().T
            best_by_image.scatter_reduce_(1, image.expand(len(unit_vectors), -1), similarities, "amax")
        # Images without a region say nothing, and an image is no evidence about itself.
        has_regions = torch.bincount(training["image"], minlength=num_images) > 0
        is_witness = has_regions & (training["ids"] != _hash_image_id(sample))
        evidence = torch.zeros(len(unit_vectors), len(labels), device=pooled.device)
        has_evidence = torch.zeros_like(evidence, dtype=torch.bool)
        has_vector = (pooled != 0).any(1)
        for column, label in enumerate(labels):
            has_class = training["tags"][:, label - 1] > 0
            with_class, without = best_by_image[:, is_witness & has_class], best_by_image[:, is_witness & ~has_class]
            if with_class.shape[1] and without.shape[1]:
                evidence[:, column] = _average_best(with_class, self._options.neighbours) - _average_best(
                    without, self._options.others
                )
                has_evidence[:, column] = has_vector
        if self._options.relative and has_evidence.any():
            evidence = evidence - evidence[has_evidence].mean()
        return evidence * has_evidence


def _average_best(similarities: Tensor, count: int) -> Tensor:
    """Return the mean of each row's `count` largest values; of all if there are fewer."""
    return similarities.topk(min(count, similarities.shape[1]), 1).values.mean(1)


def _hash_image_id(sample: Sample) -> int:
    """Return a 64-bit hash of the image id."""
    return int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big", signed=True)
