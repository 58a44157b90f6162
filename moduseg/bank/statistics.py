"""Statistics of a bank, class by class: number of vectors, their distances, similarity to other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moduseg.bank.store import Bank


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics of one class; `None` where it has too few vectors.

    Attributes:
        name: name of the class.
        vectors: number of its regions in the bank.
        dropped: number of these that the outlier filter drops.
        images: number of images that they come from.
        median_area: median number of pixels of a region.
        spread: mean Euclidean distance of its unit vectors from their mean, 0 to 1.
        nearest: the class whose mean vector is most similar.
        similarity: cosine of the two means, -1 to 1.
        overlap: share of its vectors, 0 to 1, whose nearest other vector is of another class.
        overlaps_with: the class that most of those nearest vectors belong to.
    """

    name: str
    vectors: int
    dropped: int
    images: int
    median_area: int | None
    spread: float | None
    nearest: str | None
    similarity: float | None
    overlap: float | None
    overlaps_with: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RegionStatistics:
    """Statistics of one region of the bank.

    Attributes:
        row: its row in the stored bank.
        image: id of the training image.
        label: name of its class.
        area: number of pixels.
        distance: Euclidean distance of its unit vector from the mean of its class.
        nearest_row: row of the most similar other vector, -1 if there is none.
        nearest_label: class of that vector, `None` if there is none.
        dropped: the outlier filter drops it.
    """

    row: int
    image: str
    label: str
    area: int
    distance: float
    nearest_row: int
    nearest_label: str | None
    dropped: bool


def find_other_neighbours(neighbours: Tensor) -> Tensor:
    """Return for each vector its nearest neighbour that is not itself.

    Args:
        neighbours: `[B, k]` int64, rows of the bank nearest to each of its own vectors, nearest first.

    Returns:
        `[B]` int64, -1 if there is none.
    """
    if neighbours.shape[1] == 0:
        return neighbours.new_full((len(neighbours),), -1)
    is_other = neighbours != torch.arange(len(neighbours), device=neighbours.device)[:, None]
    first = is_other.to(torch.uint8).argmax(1, keepdim=True)
    return neighbours.gather(1, first)[:, 0].where(is_other.any(1), -1)


def compute_class_statistics(bank: Bank, vectors: Tensor, nearest: Tensor, searched: Tensor) -> list[ClassStatistics]:
    """Compute the statistics of every class of a bank, in the order of ids.

    Args:
        bank: the stored bank.
        vectors: `[B, C]` float, all of its vectors, centred and L2-normalised as for the search.
        nearest: `[B]` int64 from `find_other_neighbours`.
        searched: rows that the outlier filter keeps.
    """
    means, counts = _compute_means(bank, vectors)
    unit = functional.normalize(means, dim=1)
    cosines = unit @ unit.T
    is_kept = torch.zeros(len(bank), dtype=torch.bool)
    is_kept[searched.cpu()] = True
    other_labels = torch.where(nearest >= 0, bank.labels[nearest.clamp(min=0)], nearest) if len(bank) else nearest
    result = []
    for label, name in enumerate(bank.classes):
        rows = torch.nonzero(bank.labels == label).flatten()
        if not len(rows):
            result.append(
                ClassStatistics(
                    name=name,
                    vectors=0,
                    dropped=0,
                    images=0,
                    median_area=None,
                    spread=None,
                    nearest=None,
                    similarity=None,
                    overlap=None,
                    overlaps_with=None,
                )
            )
            continue
        others = [i for i in range(len(bank.classes)) if i != label and int(counts[i])]
        closest = max(others, key=lambda i: float(cosines[label, i])) if others else None
        confused = other_labels[rows]
        confused = confused[(confused >= 0) & (confused != label)]
        result.append(
            ClassStatistics(
                name=name,
                vectors=len(rows),
                dropped=int((~is_kept[rows]).sum()),
                images=len(bank.image_index[rows].unique()),
                median_area=int(bank.areas[rows].median()),
                spread=float((vectors[rows] - means[label]).norm(dim=1).mean()),
                nearest=None if closest is None else bank.classes[closest],
                similarity=None if closest is None else float(cosines[label, closest]),
                overlap=len(confused) / len(rows) if len(bank) > 1 else None,
                overlaps_with=bank.classes[int(confused.bincount().argmax())] if len(confused) else None,
            )
        )
    return result


def compute_region_statistics(
    bank: Bank, vectors: Tensor, nearest: Tensor, searched: Tensor, label: int
) -> list[RegionStatistics]:
    """Compute the statistics of the regions of one class, the most suspicious first.

    Regions whose nearest other vector is of another class come first, then those far from the mean of their class. The
    arguments are those of `compute_class_statistics`, and the id of the class.
    """
    means, _ = _compute_means(bank, vectors)
    kept_rows = set(searched.tolist())
    regions = []
    for row in torch.nonzero(bank.labels == label).flatten().tolist():
        other = int(nearest[row])
        regions.append(
            RegionStatistics(
                row=row,
                image=bank.image_ids[int(bank.image_index[row])],
                label=bank.classes[label],
                area=int(bank.areas[row]),
                distance=float((vectors[row] - means[label]).norm()),
                nearest_row=other,
                nearest_label=None if other < 0 else bank.classes[int(bank.labels[other])],
                dropped=row not in kept_rows,
            )
        )
    return sorted(regions, key=lambda r: (r.nearest_label in (r.label, None), -r.distance, r.row))


def format_statistics(statistics: Sequence[ClassStatistics]) -> list[list[str]]:
    """Format rows of cells: name, vectors, dropped, images, median area, spread, nearest, similarity, overlap, with."""
    return [
        [
            s.name,
            str(s.vectors),
            str(s.dropped),
            str(s.images),
            "-" if s.median_area is None else str(s.median_area),
            _format_number(s.spread),
            s.nearest or "-",
            _format_number(s.similarity),
            "-" if s.overlap is None else f"{100 * s.overlap:.0f} %",
            s.overlaps_with or "-",
        ]
        for s in statistics
    ]


def _compute_means(bank: Bank, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean vector `[classes, C]` and the number of vectors `[classes]` of each class."""
    classes = len(bank.classes)
    counts = torch.bincount(bank.labels, minlength=classes)
    sums = torch.zeros(classes, vectors.shape[1], dtype=vectors.dtype).index_add_(0, bank.labels, vectors)
    return sums / counts.clamp(min=1)[:, None], counts


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
