"""A bank split over processes, for one that no single device holds (as DINOv2's k-NN evaluation does it).

Each process compares the queries of all with its part, and the best of the parts' candidates are the best of the
whole: similarities depend on the two vectors alone, and equal ones rank by index in the whole bank, so that the answer
is the undivided search's to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from moduseg.retrieval.search import BankIndex, search


def search_split(
    queries: Tensor, part: Tensor | BankIndex, top_k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`search` in a bank that is the parts of all processes, one after the other in the order of ranks.

    Every process of the group has to call it at the same time, also one without queries or with an empty part.

    Args:
        queries: `[n, C]` float, this process's own; `n` may differ from process to process.
        part: `[b, C]` float, this process's rows of the bank, or an index of them; `b` may differ.
        top_k: neighbours wanted, the same in every process.
        group: of `gloo` (tensors on the CPU) or `nccl` (on CUDA); the default group where left out.

    Returns:
        Of this process's queries, `similarities [n, k]` float32 and `indices [n, k]` int64 into the whole bank, with
        `k = min(top_k, B)`.

    Raises:
        ValueError: see `search`.
    """
    device, dim = queries.device, queries.shape[1]
    counts = _gathered(torch.tensor([len(queries), len(part)], device=device), group)
    own_counts, lengths = (counts[:, column].tolist() for column in (0, 1))
    most, k, rank = max(own_counts), min(top_k, sum(lengths)), dist.get_rank(group)
    padded = torch.zeros((most, dim), device=device)
    padded[: len(queries)] = queries.float()
    everyone = _gathered(padded, group).flatten(0, 1)
    # Parts shorter than k are filled up with what no neighbour ranks behind.
    similarities = torch.full((len(everyone), k), -torch.inf, device=device)
    indices = torch.full((len(everyone), k), sum(lengths), device=device)
    found, rows = search(everyone, part, top_k)
    similarities[:, : found.shape[1]], indices[:, : rows.shape[1]] = found, rows + sum(lengths[:rank])
    own = slice(rank * most, rank * most + len(queries))
    # Ranks ascend with indices and each part's equals are in order, so that a stable sort keeps equals by index.
    candidates = _gathered(similarities, group)[:, own].transpose(0, 1).flatten(1)
    places = _gathered(indices, group)[:, own].transpose(0, 1).flatten(1)
    order = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return candidates.gather(1, order), places.gather(1, order)


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[ranks, ...]`, the tensor of every process."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
