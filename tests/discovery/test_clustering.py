"""K-means and spectral clusters, beside scikit-learn and on clusters that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moduseg.discovery.clustering import count_by_eigengap, embed_spectrally, find_nearest, k_means


def make_clouds(count: int, size: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points around `count` corners, and which corner each is of."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.eye(count, 8) * 4
    labels = torch.arange(count).repeat_interleave(size)
    return corners[labels] + spread * torch.randn(count * size, 8, generator=generator), labels


def same_partition(first: Tensor, second: Tensor) -> bool:
    return bool(((first[:, None] == first) == (second[:, None] == second)).all())


@pytest.mark.parametrize("count", [1, 3, 6])
def test_clouds_are_found(count: int) -> None:
    vectors, labels = make_clouds(count, 20, 0.2)
    centres = k_means(vectors, count)
    found, distances = find_nearest(vectors, centres)
    assert same_partition(found, labels)
    torch.testing.assert_close(distances, ((vectors - centres[found]) ** 2).sum(1), atol=1e-4, rtol=1e-4)


def test_as_good_as_scikit_learn() -> None:
    """Not the same centres, where clouds overlap, but within a percent of the same distances."""
    from sklearn.cluster import KMeans

    vectors, _ = make_clouds(5, 60, 2.0)
    ours = float(find_nearest(vectors, k_means(vectors, 8))[1].sum())
    theirs = KMeans(8, n_init=10, random_state=0).fit(vectors.numpy()).inertia_
    assert ours < 1.02 * theirs


def test_a_seed_decides() -> None:
    vectors, _ = make_clouds(5, 30, 2.0)
    assert torch.equal(k_means(vectors, 7, seed=3), k_means(vectors, 7, seed=3))


def test_weights_count_like_copies() -> None:
    vectors, _ = make_clouds(2, 10, 0.5)
    weights = torch.arange(1.0, 21.0)
    weighted = k_means(vectors, 2, weights=weights)
    copied = k_means(vectors.repeat_interleave(weights.long(), 0), 2)
    order = weighted[:, 0].argsort(), copied[:, 0].argsort()
    torch.testing.assert_close(weighted[order[0]], copied[order[1]])


def test_fewer_different_vectors_than_clusters() -> None:
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(5, 1)
    centres = k_means(vectors, 4)
    assert sorted(centres.tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert len(k_means(vectors[:1], 3)) == 1


@pytest.mark.parametrize(("count", "vectors"), [
    pytest.param(0, torch.ones(3, 2), id="no cluster"),
    pytest.param(2, torch.ones(0, 2), id="no vector"),
])  # fmt: skip
def test_nothing_to_cluster(count: int, vectors: Tensor) -> None:
    with pytest.raises(ValueError, match=r"k-means: got \d vectors and \d clusters, expected 1 or more of both"):
        k_means(vectors, count)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_eigenvalues_tell_the_number_of_clouds(count: int) -> None:
    vectors, labels = make_clouds(count, 15, 0.3)
    values, eigenvectors = embed_spectrally(vectors, 0.1, 9)
    assert values[0] == pytest.approx(0, abs=1e-5)
    assert count_by_eigengap(values, 8) == count
    embedded = torch.nn.functional.normalize(eigenvectors[:, :count], dim=1)
    assert same_partition(find_nearest(embedded, k_means(embedded, count))[0], labels)


@pytest.mark.parametrize(("values", "expected"), [
    pytest.param([0.0, 0.1, 0.2, 0.9, 1.0], 3, id="the largest gap"),
    pytest.param([0.0, 0.5, 0.6, 0.7, 1.6], 4, id="the last one"),
    pytest.param([0.0, 0.9], 2, id="two tokens"),
    pytest.param([0.0], 1, id="one token"),
])  # fmt: skip
def test_counting_by_gaps(values: list[float], expected: int) -> None:
    assert count_by_eigengap(torch.tensor(values), 4) == expected
