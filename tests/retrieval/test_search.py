from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moduseg.retrieval import search as module
from moduseg.retrieval.search import ExactIndex, search
from tests import reference


def assert_nearest(queries: np.ndarray, bank: np.ndarray, top_k: int, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    similarities, indices = (tensor.cpu().numpy() for tensor in found)
    assert similarities.dtype == np.float32
    assert indices.dtype == np.int64
    for query, row, neighbours in zip(queries, similarities, indices, strict=True):
        expected, ranked = reference.search(query, bank, top_k)
        np.testing.assert_allclose(row, expected, atol=1e-6)
        assert neighbours.tolist() == ranked


@pytest.mark.parametrize(
    ("count", "bank_size", "dim", "top_k"), [(7, 90, 16, 25), (3, 40, 1, 5), (1, 1, 8, 3), (5, 200, 33, 1)]
)
def test_equals_loop(
    count: int, bank_size: int, dim: int, top_k: int, device: torch.device, rng: np.random.Generator
) -> None:
    # Lengths differ widely, as the search is by direction only. One channel has similarities of 1 and -1: all ties.
    queries = (rng.normal(size=(count, dim)) * rng.uniform(1e-3, 1e3, (count, 1))).astype(np.float32)
    bank = (rng.normal(size=(bank_size, dim)) * rng.uniform(1e-3, 1e3, (bank_size, 1))).astype(np.float32)
    assert_nearest(
        queries, bank, top_k, search(torch.from_numpy(queries).to(device), torch.from_numpy(bank).to(device), top_k)
    )


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1, 20), (2, 7), (3, 64), (100, 100), (4, 999)])
def test_chunks_change_nothing(
    query_chunk: int, bank_chunk: int, device: torch.device, rng: np.random.Generator
) -> None:
    bank = torch.from_numpy(rng.normal(size=(150, 37)).astype(np.float32)).to(device)
    bank = bank[torch.from_numpy(rng.integers(0, 150, 300)).to(device)]  # with repetitions, across chunks
    queries = torch.from_numpy(rng.normal(size=(11, 37)).astype(np.float32)).to(device)
    whole = search(queries, bank, 25)
    chunked = search(queries, bank, 25, query_chunk=query_chunk, bank_chunk=bank_chunk)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
    one_by_one = [search(query[None], bank, 25) for query in queries]
    assert torch.equal(whole[0], torch.cat([similarities for similarities, _ in one_by_one]))
    assert torch.equal(whole[1], torch.cat([indices for _, indices in one_by_one]))


def test_an_index_serves_many_searches(device: torch.device, rng: np.random.Generator) -> None:
    bank = torch.from_numpy(rng.normal(size=(90, 16)).astype(np.float32)).to(device)
    index = ExactIndex(bank, query_chunk=3, bank_chunk=20)
    for count in (1, 7):
        queries = torch.from_numpy(rng.normal(size=(count, 16)).astype(np.float32)).to(device)
        for ours, expected in zip(search(queries, index, 25), search(queries, bank, 25), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@pytest.mark.parametrize("pending", [1, 40, 1 << 22])
def test_any_order_of_the_bank_in_bounded_memory(
    order: str, pending: int, device: torch.device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearest last: every chunk beats the floor of those before it. All equal: every vector is a candidate."""
    monkeypatch.setattr(module, "_PENDING", pending)
    angles = np.linspace(1.5, 0.1, 200) if order == "rising" else np.linspace(0.1, 1.5, 200)
    angles = np.full(200, 0.3) if order == "equal" else angles
    bank = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)).to(device)
    queries = torch.tensor([[2.0, 0.0], [1.0, 0.01], [1.0, -1.0]], device=device)
    longest = 0
    cat = module._Candidates.cat.__func__  # type: ignore[attr-defined]

    def watched(cls: type, parts: list[module._Candidates]) -> module._Candidates:
        nonlocal longest
        longest = max(longest, sum(len(part) for part in parts))
        return cat(cls, parts)

    monkeypatch.setattr(module._Candidates, "cat", classmethod(watched))
    similarities, indices = search(queries, bank, 5, query_chunk=3, bank_chunk=16)
    expected = range(199, 194, -1) if order == "rising" else range(5)
    assert indices.tolist() == [list(expected)] * 3
    assert (similarities[:, :1] >= similarities).all()
    if pending < 1000:
        assert longest <= pending + 3 * 5 + 3 * 16  # those waiting, the k best of them, one chunk


@pytest.mark.parametrize("dim", [1, 3, 5, 37, 129, 1152])
def test_identical_bank_rows_rank_by_index(dim: int, device: torch.device, rng: np.random.Generator) -> None:
    # Sizes off every vector width, so that a row meets different code in a matrix product depending on its place.
    distinct = torch.from_numpy(rng.normal(size=(4, dim)).astype(np.float32)).to(device)
    copies = torch.from_numpy(rng.permutation(np.repeat(np.arange(4), 29))).to(device)
    queries = torch.from_numpy(rng.normal(size=(9, dim)).astype(np.float32)).to(device)
    for bank_chunk in (13, 1000):
        similarities, indices = search(queries, distinct[copies], 116, bank_chunk=bank_chunk)
        for row, neighbours in zip(similarities, indices, strict=True):
            for which in range(4):
                mine = copies[neighbours] == which
                assert mine.sum() == 29
                assert row[mine].unique().numel() == 1
            for value in row.unique():
                tied = neighbours[row == value]
                assert torch.equal(tied, tied.sort().values)
            assert torch.equal(row, row.sort(descending=True).values)


def test_ties_at_the_last_place(device: torch.device) -> None:
    bank = torch.tensor([[0.0, 1], [1, 0], [0, 2], [3, 0], [5, 0], [1, 1]], device=device)
    similarities, indices = search(torch.tensor([[2.0, 0]], device=device), bank, 2)
    assert indices.tolist() == [[1, 3]]
    assert similarities.tolist() == [[1, 1]]


def test_nearly_equal_vectors_keep_their_order(device: torch.device) -> None:
    # Cosines 1 - a^2 / 2, closer to each other than the rounding of a product of this width but not equal.
    angles = torch.linspace(0.02, 0.001, 40, dtype=torch.float64)
    bank = torch.zeros((40, 600), dtype=torch.float64)
    bank[:, 0], bank[:, 599] = angles.cos(), angles.sin()
    query = torch.zeros((1, 600))
    query[0, 0] = 1
    _, indices = search(query.to(device), bank.float().to(device), 5)
    assert indices.tolist() == [[39, 38, 37, 36, 35]]


def test_zero_vectors_have_similarity_zero(device: torch.device) -> None:
    bank = torch.tensor([[-1.0, 0], [0, 0], [1, 1]], device=device)
    similarities, indices = search(torch.tensor([[1.0, 0], [0, 0], [1e-30, 0]], device=device), bank, 3)
    assert indices.tolist() == [[2, 1, 0], [0, 1, 2], [0, 1, 2]]
    assert similarities[0].tolist() == pytest.approx([0.5**0.5, 0, -1])
    assert not similarities[1:].any()


def test_a_vector_is_as_similar_to_itself_as_can_be(device: torch.device, rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.normal(size=(50, 77)).astype(np.float32)).to(device)
    similarities, indices = search(vectors, vectors, 1)
    assert indices[:, 0].tolist() == list(range(50))
    assert (similarities == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype: torch.dtype, device: torch.device, rng: np.random.Generator) -> None:
    queries = torch.from_numpy(rng.normal(size=(3, 12))).to(device, dtype)
    bank = torch.from_numpy(rng.normal(size=(20, 12))).to(device, dtype)
    found = search(queries, bank, 4)
    assert_nearest(queries.float().cpu().numpy(), bank.float().cpu().numpy(), 4, found)


@pytest.mark.parametrize(
    ("count", "bank_size", "shape"), [(0, 5, (0, 3)), (4, 0, (4, 0)), (4, 2, (4, 2)), (0, 0, (0, 0))]
)
def test_small_and_empty(count: int, bank_size: int, shape: tuple[int, int], device: torch.device) -> None:
    similarities, indices = search(torch.ones((count, 6), device=device), torch.ones((bank_size, 6), device=device), 3)
    assert similarities.shape == indices.shape == shape
    assert indices.dtype == torch.int64


def test_bad_values() -> None:
    queries, bank = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="top_k: got 0"):
        search(queries, bank, 0)
    with pytest.raises(ValueError, match="same C"):
        search(torch.ones(2, 4), bank, 1)
    with pytest.raises(ValueError, match="expected floats"):
        search(queries.long(), bank, 1)
    with pytest.raises(ValueError, match="chunks of 0"):
        search(queries, bank, 1, query_chunk=0)
    for value in (float("nan"), float("inf")):
        spoilt = bank.clone()
        spoilt[2, 1] = value
        with pytest.raises(ValueError, match="NaN"):
            search(queries, spoilt, 1)
        with pytest.raises(ValueError, match="NaN"):
            search(spoilt, bank, 1)


class _LargeBlocks(TorchDispatchMode):
    """Addresses of the blocks of at least `least` numbers that operators gave back."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.kept, self.starts = least, [], set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.least:
                self.kept.append(tensor)  # else the next one may get the same address
                self.starts.add(tensor.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_chunks_are_compared_in_the_same_blocks(dtype: torch.dtype) -> None:
    """Blocks taken anew for every chunk leave holes in the heap: gigabytes in a bank of a million vectors."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn((40 * 256, 64), generator=generator).to(dtype)
    queries = torch.randn((64, 64), generator=generator)
    index = ExactIndex(bank, query_chunk=64, bank_chunk=256)
    with _LargeBlocks(64 * 256) as seen:
        search(queries, index, 5)
    # A few, while the floor is low and many candidates pass; with two new ones a chunk it would be eighty.
    assert len(seen.starts) <= 20
