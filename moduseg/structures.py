"""Dataclasses shared by all packages. Each validates itself on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = 255


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        id: name of the image inside its data set, a relative path without suffix.
        image: `[H, W, 3]` uint8, RGB.
        labels: ascending foreground class ids of the image-level labels; `None` if the image has none.
        semantic: `[H, W]` uint8 ground truth, 0 background, 1..C classes, 255 ignore; `None` if unknown.
        instances: `[H, W]` int32 ground-truth objects, 0 none, 1..n; `None` if unknown.
    """

    id: str
    image: np.ndarray
    labels: tuple[int, ...] | None = None
    semantic: np.ndarray | None = None
    instances: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f"image {self.id!r}: got {self.image.shape} {self.image.dtype}, expected [H, W, 3] uint8 RGB; "
                "read it with moduseg.datasets.io.read_image"
            )
        for name in ("semantic", "instances"):
            array = getattr(self, name)
            if array is not None and array.shape != self.image.shape[:2]:
                raise ValueError(
                    f"image {self.id!r}: {name} is {array.shape}, expected the image's {self.image.shape[:2]}"
                )

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class _LateMasks:
    """Masks that are made when they are first looked at, which for many of them takes longer than a search does.

    Attributes:
        source: `[H, W]` int32 ids, or `[M, H, W]` bool masks.
        rows: `[N]` int64, the ids or the rows of the masks that are wanted.
    """

    source: Tensor
    rows: Tensor

    def make(self) -> Tensor:
        """Return the masks, `[N, H, W]` bool."""
        if self.source.ndim == 2:
            return self.source == self.rows.to(torch.int32)[:, None, None]
        return self.source[self.rows]


@dataclass(frozen=True)
class Proposals:
    """Class-agnostic masks of one image.

    Attributes:
        masks: `[N, H, W]` bool; they may overlap. Those of an id map, and those that `select(copy=False)` names, are
            made on first use.
        predicted_iou: `[N]` float32, the proposer's own estimate of a mask's quality; 1 if it gives none.
        stability_score: `[N]` float32, how little a mask changes with its threshold, as SAM measures it; 1 if the
            proposer does not.
        id_map: `[H, W]` int32, the proposal of each pixel, -1 for none: the masks once more, as one map. `None` if
            they overlap or were not made by `of_id_map`.
        parents: `[N]` int64, the index of the smallest mask of the same tree that contains the mask, -1 for a root;
            several trees are a forest. `None` if the proposer knows of no tree. That a parent contains its children is
            the proposer's word and is not looked up here.
    """

    masks: Tensor
    predicted_iou: Tensor = field(default_factory=lambda: torch.empty(0))
    stability_score: Tensor = field(default_factory=lambda: torch.empty(0))
    id_map: Tensor | None = None
    parents: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.masks, _LateMasks):
            late: _LateMasks = self.masks
            object.__setattr__(self, "_late", late)
            object.__delattr__(self, "masks")
            num_masks, size, device = len(late.rows), late.source.shape[-2:], late.source.device
        elif self.masks.ndim != 3 or self.masks.dtype != torch.bool:
            raise ValueError(
                f"proposals: got masks {tuple(self.masks.shape)} {self.masks.dtype}, expected [N, H, W] bool"
            )
        else:
            num_masks, size, device = len(self.masks), self.masks.shape[1:], self.masks.device
        for name in ("predicted_iou", "stability_score"):
            values = getattr(self, name)
            if values.numel() == 0 and num_masks:
                object.__setattr__(self, name, torch.ones(num_masks, device=device))
            elif values.shape != (num_masks,):
                raise ValueError(
                    f"proposals: {name} is {tuple(values.shape)}, expected ({num_masks},) as there are masks"
                )
        if self.id_map is not None and self.id_map.shape != size:
            raise ValueError(f"proposals: id_map is {tuple(self.id_map.shape)}, expected the masks' {tuple(size)}")
        if self.parents is not None:
            check_parents(self.parents, num_masks)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Make the masks on their first use; nothing else is missing from a dataclass."""
            late = self.__dict__.get("_late")
            if name != "masks" or late is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            masks = late.make()
            object.__setattr__(self, "masks", masks)
            return masks

    @classmethod
    def of_id_map(
        cls,
        id_map: Tensor,
        count: int,
        predicted_iou: Tensor | None = None,
        stability_score: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> Proposals:
        """Return disjoint proposals.

        Args:
            id_map: `[H, W]` integers below `count`, the proposal of each pixel; negative for none.
            count: proposals, among them those without a pixel.
            predicted_iou: `[N]` float32, the proposer's own estimate of the IoU; 1 if omitted.
            stability_score: `[N]` float32, how little the mask changes with the threshold; 1 if omitted.
            parents: `[N]` int64, see the attribute.
        """
        ids = id_map.to(torch.int32).clamp(min=-1)
        missing = torch.empty(0, device=ids.device)
        return cls(
            cast(Tensor, _LateMasks(ids, torch.arange(count, device=ids.device))),
            missing if predicted_iou is None else predicted_iou,
            missing if stability_score is None else stability_score,
            ids,
            parents,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Proposals]) -> Proposals:
        """Return the proposals of several lists of one image as one list, in their order.

        Args:
            parts: one or more, on one device. If some of them have parents, each proposal of the others is a root. The
                lists may overlap, so that the result has no id map unless there is a single part.

        Raises:
            ValueError: no part, or parts of images of different sizes.
        """
        sizes = sorted({tuple(part.masks.shape[1:]) for part in parts})
        if len(sizes) != 1:
            raise ValueError(
                f"proposals: got {len(parts)} lists of image sizes {sizes}, expected one or more lists of one size; "
                "join the proposals of one image only"
            )
        if len(parts) == 1:
            return parts[0]
        parents = []
        offset = 0
        for part in parts:
            roots = torch.full((len(part),), -1, dtype=torch.int64, device=part.masks.device)
            part_parents = roots if part.parents is None else part.parents
            parents.append(torch.where(part_parents >= 0, part_parents + offset, part_parents))
            offset += len(part)
        return cls(
            torch.cat([part.masks for part in parts]),
            torch.cat([part.predicted_iou for part in parts]),
            torch.cat([part.stability_score for part in parts]),
            parents=None if all(part.parents is None for part in parts) else torch.cat(parents),
        )

    def __len__(self) -> int:
        return len(self.predicted_iou)

    @property
    def areas(self) -> Tensor:
        """`[N]` int64, pixels of each mask."""
        if self.id_map is not None:
            ids = self.id_map.flatten().long() + 1
            return torch.bincount(ids, minlength=len(self) + 1)[1:]
        flat = self.masks.view(torch.uint8).flatten(1)
        if flat.device.type != "cpu":
            return flat.sum(1)
        # A byte holds a sum of up to 255 pixels, and adding whole rows of bytes is ten times faster than adding wider
        # integers.
        pixels = flat.numpy()
        columns = pixels.shape[1] // 255
        sums = np.add.reduce(pixels[:, : 255 * columns].reshape(len(pixels), 255, columns), axis=1, dtype=np.uint8)
        rest = pixels[:, 255 * columns :]
        return torch.from_numpy(sums.sum(axis=1, dtype=np.int64) + rest.sum(axis=1, dtype=np.int64))

    @property
    def quality(self) -> Tensor:
        """`[N]` float32, the proposer's opinion of each outline: `predicted_iou * stability_score`."""
        return self.predicted_iou * self.stability_score

    def select(self, keep: Tensor, *, copy: bool = True) -> Proposals:
        """Return the proposals that `keep` (`[N]` bool, or indices) names, in its order.

        The parent of a proposal becomes its nearest ancestor that is kept. If a proposal is named twice, the result has
        neither an id map nor parents: it would overlap itself, and its children would have two parents. With
        `copy=False` masks are copied when they are first used; until then the result keeps all of these in memory.
        """
        if keep.dtype == torch.bool and keep.device.type == "cpu" and len(keep) == len(self) and bool(keep.all()):
            return self  # hundreds of masks are a hundred megabytes, which need no copy
        device = self.predicted_iou.device
        rows = torch.arange(len(self), device=device)[keep]
        ids = parents = None
        if (self.id_map is not None or self.parents is not None) and len(rows.unique()) == len(rows):
            # The last entry stays -1: it is that of pixels without a proposal, and of the parent of a root.
            new_ids = torch.full((len(self) + 1,), -1, dtype=torch.int64, device=device)
            new_ids[rows] = torch.arange(len(rows), device=device)
            if self.id_map is not None:
                pixels = self.id_map.flatten() % (len(self) + 1)
                ids = new_ids.to(torch.int32).index_select(0, pixels).view_as(self.id_map)
            if self.parents is not None:
                parents = select_parents(self.parents, rows)
        quality = self.predicted_iou[rows], self.stability_score[rows]
        if ids is not None:
            return Proposals.of_id_map(ids, len(rows), *quality, parents=parents)
        masks = self.masks[rows] if copy else cast(Tensor, _LateMasks(self.masks, rows))
        return Proposals(masks, *quality, parents=parents)

    def to(self, device: torch.device) -> Proposals:
        """Return the proposals on another device."""
        quality = self.predicted_iou.to(device), self.stability_score.to(device)
        parents = None if self.parents is None else self.parents.to(device)
        if self.id_map is not None:
            return Proposals.of_id_map(self.id_map.to(device), len(self), *quality, parents=parents)
        return Proposals(self.masks.to(device), *quality, parents=parents)


def check_parents(parents: Tensor, num_masks: int) -> None:
    """Raise ValueError unless `parents` (see `Proposals`) makes `num_masks` masks a forest."""
    if parents.shape != (num_masks,) or parents.dtype != torch.int64:
        raise ValueError(
            f"proposals: got parents {tuple(parents.shape)} {parents.dtype}, expected ({num_masks},) torch.int64, one "
            "a mask"
        )
    outside = ((parents < -1) | (parents >= num_masks)).nonzero()[:, 0]
    if len(outside):
        raise ValueError(
            f"proposals: got parent {int(parents[outside[0]])} of mask {int(outside[0])}, expected the index of one of "
            f"the {num_masks} masks, or -1 for a root"
        )
    # Whoever has not arrived above a root after as many steps as there are masks goes round in a circle.
    circular = (_climb(parents, torch.zeros_like(parents, dtype=torch.bool)) != num_masks).nonzero()[:, 0]
    if len(circular):
        raise ValueError(
            f"proposals: mask {int(circular[0])} has itself among its ancestors or those of a parent; expected a tree, "
            "in which each parent contains its children"
        )


def select_parents(parents: Tensor, rows: Tensor) -> Tensor:
    """Return the parents of some of the masks of a forest: for each the nearest ancestor that is among them.

    Args:
        parents: `[N]` int64, see `Proposals`.
        rows: `[K]` int64, the masks that are kept, each once.

    Returns:
        `[K]` int64, positions in `rows`, -1 where no ancestor is kept.
    """
    num_masks = len(parents)
    # The last entry stands above the roots.
    positions = torch.full((num_masks + 1,), -1, dtype=torch.int64, device=parents.device)
    positions[rows] = torch.arange(len(rows), device=parents.device)
    first_steps = torch.where(parents < 0, num_masks, parents)[rows]
    return positions[_climb(parents, positions[:num_masks] >= 0)[first_steps]]


def _climb(parents: Tensor, is_stop: Tensor) -> Tensor:
    """Return `[N + 1]` int64: where a climb from each mask over its parents ends; entry `N` is `N`.

    Args:
        parents: `[N]` int64 in -1..N-1.
        is_stop: `[N]` bool, the masks at which a climb ends, the first one included; else it ends at `N`, above a root.
    """
    num_masks = len(parents)
    indices = torch.arange(num_masks, device=parents.device)
    steps = torch.where(is_stop, indices, torch.where(parents < 0, num_masks, parents))
    reached = torch.cat((steps, steps.new_full((1,), num_masks)))
    # Each pass doubles the steps that have been climbed.
    for _ in range(num_masks.bit_length()):
        reached = reached[reached]
    return reached


@dataclass(frozen=True)
class TokenMap:
    """Patch tokens of one image, on a regular grid that starts at the image's top left corner.

    Attributes:
        tokens: `[h, w, C]` float; token `(i, j)` describes the input's pixels
            `[i * stride, (i + 1) * stride) x [j * stride, (j + 1) * stride)`.
        stride: side of a patch, in pixels of the (resized, unpadded) input.
        image_size: `(H, W)` of the image as the data set gave it.
        input_size: `(H', W')` of the image as the backbone saw it before padding; equals `image_size` at native size.
    """

    tokens: Tensor
    stride: int
    image_size: tuple[int, int]
    input_size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ValueError(f"token map: got tokens {tuple(self.tokens.shape)}, expected [h, w, C]")
        expected = tuple(-(-side // self.stride) for side in self.input_size)
        if tuple(self.tokens.shape[:2]) != expected:
            raise ValueError(
                f"token map: got a {tuple(self.tokens.shape[:2])} grid for an input of {self.input_size} at stride "
                f"{self.stride}, expected {expected}"
            )


@dataclass(frozen=True)
class ScoreMaps:
    """Class scores of one image, for the classes of its image-level labels.

    Attributes:
        class_ids: ascending foreground ids, one for each map.
        scores: `[R, H, W]` float in [0, 1], at the size of the image.
        background: `[H, W]` float in [0, 1], or `None` if a background rule has to supply it.
        ignore: `[H, W]` bool, pixels that belong to no class (255), or `None`.
    """

    class_ids: tuple[int, ...]
    scores: Tensor
    background: Tensor | None = None
    ignore: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 3 or len(self.scores) != len(self.class_ids):
            raise ValueError(
                f"score maps: got {tuple(self.scores.shape)} for {len(self.class_ids)} classes, expected [R, H, W] "
                "with one map for each class"
            )
        if list(self.class_ids) != sorted(set(self.class_ids)) or any(c < 1 for c in self.class_ids):
            raise ValueError(f"score maps: got class ids {self.class_ids}, expected ascending foreground ids >= 1")

    def to(self, device: torch.device) -> ScoreMaps:
        """Return the maps on another device."""
        return ScoreMaps(
            self.class_ids,
            self.scores.to(device),
            None if self.background is None else self.background.to(device),
            None if self.ignore is None else self.ignore.to(device),
        )


@dataclass(frozen=True)
class Tags:
    """Which classes one image shows, as a tagger says.

    Attributes:
        class_ids: ascending foreground ids.
        scores: `[C]` float32 on the CPU, of every foreground class, larger for what is more likely there; `None` if the
            tagger ranks nothing.
    """

    class_ids: tuple[int, ...]
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if list(self.class_ids) != sorted(set(self.class_ids)) or any(c < 1 for c in self.class_ids):
            raise ValueError(f"tags: got class ids {self.class_ids}, expected ascending foreground ids >= 1")


@dataclass(frozen=True)
class SearchBank:
    """The vectors that queries are compared with: a stored bank as one configuration reads it.

    Attributes:
        vectors: `[M, C]` float32, centred (if the bank is) and L2-normalised.
        labels: `[M]` int64, 0 background.
        rows: `[M]` int64, the row of the stored bank that each vector came from.
        centre: `[C]` float32, subtracted before the normalisation, from queries too; `None` if the bank is not centred.
        word_values: `[M, D]` float32, the CLIP feature of each region, of length 1 or all zero; `None` if unknown.
        is_trusted: `[M]` bool, vectors of regions that a person named (`moduseg.retrieval.trust`); `None` for none.
    """

    vectors: Tensor
    labels: Tensor
    rows: Tensor
    centre: Tensor | None = None
    word_values: Tensor | None = None
    is_trusted: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.vectors)
        for name in ("labels", "rows"):
            shape = tuple(getattr(self, name).shape)
            if shape != (count,):
                raise ValueError(f"bank: got {name} {shape}, expected ({count},), one a vector")
        if self.centre is not None and self.centre.shape != self.vectors.shape[1:]:
            raise ValueError(
                f"bank: got a centre {tuple(self.centre.shape)}, expected {tuple(self.vectors.shape[1:])} like a vector"
            )
        if self.word_values is not None and (self.word_values.ndim != 2 or len(self.word_values) != count):
            raise ValueError(f"bank: got word values {tuple(self.word_values.shape)}, expected ({count}, D)")
        if self.is_trusted is not None and (self.is_trusted.shape != (count,) or self.is_trusted.dtype != torch.bool):
            raise ValueError(f"bank: got is_trusted {tuple(self.is_trusted.shape)}, expected ({count},) bool")

    def to(self, device: torch.device) -> SearchBank:
        """Return the bank on another device."""
        centre = None if self.centre is None else self.centre.to(device)
        values = None if self.word_values is None else self.word_values.to(device)
        trusted = None if self.is_trusted is None else self.is_trusted.to(device)
        return SearchBank(
            self.vectors.to(device), self.labels.to(device), self.rows.to(device), centre, values, trusted
        )

    def select(self, keep: Tensor) -> SearchBank:
        """Return the vectors that `keep` (`[M]` bool, or indices) names, in its order."""
        values = None if self.word_values is None else self.word_values[keep]
        trusted = None if self.is_trusted is None else self.is_trusted[keep]
        return SearchBank(self.vectors[keep], self.labels[keep], self.rows[keep], self.centre, values, trusted)


@dataclass(frozen=True)
class WordFeatures:
    """The words that regions are compared with.

    Attributes:
        features: `[Q, D]` float32, L2-normalised, one for each word.
        labels: `Q` class ids, ascending; 0 is the background, whose words are labels like any other.
        logit_scale: factor of the cosines before the softmax over words.
    """

    features: Tensor
    labels: tuple[int, ...]
    logit_scale: float

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) != len(self.labels) or not self.labels:
            raise ValueError(
                f"words: got features {tuple(self.features.shape)} for {len(self.labels)} labels, expected [Q, D] and "
                "one label a word, of 1 word or more"
            )

    def to(self, device: torch.device) -> WordFeatures:
        """Return the words on another device."""
        return WordFeatures(self.features.to(device), self.labels, self.logit_scale)


@dataclass(frozen=True)
class Prediction:
    """The label map of one image, and what retrieval says of each of its proposals.

    Everything is on the CPU, whichever device computed it; only `proposals` stay where the caller had them.

    Attributes:
        label_map: `[H, W]` uint8, 0 background, 1..C.
        proposals: the `N` proposals that were searched, in the proposer's order; smaller ones are dropped.
        labels: `[N]` int64, the vote's label (0 background).
        scores: `[N]` float32, mean cosine similarity of the winning label's neighbours.
        kept: `[K]` int64, the proposals left by suppression, in descending score.
        neighbours: `[N, k]` int64, rows of the stored bank, nearest first; -1 for a proposal that was not searched.
        neighbour_labels: `[N, k]` int64, the label that each neighbour voted for; -1 likewise.
        similarities: `[N, k]` float32, cosine similarity of each neighbour; 0 likewise.
        confidence: `[H, W]` uint8, how sure each pixel's label is, see `moduseg.retrieval.confidence`; `None` without
            `retrieval.confidence`.
        is_named: `[N]` bool, proposals that are regions which a person named; they are painted over all others. `None`
            if the bank has none.
    """

    label_map: np.ndarray
    proposals: Proposals
    labels: Tensor
    scores: Tensor
    kept: Tensor
    neighbours: Tensor
    neighbour_labels: Tensor
    similarities: Tensor
    confidence: np.ndarray | None = None
    is_named: Tensor | None = None
