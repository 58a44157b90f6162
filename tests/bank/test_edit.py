"""Banks made of banks, on hand-sized ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.bank import edit
from moduseg.bank.derived import digest_bank, open_bank, write_derived
from moduseg.bank.export import export
from moduseg.bank.statistics import compute_class_statistics, compute_region_statistics, find_other_neighbours
from moduseg.bank.store import Bank
from moduseg.config import BankConfig, OutliersConfig, PurifyConfig
from moduseg.errors import ArtefactError, ConfigError, ModusegError
from moduseg.retrieval.search import search
from moduseg.structures import TokenMap

CLASSES = ("background", "dog", "cat")
CONFIG: dict[str, Any] = {
    "backbone": {"name": "timm", "layer": -1, "batch_size": 4},
    "bank": {"purify": {"enabled": True, "iterations": 1}, "min_area": 3, "aggregation": "soft", "centre": False},
}


def make(
    rows: list[tuple[str, str, list[float]]],
    classes: tuple[str, ...] = CLASSES,
    config: dict[str, Any] | None = None,
    **info: Any,
) -> Bank:
    """A bank of (image, class, vector)."""
    images = tuple(dict.fromkeys(image for image, _, _ in rows))
    return Bank(
        torch.tensor([vector for _, _, vector in rows]).reshape(len(rows), -1),
        torch.tensor([classes.index(name) for _, name, _ in rows], dtype=torch.int64),
        torch.tensor([images.index(image) for image, _, _ in rows], dtype=torch.int64),
        torch.arange(10, 10 + len(rows)),
        images,
        classes,
        {"backbone_digest": "d1", "config": config or CONFIG, "label_source": "csv", "dataset": "pets", **info},
    )


def rows(bank: Bank) -> list[tuple[str, str, list[float], int]]:
    """(image, class, vector, area) of every region, which no renumbering changes."""
    return [
        (bank.image_ids[int(i)], bank.classes[int(label)], vector, int(area))
        for i, label, vector, area in zip(
            bank.image_index, bank.labels, bank.pooled.tolist(), bank.areas, strict=True
        )
    ]  # fmt: skip


@pytest.fixture
def pets() -> Bank:
    return make(
        [
            ("a", "background", [1.0, 0.0, 0.0]),
            ("a", "dog", [0.0, 1.0, 0.0]),
            ("b", "dog", [0.0, 1.0, 0.02]),
            ("b", "cat", [0.0, 0.1, 1.0]),
            ("c", "cat", [0.0, 1.0, 0.3]),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "left", "classes", "images"),
    [
        ({"classes": ["dog"]}, [0, 3, 4], ("background", "cat"), ("a", "b", "c")),
        ({"classes": ["dog", "cat"]}, [0], ("background",), ("a", "b", "c")),
        ({"images": ["b"]}, [0, 1, 4], CLASSES, ("a", "c")),
        ({"rows": [4, 0]}, [1, 2, 3], CLASSES, ("a", "b", "c")),
        ({"classes": ["cat"], "images": ["a"], "rows": [2]}, [], ("background", "dog"), ("b", "c")),
        ({}, [0, 1, 2, 3, 4], CLASSES, ("a", "b", "c")),
    ],
)
def test_what_is_removed_is_gone_and_the_rest_is_as_it_was(
    pets: Bank, arguments: dict[str, Any], left: list[int], classes: tuple[str, ...], images: tuple[str, ...]
) -> None:
    before = rows(pets)
    got = edit.remove(pets, **arguments)
    assert rows(got) == [before[i] for i in left]
    assert (got.classes, got.image_ids) == (classes, images)
    assert rows(pets) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: edit.remove(b, classes=["bird"]), r"class: got 'bird', expected one of dog, cat"),
        (lambda b: edit.remove(b, classes=["background"]), r"background can only lose regions"),
        (lambda b: edit.remove(b, images=["z"]), r"image: got 'z', expected an image of the bank"),
        (lambda b: edit.remove(b, rows=[5]), r"region: got row 5, expected 0\.\.4"),
        (lambda b: edit.remove(b, rows=[-1]), r"region: got row -1"),
        (lambda b: edit.merge([]), r"merge: got no bank"),
        (lambda b: edit.merge([b, b]), r"image 'a' is in two banks \(3 such\).*prefix=true"),
        (lambda b: edit.merge([b, make([("z", "dog", [1.0, 2.0])])]), r"3 and 2 channels"),
        (
            lambda b: edit.merge([b, make([("z", "dog", [1.0, 2.0, 3.0])], backbone_digest="d2")]),
            r"backbone weights d1 and d2, expected the same",
        ),
        (
            lambda b: edit.merge(
                [b, make([("z", "dog", [1.0, 2.0, 3.0])], config={**CONFIG, "backbone": {"name": "timm", "layer": 5}})]
            ),
            r"backbone\.layer=-1 and 5, expected the same",
        ),
        (
            lambda b: edit.merge(
                [b, make([("z", "dog", [1.0] * 3)], config={**CONFIG, "bank": {**CONFIG["bank"], "min_area": 9}})]
            ),
            r"bank\.min_area=3 and 9",
        ),
        (
            lambda b: edit.merge(
                [b, make([("z", "dog", [1.0] * 3)], config={**CONFIG, "bank": {**CONFIG["bank"], "flips": True}})]
            ),
            r"bank\.flips=False and True",
        ),
        (
            lambda b: edit.merge(
                [b, make([("z", "dog", [1.0] * 3)], config={**CONFIG, "bank": {**CONFIG["bank"], "parts": 30}})]
            ),
            r"bank\.parts=0 and 30",
        ),
        (
            lambda b: edit.remap_classes(b, ["background", "dog"]),
            r"has the class 'cat', expected only classes of the data",
        ),
        (lambda b: edit.append_classes(b.classes, [" "]), r"class name ' '"),
        (
            lambda b: edit.append_classes(b.classes, [str(i) for i in range(300)]),
            r"got 303 classes, expected at most 255",
        ),
        (lambda b: edit.add_region(b, "z", "dog", torch.ones(2), 4), r"got a vector of \(2,\), expected \(3,\)"),
    ],
)
def test_mistakes_are_one_line(pets: Bank, change: Callable[[Bank], Bank], message: str) -> None:
    with pytest.raises(ModusegError, match=message) as caught:
        change(pets)
    assert "\n" not in str(caught.value)


def test_merged_classes_are_joined_by_name_background_first(pets: Bank) -> None:
    config = {
        **CONFIG,
        "backbone": {**CONFIG["backbone"], "batch_size": 99},
        "bank": {**CONFIG["bank"], "centre": True},
    }
    other = make(
        [("x", "bird", [5.0, 5.0, 5.0]), ("x", "background", [6.0, 6.0, 6.0]), ("y", "dog", [7.0, 7.0, 7.0])],
        ("background", "bird", "dog"),
        config,
        label_source="tags",
        files={"x": "/pictures/x.png"},
    )
    got = edit.merge([pets, other])
    assert got.classes == ("background", "dog", "cat", "bird")
    assert rows(got) == rows(pets) + rows(other)
    assert got.labels.tolist() == [0, 1, 1, 2, 2, 3, 0, 1]
    assert got.info["label_source"] == "csv+tags"
    assert edit.files_of(got) == {"x": "/pictures/x.png"}
    assert edit.files_of(edit.remove(got, images=["x"])) == {}
    assert edit.files_of(edit.prefix_images(other, "p")) == {"p/x": "/pictures/x.png"}
    assert edit.prefix_images(other, "p").image_ids == ("p/x", "p/y")


def test_splitting_and_merging_gives_the_same_bank(pets: Bank) -> None:
    first, second = edit.remove(pets, images=["b", "c"]), edit.remove(pets, images=["a"])
    assert digest_bank(edit.merge([first, second])) == digest_bank(pets)


def test_ids_of_another_class_list(pets: Bank) -> None:
    got = edit.remap_classes(pets, ["background", "horse", "cat", "dog"])
    assert rows(got) == rows(pets)
    assert got.labels.tolist() == [0, 3, 3, 2, 2]
    assert got.counts["horse"] == 0
    assert edit.remap_classes(pets, CLASSES) is pets


def test_a_region_comes_behind_the_others(pets: Bank) -> None:
    got = edit.add_region(pets, "b", "dog", torch.tensor([1.0, 2.0, 3.0]), 7)
    assert rows(got) == [*rows(pets), ("b", "dog", [1.0, 2.0, 3.0], 7)]
    assert (got.classes, got.image_ids) == (pets.classes, pets.image_ids)
    got = edit.add_region(got, "z", "bird", torch.tensor([4.0, 5.0, 6.0]), 8)
    assert rows(got)[-1] == ("z", "bird", [4.0, 5.0, 6.0], 8)
    assert (got.classes, got.image_ids) == ((*CLASSES, "bird"), ("a", "b", "c", "z"))


def test_the_vector_of_a_region_is_that_of_a_purified_mask(device: torch.device) -> None:
    tokens = torch.zeros(4, 4, 2, device=device)
    tokens[1:3, 1:3, 0] = 1.0
    tokens[..., 1] = torch.arange(16.0, device=device).view(4, 4)
    token_map = TokenMap(tokens, 2, (8, 8), (8, 8))
    mask = torch.zeros(8, 8, dtype=torch.bool, device=device)
    mask[1:7, 1:7] = True
    eroded = BankConfig(purify=PurifyConfig(iterations=1), min_area=4)
    vector, area = edit.pool_region(mask, token_map, eroded)
    assert area == 16  # 6 x 6 less a rim of one
    assert vector.tolist() == [1.0, 7.5]  # the four inner patches, no rim
    whole, area = edit.pool_region(mask, token_map, BankConfig(purify=PurifyConfig(enabled=False), min_area=4))
    assert area == 36
    assert whole[0] == pytest.approx(16 / 36)
    # Purification would leave too little: the region counts as a whole.
    kept, area = edit.pool_region(mask, token_map, BankConfig(purify=PurifyConfig(iterations=1), min_area=17))
    assert (kept.tolist(), area) == (whole.tolist(), 36)
    small = torch.zeros_like(mask)
    small[3, 3] = True
    hard, area = edit.pool_region(small, token_map, BankConfig(aggregation="hard", min_area=0))
    assert (hard.tolist(), area) == ([1.0, 5.0], 1)  # no patch is more than half covered
    with pytest.raises(ConfigError, match="without pixels"):
        edit.pool_region(torch.zeros_like(mask), token_map, eroded)


def test_statistics_say_what_is_near_what(pets: Bank) -> None:
    whole = pets.select_vectors(False, OutliersConfig(enabled=False))
    _, neighbours = search(whole.vectors, whole.vectors, 2)
    nearest = find_other_neighbours(neighbours)
    # The second dog is the nearest of the first; the cat of image c looks like a dog.
    assert nearest.tolist()[1:3] == [2, 1]
    assert int(pets.labels[nearest[4]]) == 1
    searched = pets.select_vectors(False, OutliersConfig(drop_ratio=0.5)).rows
    background, dog, cat = compute_class_statistics(pets, whole.vectors, nearest, searched)
    assert (background.vectors, background.images, background.spread) == (1, 1, 0.0)
    assert (dog.vectors, dog.dropped, dog.images, dog.overlap, dog.nearest) == (2, 1, 2, 0.0, "cat")
    assert (cat.vectors, cat.overlap, cat.overlaps_with) == (2, pytest.approx(0.5), "dog")
    means = torch.stack([whole.vectors[1:3].mean(0), whole.vectors[3:].mean(0)])
    assert cat.similarity == pytest.approx(float(torch.cosine_similarity(means[0], means[1], 0)))
    assert cat.spread == pytest.approx(float((whole.vectors[3:] - means[1]).norm(dim=1).mean()))
    regions = compute_region_statistics(pets, whole.vectors, nearest, searched, 2)
    assert [(r.row, r.nearest_label) for r in regions] == [(4, "dog"), (3, "cat")]


@pytest.mark.parametrize("count", [0, 1])
def test_statistics_of_a_bank_with_nearly_nothing(count: int) -> None:
    bank = (
        make([("a", "dog", [1.0, 0.0])][:count]) if count else edit.remove(make([("a", "dog", [1.0, 0.0])]), rows=[0])
    )
    whole = bank.select_vectors(False, OutliersConfig(enabled=False))
    _, neighbours = search(whole.vectors, whole.vectors, 2)
    statistics = compute_class_statistics(bank, whole.vectors, find_other_neighbours(neighbours), whole.rows)
    assert [s.vectors for s in statistics] == [0, count, 0]
    assert [s.overlap for s in statistics] == [None, None, None]


def test_equal_vectors_are_not_their_own_neighbours() -> None:
    neighbours = torch.tensor([[0, 1], [0, 1], [0, 1], [3, 0]])
    assert find_other_neighbours(neighbours).tolist() == [1, 0, 0, 0]
    assert find_other_neighbours(torch.zeros(1, 1, dtype=torch.int64)).tolist() == [-1]


def test_exports_read_back_what_is_searched(pets: Bank, tmp_path: Path) -> None:
    found = pets.select_vectors(True, OutliersConfig(drop_ratio=0.5))
    assert len(found.rows) == 3
    with np.load(export(pets, found, "npz", tmp_path)[0]) as stored:
        assert np.array_equal(stored["vectors"], found.vectors.numpy())
        assert stored["labels"].tolist() == found.labels.tolist()
        assert stored["images"].tolist() == [pets.image_ids[int(i)] for i in pets.image_index[found.rows]]
        assert stored["classes"].tolist() == list(CLASSES)
        assert np.array_equal(stored["centre"], pets.pooled.mean(0).numpy())
    (table,) = export(pets, found, "csv", tmp_path)
    lines = [line.split(",") for line in table.read_text().splitlines()]
    assert lines[0] == ["row", "label", "image", "area", "v0", "v1", "v2"]
    assert [int(line[0]) for line in lines[1:]] == found.rows.tolist()
    assert np.array_equal(np.array([line[4:] for line in lines[1:]], dtype=np.float32), found.vectors.numpy())
    vectors, metadata = export(pets, found, "projector", tmp_path)
    assert np.array_equal(np.loadtxt(vectors, delimiter="\t", dtype=np.float32), found.vectors.numpy())
    assert metadata.read_text().splitlines()[0] == "row\tlabel\timage\tarea"
    assert len(metadata.read_text().splitlines()) == 1 + len(found.rows)
    with pytest.raises(ValueError, match=r"format: got 'xml', expected one of npz"):
        export(pets, found, "xml", tmp_path)


def test_the_faiss_index_finds_what_our_search_finds(pets: Bank, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is an optional package")
    found = pets.select_vectors(False, OutliersConfig(enabled=False))
    index_file, about = export(pets, found, "faiss", tmp_path)
    index = faiss.read_index(str(index_file))
    similarities, indices = index.search(found.vectors.numpy(), 2)
    ours, rows_found = search(found.vectors, found.vectors, 2)
    assert indices.tolist() == rows_found.tolist()
    assert np.allclose(similarities, ours.numpy(), atol=1e-6)
    assert '"images"' in about.read_text()


def test_a_derived_bank_is_a_folder_of_its_own(pets: Bank, tmp_path: Path) -> None:
    source = tmp_path / "source"
    pets.save(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    left = edit.remove(pets, classes=["cat"])
    write = partial(write_derived, operation="remove", sources=[source], outputs=tmp_path / "outputs")
    path = write(left, details={"class": ["cat"]}, folder=None)
    assert path.parent == tmp_path / "outputs" / "pets" / "bank"
    assert rows(open_bank(path)) == rows(left)
    manifest = (path / "manifest.json").read_text()
    assert '"derived_from"' in manifest
    assert str(source) in manifest
    assert write(left, details={"class": ["cat"]}, folder=None) == path
    with pytest.raises(ArtefactError, match=r"is the folder of the bank itself.*set out=<new folder>"):
        write(left, details={}, folder=source)
    with pytest.raises(ArtefactError, match=r"holds something else.*set out=<new folder>"):
        write(pets, details={}, folder=path)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for folder, message in ((tmp_path, r"got no bank\.json"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(ArtefactError, match=message):
            open_bank(folder)
