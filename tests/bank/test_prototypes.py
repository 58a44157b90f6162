from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.bank.prototypes import find_prototypes
from moduseg.bank.store import Bank
from moduseg.config import BankConfig, OutliersConfig, compose
from moduseg.errors import ConfigError

OFF = OutliersConfig(enabled=False)


def blobs(rng: np.random.Generator, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 in three tight blobs of 5, 6 and 7 vectors, class 4 with two vectors; shuffled."""
    centres = np.repeat(np.eye(4), [5, 6, 7, 2], axis=0)
    vectors = (centres + rng.normal(scale=0.02, size=centres.shape)).astype(np.float32)
    labels, order = np.repeat([0, 4], [18, 2]), rng.permutation(20)
    return (
        F.normalize(torch.from_numpy(vectors[order]).to(device), dim=1),
        torch.from_numpy(labels[order]).to(device),
    )


def test_blobs_become_their_means(device: torch.device, rng: np.random.Generator) -> None:
    vectors, labels = blobs(rng, device)
    prototypes = find_prototypes(vectors, labels, 3)
    centres, members = prototypes.vectors, prototypes.members
    assert prototypes.labels.tolist() == [0, 0, 0, 4, 4]
    torch.testing.assert_close(torch.linalg.vector_norm(centres, dim=1), torch.ones(5, device=device))
    assert sorted(centres[:3].argmax(1).tolist()) == [0, 1, 2]
    for centre, member in zip(centres[:3], members[:3], strict=True):
        blob = vectors[(labels == 0) & (vectors.argmax(1) == centre.argmax())]
        torch.testing.assert_close(centre, F.normalize(blob.mean(0), dim=0), atol=1e-6, rtol=0)
        assert int(member) == int((vectors @ centre).masked_fill(labels != 0, -1).argmax())
    # A class of no more vectors keeps them.
    rows = (labels == 4).nonzero()[:, 0]
    assert members[3:].tolist() == rows.tolist()
    assert torch.equal(centres[3:], vectors[rows])


def test_the_same_every_time(device: torch.device, rng: np.random.Generator) -> None:
    vectors = F.normalize(torch.from_numpy(rng.normal(size=(80, 6)).astype(np.float32)).to(device), dim=1)
    labels = torch.from_numpy(rng.integers(0, 3, 80)).to(device)
    first, second = find_prototypes(vectors, labels, 4), find_prototypes(vectors, labels, 4)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.members, second.members)


def test_empty_and_bad_values() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert [len(t) for t in vars(find_prototypes(torch.zeros(0, 4), empty, 3)).values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="prototypes: got 0, expected 1 or more"):
        find_prototypes(torch.zeros(0, 4), empty, 0)
    with pytest.raises(ValueError, match=r"expected \[B, C\] and \[B\]"):
        find_prototypes(torch.zeros(3, 4), empty, 2)
    with pytest.raises(ConfigError, match=r"prototypes: got 0, expected 1 to"):
        compose(["bank.prototypes=0"])


def small_bank(rng: np.random.Generator) -> Bank:
    vectors, labels = blobs(rng, torch.device("cpu"))
    labels = torch.where(labels == 4, 2, torch.where(vectors.argmax(1) == 1, 1, 0))
    index = torch.arange(20)
    ids = tuple(f"i{i}" for i in range(20))
    return Bank(vectors + 0.1, labels, index, torch.ones_like(index), ids, ("background", "cat", "dog"), {})


def test_the_bank_is_stored_whole_and_read_in_prototypes(rng: np.random.Generator) -> None:
    bank = small_bank(rng)
    whole = bank.configured(BankConfig(outliers=OFF))
    read = bank.configured(BankConfig(outliers=OFF, prototypes=2))
    assert len(bank) == len(whole.vectors) == 20
    assert torch.bincount(read.labels).tolist() == [2, 2, 2]
    assert bank.labels[read.rows].tolist() == read.labels.tolist()  # a neighbour is explained by one of its class
    assert torch.equal(whole.vectors, bank.select_vectors(False, OFF).vectors)


def test_a_subset_of_the_classes(rng: np.random.Generator) -> None:
    """The background stays, and so does the mean that is subtracted; rows keep their numbers."""
    bank = small_bank(rng)
    every, some = (bank.configured(BankConfig(outliers=OFF, centre=True, classes=c)) for c in (None, ("dog",)))
    keep = every.labels != 1
    assert torch.equal(some.vectors, every.vectors[keep])
    assert some.rows.tolist() == every.rows[keep].tolist()
    assert set(some.labels.tolist()) == {0, 2}
    with pytest.raises(ConfigError, match=r"bank\.classes: got cow, expected some of background, cat, dog"):
        bank.configured(BankConfig(classes=("cat", "cow")))
