from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moduseg.errors import MissingError
from moduseg.retrieval import indices
from moduseg.retrieval.faiss_index import FaissIndex
from moduseg.retrieval.search import ExactIndex, search


def vectors(rng: np.random.Generator, count: int, dim: int = 24) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(count, dim)).astype(np.float32))


@pytest.mark.parametrize(("bank_size", "top_k"), [(300, 25), (10, 25), (1, 1), (0, 3)])
def test_faiss_finds_the_same(bank_size: int, top_k: int, rng: np.random.Generator) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra: pip install 'moduseg[faiss]'")
    bank, queries = vectors(rng, bank_size) * 3, vectors(rng, 13)
    bank[bank_size // 2 :: 7] = bank[: len(bank[bank_size // 2 :: 7])].clone()  # equals, which rank by index
    expected = search(queries, bank, top_k)
    for ours, exact in zip(search(queries, indices.build(bank, "faiss"), top_k), expected, strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("index", [0, 3])
def test_faiss_takes_the_gpu_of_the_vectors(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for faiss with GPUs notes the one it is told to use."""
    devices: list[int] = []
    stand_in = SimpleNamespace(
        IndexFlatIP=lambda dim: None,
        GpuIndexFlatConfig=SimpleNamespace,
        StandardGpuResources=lambda: "resources",
        GpuIndexFlatIP=lambda resources, dim, config: devices.append(config.device),
    )
    monkeypatch.setitem(sys.modules, "faiss", stand_in)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", index)  # type: ignore[assignment]

    FaissIndex(torch.empty(0, 4).as_subclass(OnGpu))
    assert devices == [index]


def test_faiss_refuses_what_is_no_number(rng: np.random.Generator) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra: pip install 'moduseg[faiss]'")
    bank = vectors(rng, 5)
    with pytest.raises(ValueError, match="got NaN or infinity"):
        search(bank * torch.nan, FaissIndex(bank), 1)
    bank[3, 3] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinity"):
        FaissIndex(bank)


def test_without_faiss(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingError, match=r"retrieval\.engine: got 'faiss', which is not installed; pip install"):
        indices.build(vectors(rng, 5), "faiss")


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_half_the_memory(engine: str, rng: np.random.Generator) -> None:
    """Stored in float16, computed in float32: as if the bank had been rounded."""
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss is an extra: pip install 'moduseg[faiss]'")
    bank, queries = vectors(rng, 200), vectors(rng, 9)
    index = indices.build(bank, engine, "float16")
    assert index.vectors.dtype == torch.float16
    rounded = search(queries, bank.half().float(), 5)
    for ours, expected in zip(search(queries, index, 5), rounded, strict=True):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(rounded[0], search(queries, bank, 5)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"engine": "fast"}, r"retrieval\.engine: got 'fast', expected one of exact, faiss"),
        ({"storage": "int8"}, r"retrieval\.storage: got 'int8', expected one of float32, float16"),
        ({"vectors": torch.ones(3)}, r"got a bank \(3,\)"),
    ],
)
def test_bad_values(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        indices.build(**({"vectors": torch.ones(4, 3)} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got chunks of 0"):
        ExactIndex(torch.ones(4, 3), 0)
