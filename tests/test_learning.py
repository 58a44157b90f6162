"""What a bank learned while a program runs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from moduseg import learning
from moduseg.bank.store import Bank
from moduseg.datasets.photographs import NamedPicture
from moduseg.learning import LearnedImages, NamedRegion, append_image, append_named


def test_images_may_be_added_while_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread corrects a photograph while `with_bank` looks which images the other bank has."""
    pixels, labels = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.uint8)
    learned, none = LearnedImages(), torch.empty(0, dtype=torch.int64)
    bank = Bank(torch.empty(0, 3), none, none, none, (), ("background", "cat"), {})
    learned.add("first", pixels, labels)

    def list_slowly(bank: Bank, image_id: str) -> set[bytes]:
        learned.add("second", pixels, labels)
        return {b"a vector"}

    monkeypatch.setattr(learning, "_list_vectors", list_slowly)
    kept = learned.keep_for(bank, bank)
    assert list(kept.images) == ["first"]
    assert kept.find_region("first", 1)[1].all()  # type: ignore[index]


def test_regions_without_words_are_added_to_a_bank_with_words() -> None:
    """A bank that was built to be asked by words may be asked by labels, and learns all the same."""
    ids = torch.zeros(1, dtype=torch.int64)
    bank = Bank(torch.ones(1, 3), ids, ids, ids + 50, ("a",), ("background", "cat"), {}, word_values=torch.ones(1, 2))
    entry = {"pooled": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "areas": torch.tensor([40, 60])}
    grown = append_image(bank, "b", bank.classes, entry)
    assert grown.labels.tolist() == [0, 0, 1]
    assert grown.word_values is not None
    assert grown.word_values.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_a_photograph_is_digested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step that is taken back names all regions again."""
    digest, sizes = hashlib.sha256, list[int]()
    monkeypatch.setattr(hashlib, "sha256", lambda data=b"": (sizes.append(len(data)), digest(data))[1])
    picture, none = NamedPicture(np.zeros((40, 50, 3), np.uint8)), torch.empty(0, dtype=torch.int64)
    bank = Bank(torch.empty(0, 3), none, none, none, (), ("background",), {})
    mask = np.ones((40, 50), bool)
    regions = [NamedRegion(picture, mask, vector, "cat") for vector in torch.eye(3)]
    for _ in range(2):
        assert append_named(bank, regions).image_ids == (f"corrected/image-{digest(bytes(6000)).hexdigest()[:8]}",)
    assert sizes == [6000]
