"""A bank split over processes against the undivided one: two real processes over gloo, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from moduseg.retrieval.distributed import search_split
from moduseg.retrieval.search import ExactIndex, search

PARTS = {"even": (40, 40), "one short": (78, 2), "one empty": (80, 0), "first empty": (0, 80), "nothing": (0, 0)}
QUERIES = (5, 3)
TOP_K = 25


def make(case: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries and bank parts of each rank, with equal vectors in both parts."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 11, generator=generator).repeat(2, 1)[: sum(PARTS[case])]
    queries = torch.randn(sum(QUERIES), 11, generator=generator)
    return list(queries.split(QUERIES)), list(bank.split(PARTS[case]))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case in PARTS:
        queries, parts = make(case)
        results[case] = search_split(queries[rank], parts[rank], TOP_K)
    queries, parts = make("even")
    results["index"] = search_split(queries[rank], ExactIndex(parts[rank]), TOP_K)
    results["no queries here"] = search_split(queries[rank][: 2 * rank], parts[rank], TOP_K)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [*PARTS, "index", "no queries here"])
def test_equals_the_undivided_search(case: str, found: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> None:
    queries, parts = make(case if case in PARTS else "even")
    for rank, own in enumerate(queries):
        own = own[: 2 * rank] if case == "no queries here" else own
        similarities, indices = search(own, torch.cat(parts), TOP_K)
        assert torch.equal(found[rank][case][0], similarities)
        assert torch.equal(found[rank][case][1], indices)
