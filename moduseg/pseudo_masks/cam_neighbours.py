"""Class activation of regions, corrected by what other images have: needs image-level labels, a backbone, proposals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, coverage
from moduseg.errors import ArtefactError, DataError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.cam import CamGenerator, painted, scaled
from moduseg.structures import Proposals, Sample, ScoreMaps

_PARTS = ("regions", "centre", "image", "ids", "tags")


class NeighbourCamGenerator(PseudoMaskGenerator):
    """Where classes occur together, their activation maps are alike; other images tell which region is whose.

    A region's mean activation `a` of a class is scaled into [0, 1] over the image. To it comes

        e = mean of the `neighbours` largest of s(j), j the other images of the class
          - mean of the `others` largest of s(j), j the images without the class,

    `s(j)` being the largest cosine between the region and a region of training image `j`, centred: what looks like
    something in images that have the class, and like nothing in those that do not, is the class. This is
    multiple-instance learning by nearest neighbours (Wang and Zucker, Solving the multiple-instance problem, ICML 2000)
    on top of the closed form of `CamGenerator`. A region scores `max(0, a + weight * e)`, scaled into [0, 1] by class
    and image.

    Where classes have few images `e` is below 0 nearly everywhere: the best of two images are farther away than the
    best of a hundred, and what falls below 0 is cut off. `relative` measures it from its mean over the image's regions
    and classes: what counts is which region, and which of its classes, other images speak for most. A class that no
    other image has gets no answer, and keeps its activation.

    All regions of the training images are kept, in half precision: for training sets of thousands of images, not more.

    Args:
        backbone: called once, when tokens are first needed.
        classes: class names, background first.
        ridge, rounds, top, fit_batch: of the class activation maps, see `CamGenerator`.
        neighbours: images of the class that are asked, 1 or more; all that there are where there are fewer.
        others: the same of images without the class.
        weight: of the neighbours' answer, 0 or more.
        relative: `e` less its mean over the image, see above.

    Raises:
        ValueError: a number out of range.
    """

    is_fitted = True
    needs_proposals = True
    fits_proposals = True

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        classes: Sequence[str],
        ridge: float = 1.0,
        rounds: int = 0,
        top: float = 0.25,
        neighbours: int = 8,
        others: int = 5,
        weight: float = 5.0,
        relative: bool = False,
        fit_batch: int = 8,
    ) -> None:
        for name, number in (("neighbours", neighbours), ("others", others)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected 1 or more; try 5")
        if not weight >= 0:
            raise ValueError(f"weight: got {weight}, expected 0 or more; try 5")
        self._cam = CamGenerator(backbone, classes, ridge, rounds, top, fit_batch=fit_batch)
        self._neighbours, self._others, self._weight, self._relative = neighbours, others, weight, relative
        self._num_classes = len(classes) - 1
        self._state: dict[str, Tensor] | None = None

    @property
    def digest(self) -> str:
        """Digest of the backbone's weights; what `fit` learned has its own."""
        return self._cam.digest

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """See `PseudoMaskGenerator.fit`.

        Returns:
            What `CamGenerator.fit` returns, and of the training images: `regions` `[M, C]` float16, centred and
            L2-normalised; `centre` `[C]` float32, the mean of the regions' vectors; `image` `[M]` int64, the image of
            each region; `ids` `[N]` int64, by which an image is known again; `tags` `[N, num_classes]` uint8, labels.

        Raises:
            DataError: no proposals, no region in any image, no image, or one without image-level labels.
        """
        if proposals is None:
            raise DataError(
                "pseudo_masks.generator: no proposals to fit on, which cam_neighbours needs; run them first"
            )
        state = self._cam.fit(samples, num_classes)
        vectors, image, ids, tags = [], [], [], []
        for index, (sample, token_map) in enumerate(self._cam.tokens_of(samples)):
            found = proposals(sample).to(token_map.tokens.device)
            pooled = aggregate(token_map.tokens, coverage(found.masks, token_map), normalize=False)
            vectors.append(pooled[(pooled != 0).any(1)])
            image.append(torch.full((len(vectors[-1]),), index))
            ids.append(_known_by(sample))
            tags.append([int(label in (sample.labels or ())) for label in range(1, num_classes + 1)])
        pooled = torch.cat(vectors)
        if not len(pooled):
            raise DataError("pseudo_masks.generator: no region in any training image; check the proposals")
        centre = pooled.mean(0)
        return {
            **state,
            "regions": F.normalize(pooled - centre, dim=1).half(),
            "centre": centre,
            "image": torch.cat(image),
            "ids": torch.tensor(ids),
            "tags": torch.tensor(tags, dtype=torch.uint8).reshape(len(ids), num_classes),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned.

        Raises:
            ArtefactError: it is of another class list or incomplete.
        """
        self._cam.load_state(state)
        own = {name: state[name] for name in _PARTS if name in state}
        if (
            len(own) < len(_PARTS)
            or own["regions"].shape[1:] != own["centre"].shape
            or own["image"].shape != own["regions"].shape[:1]
            or own["tags"].shape != (len(own["ids"]), self._num_classes)
            or not len(own["image"])
            or not 0 <= int(own["image"].min()) <= int(own["image"].max()) < len(own["ids"])
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
            raise ArtefactError(
                f"class activation by neighbours: got {shapes}, expected regions (M, C), centre (C,), image (M,), ids "
                f"(N,) and tags (N, {self._num_classes}); remove the fit's folder and run again"
            )
        self._state = own

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Scores of the classes in `labels`, the same for all pixels of a proposal; no background.

        Where proposals overlap the smallest decides; pixels of no proposal score 0.

        Raises:
            DataError: a label that is no class, or no proposals.
            ArtefactError: nothing was fitted, or with another backbone.
        """
        if self._state is None:
            raise ArtefactError("class activation by neighbours: not fitted; call fit and load_state first")
        if proposals is None:
            raise DataError(f"{sample.id}: no proposals, which cam_neighbours needs; run the proposals first")
        token_map, activation = self._cam.activation(sample, labels)
        device = activation.device
        self._state = {name: tensor.to(device) for name, tensor in self._state.items()}
        found = proposals.to(device)
        weights = coverage(found.masks, token_map)
        means = aggregate(activation.permute(1, 2, 0), weights, normalize=False)
        answers = self._asked(aggregate(token_map.tokens, weights, normalize=False), labels, sample)
        values = scaled(scaled(means.T) + self._weight * answers.T)
        empty = torch.zeros((len(labels), *sample.size), device=device)
        return ScoreMaps(tuple(labels), painted(empty, values, found))

    def _asked(self, pooled: Tensor, labels: tuple[int, ...], sample: Sample) -> Tensor:
        """`e` of each region and class, `[P, R]`; 0 for a region without a vector and a class that got no answer."""
        state = self._state or {}
        count = len(state["ids"])
        unit = F.normalize(pooled - state["centre"], dim=1)
        similarities = unit @ state["regions"].float().T
        nearest = torch.full((len(unit), count), -torch.inf, device=unit.device)
        nearest = nearest.scatter_reduce(1, state["image"].expand(len(unit), -1), similarities, "amax")
        seen = torch.bincount(state["image"], minlength=count) > 0
        asked = seen & (state["ids"] != _known_by(sample))
        answers = torch.zeros(len(unit), len(labels), device=unit.device)
        answered = torch.zeros_like(answers, dtype=torch.bool)
        found = (pooled != 0).any(1)
        for column, label in enumerate(labels):
            has = state["tags"][:, label - 1] > 0
            yes, no = nearest[:, asked & has], nearest[:, asked & ~has]
            if yes.shape[1] and no.shape[1]:
                answers[:, column] = _mean_of_best(yes, self._neighbours) - _mean_of_best(no, self._others)
                answered[:, column] = found
        if self._relative and answered.any():
            answers = answers - answers[answered].mean()
        return answers * answered


def _mean_of_best(similarities: Tensor, count: int) -> Tensor:
    return similarities.topk(min(count, similarities.shape[1]), 1).values.mean(1)


def _known_by(sample: Sample) -> int:
    """A number of the image's id, in the range of int64."""
    return int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big", signed=True)
