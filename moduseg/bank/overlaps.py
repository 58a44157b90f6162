"""Which classes of a bank cannot be told apart, in words.

Each region is compared with those of other images, as a region of a new image will be. A region whose nearest one
there is of another class would be labelled as that class by its nearest neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moduseg.bank.store import Bank

MAX_REGIONS = 8000
"""Regions that are compared; of a larger bank a sample."""
MIN_SHARE = 0.5
"""Share of a class's regions that have to be confused before there is a line about it."""
_CHUNK = 1024
"""Regions that are compared with all others at once."""


@dataclass(frozen=True)
class NearestClasses:
    """The classes of the nearest regions of other images.

    Attributes:
        classes: names of the `S` classes, background first.
        counts: `[S, S]` int64, regions of the class of the row whose nearest region is of the class of the column.
        num_images: `[S]` int64, images that have regions of the class, among those compared.
        num_regions: regions of the whole bank, of the classes that are searched.
    """

    classes: tuple[str, ...]
    counts: Tensor
    num_images: Tensor
    num_regions: int

    @property
    def num_compared(self) -> int:
        """Regions that were compared."""
        return int(self.counts.sum())

    @property
    def num_agreeing(self) -> int:
        """Regions whose nearest one of another image is of their own class."""
        return int(self.counts.diagonal().sum())


@dataclass(frozen=True)
class Overlap:
    """Regions of a class, or of two classes together, that are nearest to another class.

    Attributes:
        labels: the class, or the two.
        regions: how many they have.
        confused: how many of these are nearest to another class, of two classes: to the other one.
        text: the same in words.
    """

    labels: tuple[int, ...]
    regions: int
    confused: int
    text: str

    @property
    def severity(self) -> float:
        """Share of confused regions, by which lines are ordered; as if there were one more region that is not."""
        return self.confused / (self.regions + 1)


def count_nearest_classes(
    bank: Bank, vectors: Tensor, max_regions: int = MAX_REGIONS, classes: Sequence[str] | None = None
) -> NearestClasses:
    """Count the classes of each region's nearest region of another image.

    Args:
        bank: the stored bank.
        vectors: `[B, C]` float, all of its vectors, centred and L2-normalised as for the search, on any device.
        max_regions: of a larger bank so many regions are compared, rare classes as a whole and of the others an equal
            number, evenly spaced.
        classes: foreground classes that are searched (`bank.classes`), which with the background alone are compared;
            all if omitted.
    """
    rows = torch.arange(len(bank))
    if classes is not None:
        searched = torch.tensor([0, *(bank.classes.index(name) for name in classes)])
        rows = rows[torch.isin(bank.labels, searched)]
    num_regions = len(rows)
    rows = rows[_sample_rows(bank.labels[rows], max_regions)]
    labels, images = bank.labels[rows], bank.image_index[rows]
    num_classes = len(bank.classes)
    vectors = vectors[rows.to(vectors.device)]
    image_of = images.to(vectors.device)
    codes = []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarities = vectors[part] @ vectors.T
        similarities.masked_fill_(image_of[part, None] == image_of, -torch.inf)
        highest, nearest = (values.cpu() for values in similarities.max(1))
        has_other = highest > -torch.inf
        codes.append(labels[part][has_other] * num_classes + labels[nearest[has_other]])
    counts = torch.cat([*codes, labels[:0]]).bincount(minlength=num_classes**2).view(num_classes, num_classes)
    pairs = torch.unique(torch.stack((labels, images)), dim=1)
    return NearestClasses(bank.classes, counts, pairs[0].bincount(minlength=num_classes), num_regions)


def find_overlaps(nearest: NearestClasses) -> list[Overlap]:
    """Return the foreground classes that cannot be told from others, worst first; each class once.

    A line is about two classes if half of their regions together are nearest to the other class, in both directions;
    else about one class if half of its regions are nearest to other classes. A class of a single image is left out: its
    regions have none of their own class to be nearest to.
    """
    counts, names = nearest.counts, nearest.classes
    totals, agreeing = counts.sum(1).tolist(), counts.diagonal().tolist()
    labels = [i for i in range(1, len(names)) if totals[i] > 1 and int(nearest.num_images[i]) > 1]
    pairs = [
        _join_pair(nearest, first, second)
        for position, first in enumerate(labels)
        for second in labels[position + 1 :]
        if int(counts[first, second]) and int(counts[second, first])
    ]
    singles = [_describe_class(nearest, label) for label in labels if totals[label] > agreeing[label]]
    overlaps: list[Overlap] = []
    # The most severe pairs first; what a pair says of a class is not said again.
    for group in (pairs, singles):
        for overlap in sorted(group, key=lambda o: (-o.severity, o.labels)):
            is_told = any(set(overlap.labels) & set(other.labels) for other in overlaps)
            if not is_told and overlap.confused >= MIN_SHARE * overlap.regions:
                overlaps.append(overlap)
    return sorted(overlaps, key=lambda o: (-o.severity, o.labels))


def describe_bank(nearest: NearestClasses) -> list[str]:
    """Return lines on how well the classes of a bank can be told apart: a summary, the overlaps, what has one image."""
    if not nearest.num_compared:
        return ["Whether classes can be told apart cannot be said: no two images have regions."]
    sample = "" if nearest.num_compared == nearest.num_regions else f" ({nearest.num_regions} in the bank)"
    lines = [
        f"Of {nearest.num_compared} regions{sample}, {nearest.num_agreeing} "
        f"({100 * nearest.num_agreeing / nearest.num_compared:.0f} %) are nearest to one of their own class in another "
        "image."
    ]
    lines += [overlap.text for overlap in find_overlaps(nearest)]
    alone = [name for name, n in zip(nearest.classes[1:], nearest.num_images[1:].tolist(), strict=True) if n == 1]
    if alone:
        lines.append(f"These have regions of one image only, which cannot be compared: {', '.join(alone)}.")
    return lines


def worst_lines(nearest: NearestClasses, where: str, max_lines: int = 3) -> list[str]:
    """Return the worst overlaps as at most `max_lines` lines; none if all classes can be told apart.

    Args:
        nearest: of the bank.
        where: the command that lists all, for the last line if there are more.
        max_lines: 2 or more.
    """
    texts = [overlap.text for overlap in find_overlaps(nearest)]
    if len(texts) <= max_lines:
        return texts
    more = len(texts) - max_lines + 1
    return [*texts[: max_lines - 1], f"and {more} more overlaps; {where} lists them"]


def _join_pair(nearest: NearestClasses, first: int, second: int) -> Overlap:
    """Return how far two classes overlap."""
    names, counts = nearest.classes, nearest.counts
    confused = int(counts[first, second] + counts[second, first])
    regions = int(counts[first].sum() + counts[second].sum())
    text = (
        f"{names[first]} and {names[second]} overlap in {confused} of {regions} regions: more images of them, or one "
        "class"
    )
    return Overlap((first, second), regions, confused, text)


def _describe_class(nearest: NearestClasses, label: int) -> Overlap:
    """Return how far a class is taken for others."""
    names, row = nearest.classes, nearest.counts[label]
    regions = int(row.sum())
    others = row.clone()
    others[label] = 0
    confused, most = int(others.sum()), int(others.argmax())
    if int(others[most]) < confused:
        rest = f"other classes in {confused} of {regions} regions, most often {names[most]} ({int(others[most])})"
    else:
        rest = f"{names[most]} in {confused} of {regions} regions"
    remedy = f"more images of {names[label]}" + (", or one class" if most else ", or better pseudo masks")
    return Overlap((label,), regions, confused, f"{names[label]} looks like {rest}: {remedy}")


def _sample_rows(labels: Tensor, max_rows: int) -> Tensor:
    """Return rows of a bank, ascending, at most `max_rows`: the same number of each class that has so many."""
    if len(labels) <= max_rows:
        return torch.arange(len(labels))
    rows_by_class = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    rows_by_class.sort(key=len)
    chosen: list[Tensor] = []
    left = max_rows
    # Small classes first: what they do not need is shared by the larger ones.
    for position, rows in enumerate(rows_by_class):
        count = min(len(rows), left // (len(rows_by_class) - position))
        chosen.append(rows[torch.linspace(0, len(rows) - 1, count).round().long()])
        left -= count
    return torch.cat(chosen).sort().values
