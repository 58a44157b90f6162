"""Vectors of the regions of all training images, in half precision, and the most similar one of each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.errors import ArtefactError

_CHUNK = 1 << 13
"""Training regions that are held in float32 at once; those of one image are not divided."""
PARTS = ("regions", "centre", "image", "ids", "tags")
"""Tensors that `TrainingRegions` is made from."""


class RegionCollector:
    """Collects the vectors of regions image by image, and centres them when their mean is known.

    Only one image's vectors are in float32: a vector is held as its length and, in half precision, its direction from
    a point near the mean, where rounding costs least (a 2000th of each channel's difference from that point).

    Args:
        origin: `[C]` float32, a point near the mean, such as that of all tokens.
    """

    def __init__(self, origin: Tensor) -> None:
        self._origin = origin
        self._directions: list[Tensor] = []
        self._lengths: list[Tensor] = []
        # MPS has no float64.
        dtype = torch.float32 if origin.device.type == "mps" else torch.float64
        self._sum = torch.zeros(len(origin), dtype=dtype, device=origin.device)

    @property
    def counts(self) -> Tensor:
        """`[N]` int64, regions of each image, on the CPU."""
        return torch.tensor([len(directions) for directions in self._directions], dtype=torch.int64)

    def add(self, vectors: Tensor) -> None:
        """Add the vectors of an image's regions, `[n, C]` float32; `n` may be 0."""
        offsets = vectors - self._origin
        self._sum += offsets.sum(0)
        self._directions.append(F.normalize(offsets, dim=1).half())
        self._lengths.append(offsets.norm(dim=1))

    def centre(self) -> tuple[Tensor, Tensor]:
        """Return all vectors centred and L2-normalised, `[M, C]` float16, and their mean, `[C]` float32.

        Call it once, with one region or more: the collector is empty then.
        """
        mean = (self._sum / int(self.counts.sum())).float()
        vectors = self._directions[0].new_empty(int(self.counts.sum()), len(mean))
        row = len(vectors)
        # From the last image on, so that what is copied is freed.
        while self._directions:
            offsets = self._directions.pop().float() * self._lengths.pop()[:, None]
            vectors[row - len(offsets) : row] = F.normalize(offsets - mean, dim=1).half()
            row -= len(offsets)
        return vectors, mean + self._origin


class TrainingRegions:
    """The regions of the training images, and which images they are compared with.

    Args:
        state: `regions` `[M, C]` float16, centred and L2-normalised; `centre` `[C]` float32, the mean; `image` `[M]`
            int64, the image of each region, ascending; `ids` `[N]` int64, which identify the images; `tags` `[N, K]`
            uint8, labels.
        num_classes: `K`.

    Raises:
        ArtefactError: tensors are missing, or of shapes that do not fit.
    """

    def __init__(self, state: dict[str, Tensor], num_classes: int) -> None:
        parts = {name: state[name] for name in PARTS if name in state}
        if (
            len(parts) < len(PARTS)
            or parts["regions"].shape[1:] != parts["centre"].shape
            or parts["image"].shape != parts["regions"].shape[:1]
            or parts["tags"].shape != (len(parts["ids"]), num_classes)
            or not len(parts["image"])
            or not 0 <= int(parts["image"].min()) <= int(parts["image"].max()) < len(parts["ids"])
            or bool((parts["image"].diff() < 0).any())
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
            raise ArtefactError(
                f"class activation by neighbours: got {shapes}, expected regions (M, C), centre (C,), image (M,) in "
                f"ascending order, ids (N,) and tags (N, {num_classes}); remove the fit's folder and run again"
            )
        self._vectors, self._centre = parts["regions"], parts["centre"]
        # Which images are compared is decided on the host.
        self.ids, self.tags = parts["ids"].cpu().numpy(), parts["tags"].cpu().numpy() > 0
        counts = np.bincount(parts["image"].cpu().numpy(), minlength=len(self.ids))
        self._ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def to(self, device: torch.device) -> None:
        """Move the vectors to a device."""
        self._vectors, self._centre = self._vectors.to(device), self._centre.to(device)

    def choose_images(self, labels: Sequence[int], max_images: int, *, without_id: int) -> np.ndarray:
        """Return the images that regions of an image with these labels are compared with, `[I]` int64, ascending.

        Those are all that have a region, but for the image itself. If there are more than `max_images`, each label and
        "none of them" has an equal number of places, for the images of the smallest ids.

        Args:
            labels: foreground ids.
            max_images: at most so many.
            without_id: of the image itself.
        """
        is_candidate = (np.diff(self._ends) > 0) & (self.ids != without_id)
        if is_candidate.sum() <= max_images:
            return np.flatnonzero(is_candidate)
        columns = np.asarray(labels, dtype=np.int64) - 1
        groups = [*self.tags[:, columns].T, ~self.tags[:, columns].any(axis=1)]
        order = np.argsort(self.ids, kind="stable")
        order = order[is_candidate[order]]
        num_places = max(1, max_images // len(groups))
        return np.unique(np.concatenate([order[group[order]][:num_places] for group in groups]))

    def find_best(self, vectors: Tensor, images: np.ndarray) -> Tensor:
        """Return the cosine between each vector and the most similar region of each image, `[P, I]` float32.

        Args:
            vectors: `[P, C]` float32, before centring, on the device of the regions.
            images: `[I]` int64, images that have regions.
        """
        unit_vectors = F.normalize(vectors - self._centre, dim=1)
        best = torch.empty(len(vectors), len(images), device=vectors.device)
        counts = np.diff(self._ends)[images]
        # The regions stay in half precision; those of a few images at a time are multiplied in float32.
        for part in _group(counts):
            rows = [self._vectors[self._ends[image] : self._ends[image + 1]] for image in images[part]]
            similarities = unit_vectors @ torch.cat(rows).float().T
            best[:, part] = _take_largest(similarities, counts[part])
        return best


def _group(counts: np.ndarray) -> Iterator[slice]:
    """Yield runs of images with at most `_CHUNK` regions together, or one image."""
    start = total = 0
    for index, count in enumerate(counts.tolist()):
        if index > start and total + count > _CHUNK:
            yield slice(start, index)
            start, total = index, 0
        total += count
    if start < len(counts):
        yield slice(start, len(counts))


def _take_largest(values: Tensor, counts: np.ndarray) -> Tensor:
    """Return the largest value of each run of columns, `[P, I]`; `counts` has the columns of each run, 1 or more."""
    if values.device.type == "cpu":
        starts = np.cumsum(counts) - counts
        return torch.from_numpy(np.maximum.reduceat(values.numpy(), starts, axis=1))
    run = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(values.device)
    largest = values.new_full((len(values), len(counts)), -torch.inf)
    return largest.scatter_reduce_(1, run.expand(len(values), -1), values, "amax")
