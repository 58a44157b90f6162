"""What a bank is like, class by class: how many vectors, how far apart, how near to other classes."""

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
    """Figures of one class; `None` where there are too few vectors to say.

    Attributes:
        name: of the class.
        vectors: regions in the bank.
        dropped: of these, left out of the search by the outlier filter.
        images: that they come from.
        median_area: pixels of a region.
        spread: mean Euclidean distance of its unit vectors from their mean, 0 to 1.
        nearest: the class whose mean vector is most similar.
        similarity: cosine of the two means, -1 to 1.
        overlap: share of its vectors, 0 to 1, whose nearest other vector is of another class.
        overlaps_with: the class that most of those are of.
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
    """Figures of one region of the bank.

    Attributes:
        row: its row in the stored bank.
        image: id of the training image.
        label: its class.
        area: pixels.
        distance: Euclidean, of its unit vector from the mean of its class.
        nearest_row: row of the most similar other vector, -1 where there is none.
        nearest_label: that one's class, `None` where there is none.
        dropped: whether the outlier filter leaves it out of the search.
    """

    row: int
    image: str
    label: str
    area: int
    distance: float
    nearest_row: int
    nearest_label: str | None
    dropped: bool


def other_neighbours(neighbours: Tensor) -> Tensor:
    """The nearest vector that is not the query itself.

    Args:
        neighbours: `[B, k]` int64, rows of the bank nearest to each of its own vectors, nearest first.

    Returns:
        `[B]` int64, -1 where there is none.
    """
    own = torch.arange(len(neighbours), device=neighbours.device)[:, None]
    other = neighbours != own
    if neighbours.shape[1] == 0:
        return own[:, 0] * 0 - 1
    first = other.to(torch.uint8).argmax(1, keepdim=True)
    found = neighbours.gather(1, first)[:, 0]
    return torch.where(other.any(1), found, torch.full_like(found, -1))


def class_statistics(bank: Bank, vectors: Tensor, nearest: Tensor, searched: Tensor) -> list[ClassStatistics]:
    """Figures of every class of a bank, in the order of ids.

    Args:
        bank: the stored bank.
        vectors: `[B, C]` float, its vectors as they are searched (centred, L2-normalised), none left out.
        nearest: `[B]` int64, see `other_neighbours`.
        searched: rows that the outlier filter keeps.
    """
    means, counts = _means(bank, vectors)
    unit = functional.normalize(means, dim=1)
    cosines = unit @ unit.T
    kept = torch.zeros(len(bank), dtype=torch.bool)
    kept[searched.cpu()] = True
    other_labels = torch.where(nearest >= 0, bank.labels[nearest.clamp(min=0)], nearest) if len(bank) else nearest
    result = []
    for label, name in enumerate(bank.classes):
        rows = torch.nonzero(bank.labels == label).flatten()
        if not len(rows):
            result.append(ClassStatistics(name, 0, 0, 0, None, None, None, None, None, None))
            continue
        others = [i for i in range(len(bank.classes)) if i != label and int(counts[i])]
        closest = max(others, key=lambda i: float(cosines[label, i])) if others else None
        wrong = other_labels[rows]
        wrong = wrong[(wrong >= 0) & (wrong != label)]
        result.append(
            ClassStatistics(
                name,
                len(rows),
                int((~kept[rows]).sum()),
                len(bank.image_index[rows].unique()),
                int(bank.areas[rows].median()),
                float((vectors[rows] - means[label]).norm(dim=1).mean()),
                None if closest is None else bank.classes[closest],
                None if closest is None else float(cosines[label, closest]),
                len(wrong) / len(rows) if len(bank) > 1 else None,
                bank.classes[int(wrong.bincount().argmax())] if len(wrong) else None,
            )
        )
    return result


def region_statistics(
    bank: Bank, vectors: Tensor, nearest: Tensor, searched: Tensor, label: int
) -> list[RegionStatistics]:
    """Figures of the regions of one class, those to look at first on top.

    First come regions whose nearest other vector is of another class, then those far from the mean of their class.
    Arguments as of `class_statistics`.
    """
    means, _ = _means(bank, vectors)
    kept = set(searched.tolist())
    regions = []
    for row in torch.nonzero(bank.labels == label).flatten().tolist():
        other = int(nearest[row])
        regions.append(
            RegionStatistics(
                row,
                bank.image_ids[int(bank.image_index[row])],
                bank.classes[label],
                int(bank.areas[row]),
                float((vectors[row] - means[label]).norm()),
                other,
                None if other < 0 else bank.classes[int(bank.labels[other])],
                row not in kept,
            )
        )
    return sorted(regions, key=lambda r: (r.nearest_label in (r.label, None), -r.distance, r.row))


def statistics_rows(statistics: Sequence[ClassStatistics]) -> list[list[str]]:
    """Cells of a table: name, vectors, dropped, images, median area, spread, nearest, similarity, overlap, with."""
    return [
        [
            s.name,
            str(s.vectors),
            str(s.dropped),
            str(s.images),
            "-" if s.median_area is None else str(s.median_area),
            _number(s.spread),
            s.nearest or "-",
            _number(s.similarity),
            "-" if s.overlap is None else f"{100 * s.overlap:.0f} %",
            s.overlaps_with or "-",
        ]
        for s in statistics
    ]


def _means(bank: Bank, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean vector `[classes, C]` and number of vectors `[classes]` of each class."""
    classes = len(bank.classes)
    counts = torch.bincount(bank.labels, minlength=classes)
    sums = torch.zeros(classes, vectors.shape[1], dtype=vectors.dtype).index_add_(0, bank.labels, vectors)
    return sums / counts.clamp(min=1)[:, None], counts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
