"""Search a bank that is split over processes because no single device holds it (as DINOv2's k-NN evaluation does).

Each process compares the queries of all processes with its part of the bank, and the best of the parts' candidates are
the best of the whole bank. A similarity depends on its two vectors alone, and equal ones rank by index in the whole
bank, so the result equals that of an undivided search to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from moduseg.retrieval.search import BankIndex, search


def search_split(
    queries: Tensor, part: Tensor | BankIndex, top_k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Return the most similar vectors of a bank that is made of the parts of all processes, in the order of ranks.

    Every process of the group has to call it at the same time, also one without queries or with an empty part.

    Args:
        queries: `[n, C]` float, this process's own; `n` may differ from process to process.
        part: `[b, C]` float, this process's rows of the bank, or an index of them; `b` may differ.
        top_k: neighbours wanted, the same in every process.
        group: of `gloo` (tensors on the CPU) or `nccl` (on CUDA); the default group if omitted.

    Returns:
        Of this process's queries, `similarities [n, k]` float32 and `indices [n, k]` int64 into the whole bank, with
        `k = min(top_k, B)`.

    Raises:
        ValueError: see `search`.
    """
    device, dim = queries.device, queries.shape[1]
    counts = _gather(torch.tensor([len(queries), len(part)], device=device), group)
    num_queries, lengths = (counts[:, column].tolist() for column in (0, 1))
    max_queries, k, rank = max(num_queries), min(top_k, sum(lengths)), dist.get_rank(group)
    padded = torch.zeros((max_queries, dim), device=device)
    padded[: len(queries)] = queries.float()
    all_queries = _gather(padded, group).flatten(0, 1)
    # A part with fewer than k vectors is filled up with entries that rank after every neighbour.
    similarities = torch.full((len(all_queries), k), -torch.inf, device=device)
    indices = torch.full((len(all_queries), k), sum(lengths), device=device)
    part_similarities, part_rows = search(all_queries, part, top_k)
    similarities[:, : part_rows.shape[1]] = part_similarities
    indices[:, : part_rows.shape[1]] = part_rows + sum(lengths[:rank])
    own_rows = slice(rank * max_queries, rank * max_queries + len(queries))
    # Ranks ascend with indices and each part's equals are in order, so that a stable sort keeps equals by index.
    candidates = _gather(similarities, group)[:, own_rows].transpose(0, 1).flatten(1)
    candidate_rows = _gather(indices, group)[:, own_rows].transpose(0, 1).flatten(1)
    order = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return candidates.gather(1, order), candidate_rows.gather(1, order)


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return `[ranks, ...]`, the tensor of every process."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
