"""The few dataclasses that travel between the rooms. Validated once, here, where they are made."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        labels: ascending foreground class ids of the image-level labels; `None` where there are none.
        semantic: `[H, W]` uint8 ground truth, 0 background, 1..C classes, 255 ignore; `None` where unknown.
        instances: `[H, W]` int32 ground-truth objects, 0 none, 1..n; `None` where unknown.
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
        """`(H, W)` in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Proposals:
    """Class-agnostic masks of one image.

    Attributes:
        masks: `[N, H, W]` bool; they may overlap.
        predicted_iou: `[N]` float32, the proposer's own quality estimate, 1 where it gives none.
        stability_score: `[N]` float32, how little the mask changes with the threshold (SAM), 1 where there is none.
        id_map: `[H, W]` int32, the proposal that each pixel belongs to, -1 where there is none: the same masks, where
            they are known to share no pixel; `None` where they overlap, or where nobody has looked. Made by
            `of_id_map`.
    """

    masks: Tensor
    predicted_iou: Tensor = field(default_factory=lambda: torch.empty(0))
    stability_score: Tensor = field(default_factory=lambda: torch.empty(0))
    id_map: Tensor | None = None

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != torch.bool:
            raise ValueError(
                f"proposals: got masks {tuple(self.masks.shape)} {self.masks.dtype}, expected [N, H, W] bool"
            )
        count = len(self.masks)
        for name in ("predicted_iou", "stability_score"):
            values = getattr(self, name)
            if values.numel() == 0 and count:
                object.__setattr__(self, name, torch.ones(count, device=self.masks.device))
            elif values.shape != (count,):
                raise ValueError(f"proposals: {name} is {tuple(values.shape)}, expected ({count},) as there are masks")
        if self.id_map is not None and self.id_map.shape != self.masks.shape[1:]:
            raise ValueError(
                f"proposals: id_map is {tuple(self.id_map.shape)}, expected the masks' {tuple(self.masks.shape[1:])}"
            )

    @classmethod
    def of_id_map(
        cls,
        id_map: Tensor,
        count: int,
        predicted_iou: Tensor | None = None,
        stability_score: Tensor | None = None,
    ) -> Proposals:
        """Return disjoint proposals: proposal `i` is where `id_map [H, W]`, integers below `count`, is `i`."""
        ids = id_map.to(torch.int32)
        masks = ids == torch.arange(count, dtype=torch.int32, device=ids.device)[:, None, None]
        none = torch.empty(0, device=ids.device)
        return cls(
            masks,
            none if predicted_iou is None else predicted_iou,
            none if stability_score is None else stability_score,
            ids,
        )

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def areas(self) -> Tensor:
        """`[N]` int64, pixels in each mask."""
        if self.id_map is not None:
            ids = self.id_map.flatten().long() + 1
            return torch.bincount(ids, minlength=len(self) + 1)[1:]
        flat = self.masks.view(torch.uint8).flatten(1)
        if flat.device.type != "cpu":
            return flat.sum(1)
        # Bytes hold sums of 255 pixels, and whole rows of them add up an order faster than wider integers.
        pixels = flat.numpy()
        columns = pixels.shape[1] // 255
        sums = np.add.reduce(pixels[:, : 255 * columns].reshape(len(pixels), 255, columns), axis=1, dtype=np.uint8)
        rest = pixels[:, 255 * columns :]
        return torch.from_numpy(sums.sum(axis=1, dtype=np.int64) + rest.sum(axis=1, dtype=np.int64))

    @property
    def quality(self) -> Tensor:
        """`[N]` float32, how good the proposer holds each outline to be: `predicted_iou * stability_score`."""
        return self.predicted_iou * self.stability_score

    def select(self, keep: Tensor) -> Proposals:
        """The proposals that `keep` (`[N]` bool or indices) names, all fields filtered together."""
        ids = None
        if self.id_map is not None:
            rows = torch.arange(len(self), device=self.masks.device)[keep]
            if len(rows.unique()) == len(rows):  # a proposal named twice would overlap itself
                # The last entry is that of no proposal, -1.
                table = torch.full((len(self) + 1,), -1, dtype=torch.int32, device=rows.device)
                table[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
                places = self.id_map.flatten() % (len(self) + 1)
                ids = table.index_select(0, places).view_as(self.id_map)
        return Proposals(self.masks[keep], self.predicted_iou[keep], self.stability_score[keep], ids)

    def to(self, device: torch.device) -> Proposals:
        """The same proposals on another device."""
        ids = None if self.id_map is None else self.id_map.to(device)
        return Proposals(self.masks.to(device), self.predicted_iou.to(device), self.stability_score.to(device), ids)


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
    """Class scores of one image, for the classes that its image-level labels name.

    Attributes:
        class_ids: ascending foreground ids, one for each map.
        scores: `[R, H, W]` float in [0, 1], at the size of the image.
        background: `[H, W]` float in [0, 1], or `None` where a background rule has to supply it.
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
        """The same maps on another device."""
        return ScoreMaps(
            self.class_ids,
            self.scores.to(device),
            None if self.background is None else self.background.to(device),
            None if self.ignore is None else self.ignore.to(device),
        )


@dataclass(frozen=True)
class Prediction:
    """What retrieval says of one image. Proposals are listed in the proposer's order, those too small left out.

    Attributes:
        label_map: `[H, W]` uint8, 0 background, 1..C.
        proposals: the proposals that were searched, `N` of them.
        labels: `[N]` int64, the vote's label (0 background).
        scores: `[N]` float32, mean cosine similarity of the winning label's neighbours.
        kept: `[K]` int64, the proposals left by suppression, in descending score.
        neighbours: `[N, k]` int64, rows of the bank, nearest first; -1 for a proposal that could not be searched.
        similarities: `[N, k]` float32, cosine similarity of each neighbour.
    """

    label_map: np.ndarray
    proposals: Proposals
    labels: Tensor
    scores: Tensor
    kept: Tensor
    neighbours: Tensor
    similarities: Tensor
