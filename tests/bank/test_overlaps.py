"""Which classes of a bank cannot be told apart, by the nearest regions of other images."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.bank.overlaps import (
    NearestClasses,
    count_nearest_classes,
    describe_bank,
    find_overlaps,
    worst_lines,
)
from moduseg.bank.store import Bank

NAMES = ("background", "bus", "truck", "dog", "cat")


def make_bank(vectors: torch.Tensor, labels: list[int], images: list[int], classes: tuple[str, ...] = NAMES) -> Bank:
    count = len(labels)
    return Bank(
        vectors.float(),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(images, dtype=torch.int64),
        torch.full((count,), 9),
        tuple(f"image{i}" for i in range(max(images, default=0) + 1)),
        classes,
        {},
    )


def nearest_of(counts: dict[tuple[str, str], int], num_images: int = 3) -> NearestClasses:
    """Counts by name of a class and of the class of its nearest regions; each class has regions of three images."""
    table = torch.zeros((len(NAMES), len(NAMES)), dtype=torch.int64)
    for (name, other), count in counts.items():
        table[NAMES.index(name), NAMES.index(other)] = count
    images = torch.where(table.sum(1) > 0, num_images, 0)
    return NearestClasses(NAMES, table, images, int(table.sum()))


def test_counted_as_by_loops(device: torch.device, rng: np.random.Generator) -> None:
    for count in (0, 1, 2, 40, 1100):
        vectors = F.normalize(torch.from_numpy(rng.normal(size=(count, 6))), dim=1)
        labels, images = rng.integers(0, 5, count), rng.integers(0, 4, count)
        bank = make_bank(vectors, labels.tolist(), images.tolist())
        expected = np.zeros((5, 5), dtype=np.int64)
        similarities = (vectors @ vectors.T).numpy()
        for row in range(count):
            others = np.flatnonzero(images != images[row])
            if len(others):
                expected[labels[row], labels[others[similarities[row, others].argmax()]]] += 1
        nearest = count_nearest_classes(bank, vectors.to(device))
        assert nearest.counts.tolist() == expected.tolist()
        assert nearest.num_compared == expected.sum()
        assert nearest.num_agreeing == np.trace(expected)
        assert nearest.num_images.tolist() == [len(set(images[labels == label])) for label in range(5)]


def test_classes_that_are_not_searched_are_not_compared() -> None:
    """Without trucks the nearest region of another image is a bus."""
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    bank = make_bank(vectors, [1, 1, 2], [0, 1, 2])
    both, alone = (count_nearest_classes(bank, vectors, classes=names) for names in (None, [NAMES[1]]))
    assert both.counts[1].tolist() == [0, 0, 2, 0, 0]
    assert alone.counts.tolist() == [[0] * 5, [0, 2, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]
    assert (both.num_regions, alone.num_regions) == (3, 2)


def test_regions_of_one_image_are_not_compared() -> None:
    """Two buses of one image are alike, and the truck of another one is nearest to both."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    nearest = count_nearest_classes(make_bank(vectors, [1, 1, 2], [0, 0, 1]), vectors)
    assert nearest.counts[1].tolist() == [0, 0, 2, 0, 0]
    assert nearest.counts[2].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param(
            {("bus", "truck"): 2, ("bus", "dog"): 1, ("truck", "bus"): 3},
            ["bus and truck overlap in 5 of 6 regions: more images of them, or one class"],
            id="two classes alike",
        ),
        pytest.param(
            {("bus", "truck"): 4, ("bus", "bus"): 1, ("truck", "truck"): 40},
            ["bus looks like truck in 4 of 5 regions: more images of bus, or one class"],
            id="one way alone",
        ),
        pytest.param(
            {("bus", "truck"): 3, ("truck", "bus"): 1, ("truck", "truck"): 40},
            ["bus looks like truck in 3 of 3 regions: more images of bus, or one class"],
            id="a rare class among many of another",
        ),
        pytest.param(
            {("dog", "background"): 3, ("dog", "dog"): 2, ("background", "background"): 9},
            ["dog looks like background in 3 of 5 regions: more images of dog, or better pseudo masks"],
            id="background",
        ),
        pytest.param(
            {("dog", "cat"): 2, ("dog", "bus"): 1, ("dog", "dog"): 1, ("cat", "cat"): 9, ("bus", "bus"): 9},
            ["dog looks like other classes in 3 of 4 regions, most often cat (2): more images of dog, or one class"],
            id="several classes",
        ),
        pytest.param({("dog", "dog"): 3, ("dog", "cat"): 2, ("cat", "cat"): 4}, [], id="less than half"),
        pytest.param({("dog", "cat"): 1}, [], id="a single region"),
        pytest.param({("background", "dog"): 9, ("dog", "dog"): 5}, [], id="background like a class is no line"),
        pytest.param({}, [], id="no regions"),
    ],
)
def test_overlaps_in_words(counts: dict[tuple[str, str], int], expected: list[str]) -> None:
    nearest = nearest_of(counts)
    assert [overlap.text for overlap in find_overlaps(nearest)] == expected
    assert worst_lines(nearest, "info") == expected


def test_the_worst_come_first_and_each_class_once() -> None:
    counts = {
        ("bus", "truck"): 5, ("truck", "bus"): 5, ("truck", "dog"): 1,
        ("dog", "cat"): 20, ("cat", "dog"): 20, ("dog", "truck"): 1,
    }  # fmt: skip
    assert [overlap.labels for overlap in find_overlaps(nearest_of(counts))] == [(3, 4), (1, 2)]


def test_a_class_of_one_image_has_no_line_of_its_own() -> None:
    """Its regions have none of their class to be nearest to; it is named at the end."""
    nearest = nearest_of({("bus", "truck"): 4, ("truck", "truck"): 4}, num_images=1)
    lines = describe_bank(nearest)
    assert find_overlaps(nearest) == []
    assert lines[0].startswith("Of 8 regions, 4 (50 %) are nearest to one of their own class")
    assert lines[-1] == "These have regions of one image only, which cannot be compared: bus, truck."


def test_many_overlaps_end_in_a_line_that_counts_them() -> None:
    names = ("background", *(f"c{i}" for i in range(12)))
    counts = torch.zeros((13, 13), dtype=torch.int64)
    for label in range(1, 13):
        counts[label, 0] = 2 + label
    nearest = NearestClasses(names, counts, torch.full((13,), 2), int(counts.sum()))
    lines = worst_lines(nearest, "the command")
    assert [line.split()[0] for line in lines] == ["c11", "c10", "and"]
    assert lines[2] == "and 10 more overlaps; the command lists them"
    assert len(worst_lines(nearest, "the command", max_lines=12)) == 12


def test_banks_without_two_images_say_so() -> None:
    vectors = torch.eye(3)
    for bank in (make_bank(vectors, [0, 1, 2], [0, 0, 0]), make_bank(vectors[:0], [], [])):
        nearest = count_nearest_classes(bank, bank.pooled)
        assert describe_bank(nearest) == [
            "Whether classes can be told apart cannot be said: no two images have regions."
        ]
        assert worst_lines(nearest, "info") == []


def test_a_large_bank_is_sampled(rng: np.random.Generator) -> None:
    """Twenty thousand regions in seconds of processor time; a rare class is compared as a whole."""
    labels = np.r_[np.ones(30, int), np.full(400, 2), np.zeros(19_570, int)]
    vectors = F.normalize(torch.from_numpy(rng.normal(size=(20_000, 32)).astype(np.float32)), dim=1)
    bank = make_bank(vectors, labels.tolist(), (np.arange(20_000) // 3).tolist())
    begin = time.process_time()
    nearest = count_nearest_classes(bank, vectors, max_regions=2000)
    assert time.process_time() - begin < 10
    assert nearest.counts.sum(1).tolist()[:3] == [1570, 30, 400]
    assert "(20000 in the bank)" in describe_bank(nearest)[0]
