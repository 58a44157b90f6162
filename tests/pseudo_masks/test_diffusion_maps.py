"""The steps of iSeg and DiffSegmenter on small maps, against hands and plain implementations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moduseg.pseudo_masks.diffsegmenter_maps import complete, merge_sizes
from moduseg.pseudo_masks.diffusion_maps import (
    renormalise_content,
    resize_maps,
    select_columns,
    side_of,
    stretch,
    to_pixels,
)
from moduseg.pseudo_masks.iseg_maps import (
    average_clusters,
    cluster_cells,
    merge_levels,
    propagate,
    reduce_entropy,
    shift_to_zero,
)

Random = Callable[..., Tensor]


@pytest.fixture
def random(device: torch.device) -> Random:
    """Positive random numbers of a shape."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.01).to(device)

    return draw


# Shared --------------------------------------------------------------------------------------------------------------


def test_sides_are_of_squares() -> None:
    assert side_of(torch.zeros(49, 3)) == 7
    with pytest.raises(ValueError, match="got 50 cells"):
        side_of(torch.zeros(50, 3))


def test_maps_keep_their_columns_when_resized(random: Random) -> None:
    maps = random(16, 3)
    assert resize_maps(maps, 4) is maps
    larger = resize_maps(maps, 8)
    expected = torch.nn.functional.interpolate(maps[:, 1].view(1, 1, 4, 4), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(larger[:, 1], expected.flatten())
    assert to_pixels(maps, (5, 1)).shape == (3, 5, 1)
    torch.testing.assert_close(to_pixels(maps, (4, 4))[2], maps[:, 2].view(4, 4))


def test_stretched_values_reach_zero_and_one(random: Random) -> None:
    maps = torch.cat([random(9, 2), random(1, 1).expand(9, 1)], 1)
    stretched = stretch(maps, (0,))
    assert stretched.amin(0).tolist() == [0, 0, 0]
    assert stretched.amax(0).tolist() == [1, 1, 0]
    assert torch.equal(stretched.argsort(0)[:, :2], maps.argsort(0)[:, :2])


def test_columns_of_a_class_are_averaged(random: Random) -> None:
    maps = random(4, 6)
    columns = select_columns(maps, [(2, 4), (5,)])
    torch.testing.assert_close(columns[:, 0], (maps[:, 2] + maps[:, 4]) / 2)
    assert torch.equal(columns[:, 1], maps[:, 5])


def test_content_competes_with_itself(device: torch.device) -> None:
    maps = torch.tensor([[0.9, 0.06, 0.02, 0.02], [0.5, 0.0, 0.0, 0.5]], device=device)
    expected = torch.tensor([[0, 0.75, 0.25, 0], [0, 0, 0, 0]], device=device)
    torch.testing.assert_close(renormalise_content(maps, (1, 2)), expected)


# iSeg ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logarithm", "log_of_e_times"), [
    pytest.param("log10", lambda a: math.log10(math.e * a), id="log10"),
    pytest.param("natural", lambda a: math.log(math.e * a), id="natural"),
])  # fmt: skip
def test_entropy_reduction_by_hand(
    logarithm: str, log_of_e_times: Callable[[float], float], device: torch.device
) -> None:
    attention = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.01, 0.39, 0.6]], device=device)
    strength = 0.2
    columns = [[0.8, 0.1, 0.01], [0.2, 0.6, 0.39], [0.0, 0.3, 0.6]]
    cut = [
        [max(0.0, v / max(column) + strength * log_of_e_times(v / max(column))) if v else 0.0 for v in column]
        for column in columns
    ]
    expected = torch.tensor(cut, device=device).T
    expected = expected / expected.sum(1, keepdim=True)
    result = reduce_entropy(attention, strength, logarithm)  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected)
    assert result[0, 2] == 0
    assert result[2, 0] == 0  # a weak connection
    torch.testing.assert_close(result.sum(1), torch.ones(3, device=device))


def test_no_strength_cuts_nothing(random: Random) -> None:
    attention = random(9, 9)
    scaled = attention / attention.amax(0)
    torch.testing.assert_close(reduce_entropy(attention, 0.0), scaled / scaled.sum(1, keepdim=True))


def test_more_strength_leaves_fewer_connections(random: Random) -> None:
    attention = random(25, 25).softmax(1) ** 3
    numbers = [int((reduce_entropy(attention, strength) > 0).sum()) for strength in (0, 0.05, 0.2, 1)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] < numbers[0]


def test_zeros_give_no_nan(device: torch.device) -> None:
    attention = torch.zeros(4, 4, device=device)
    attention[0, 0] = 1
    result = reduce_entropy(attention, 0.1)
    assert torch.equal(result, attention)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_columns_have_minimum_zero_and_sum_one(iterations: int, random: Random) -> None:
    maps = propagate(random(16, 3), reduce_entropy(random(16, 16), 0.01), iterations)
    torch.testing.assert_close(maps.amin(0), torch.zeros_like(maps[0]))
    torch.testing.assert_close(maps.sum(0), torch.ones_like(maps[0]))


def test_propagation_by_hand(random: Random) -> None:
    maps, connections = random(16, 2), random(16, 16)
    expected = maps
    for _ in range(3):
        expected = connections @ expected
        expected = expected - expected.min(0).values
        expected = expected / expected.sum(0)
    torch.testing.assert_close(propagate(maps, connections, 3), expected)


def test_no_iteration_is_the_identity(random: Random) -> None:
    maps = random(16, 2)
    assert torch.equal(propagate(maps, random(16, 16), 0), maps)


def test_a_constant_map_becomes_zero(random: Random) -> None:
    constant = torch.full_like(random(16, 2), 0.25)
    connections = torch.eye(16, device=constant.device)
    assert torch.equal(propagate(constant, connections, 3), torch.zeros_like(constant))
    assert torch.equal(shift_to_zero(constant), torch.zeros_like(constant))


def test_blocks_keep_the_support(random: Random) -> None:
    """Cells that no connection reaches stay at zero."""
    connections = torch.zeros_like(random(16, 16))
    connections[:8, :8], connections[8:, 8:] = random(8, 8), random(8, 8)
    maps = torch.zeros_like(random(16, 1))
    maps[2] = 1
    result = propagate(maps, reduce_entropy(connections, 0.0), 5)
    assert (result[8:] == 0).all()
    assert (result[:8] > 0).sum() >= 7


def test_levels_are_divided_by_their_sums(random: Random) -> None:
    small, large = random(4, 3) * 7, random(16, 3)
    merged = merge_levels([small, large], [0.7, 0.3], 4)
    expected = 0.7 * resize_maps(small / small.sum(0), 4) + 0.3 * large / large.sum(0)
    torch.testing.assert_close(merged, expected)


def plain_clusters(maps: Tensor, stride: int, rounds: int) -> list[int]:
    """The same k-means, cell by cell."""
    side = side_of(maps)
    cells = [[1e-6 if v == 0 else v for v in row] for row in maps.tolist()]
    centres = {n: cells[r * side + c] for n, (r, c) in enumerate(
        (r, c) for r in range(0, side, stride) for c in range(0, side, stride))}  # fmt: skip

    def divergence(first: list[float], second: list[float]) -> float:
        pairs = [(a + 1e-5, b + 1e-5) for a, b in zip(first, second, strict=True)]
        return sum(a * math.log(a / b) + b * math.log(b / a) for a, b in pairs) / 2

    clusters: list[int] = []
    for _ in range(rounds):
        clusters = [min(centres, key=lambda n: (divergence(centres[n], cell), n)) for cell in cells]
        members = {n: [cell for cell, m in zip(cells, clusters, strict=True) if m == n] for n in set(clusters)}
        centres = {n: [sum(v) / len(part) for v in zip(*part, strict=True)] for n, part in members.items()}
    return clusters


def test_clusters_are_those_of_plain_k_means(random: Random) -> None:
    maps = random(36, 5) ** 3
    maps[3, 2] = 0
    for rounds in (1, 2, 6):
        assert cluster_cells(maps, 2, rounds).tolist() == plain_clusters(maps, 2, rounds)


def test_clustering_keeps_piecewise_constant_maps(random: Random) -> None:
    pieces = random(3, 4)
    maps = pieces[torch.arange(36, device=pieces.device) // 12]
    clusters = cluster_cells(maps, 2, 20)
    averaged = average_clusters(maps, clusters, 9)
    torch.testing.assert_close(averaged, maps)
    assert torch.equal(cluster_cells(averaged, 2, 20), clusters)
    assert len(clusters.unique()) == 3


def test_a_cell_takes_the_mean_of_its_cluster(device: torch.device) -> None:
    maps = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 7.0], [0.0, 0.0]], device=device)
    clusters = torch.tensor([0, 0, 2, 2], device=device)
    expected = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.5, 3.5], [2.5, 3.5]], device=device)
    assert torch.equal(average_clusters(maps, clusters, 3), expected)


# DiffSegmenter -------------------------------------------------------------------------------------------------------


def test_sizes_are_stretched_and_weighted(random: Random) -> None:
    small, large = random(4, 2), random(16, 2)
    merged = merge_sizes([small, large], [0.3, 0.5])
    upsampled = resize_maps(small, 4)
    expected = 0.3 * stretch(upsampled, (0,)) + 0.5 * stretch(large, (0,))
    torch.testing.assert_close(merged, expected)


def test_a_constant_level_adds_nothing(random: Random) -> None:
    large = random(16, 2)
    constant = torch.full_like(large[:4], 0.4)
    assert torch.equal(merge_sizes([constant, large], [0.3, 0.5]), merge_sizes([large], [0.5]))


def test_completion_is_a_product(random: Random) -> None:
    maps, attention = random(16, 2), random(16, 16).softmax(1)
    torch.testing.assert_close(complete(maps, [attention]), attention @ maps)
    assert torch.equal(complete(maps, []), maps)


def test_identity_leaves_the_map(random: Random) -> None:
    maps = random(16, 2)
    assert torch.equal(complete(maps, [torch.eye(16, device=maps.device)]), maps)


def test_every_side_completes_at_its_own_size(random: Random) -> None:
    maps, small, large = random(16, 2), random(4, 4).softmax(1), random(16, 16).softmax(1)
    expected = (resize_maps(small @ resize_maps(maps, 2), 4) + large @ maps) / 2
    torch.testing.assert_close(complete(maps, [small, large]), expected)
