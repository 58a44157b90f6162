"""The processes that train one model together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, distributed

_TIMEOUT = timedelta(hours=2)
"""While rank 0 measures, the others wait in their next exchange of gradients."""
_group_numbers = count()
"""Of the trainings of this process: all ranks train the same ones, in the same order."""


@dataclass(frozen=True)
class TrainingGroup:
    """This process among those that train.

    Attributes:
        rank: of this process; rank 0 writes files and shows progress.
        num_ranks: number of processes, 1 if it trains alone.
    """

    rank: int = 0
    num_ranks: int = 1

    @property
    def is_leader(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


@contextmanager
def join_processes(device: torch.device) -> Iterator[TrainingGroup]:
    """Join the processes that torchrun started, for as long as the training takes.

    A group that the caller has made is used and kept; without torchrun the process is alone.

    Args:
        device: of this process: NCCL connects CUDA devices, gloo all others.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield TrainingGroup(distributed.get_rank(), distributed.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1") or 1) == 1:
        yield TrainingGroup()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, num_ranks = _find_store()
    # In a place of its own: a second group would find the addresses that the first one left.
    group_store = distributed.PrefixStore(f"training_{next(_group_numbers)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=group_store, rank=rank, world_size=num_ranks, timeout=_TIMEOUT)
    try:
        yield TrainingGroup(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


@cache
def _find_store() -> tuple[Any, int, int]:
    """Return the store at which the processes of torchrun meet, the rank of this one and their number."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=_TIMEOUT))


def average_over_processes(count: Tensor) -> Tensor:
    """Return the mean of a scalar over the processes of the training, the scalar itself where there is one.

    A loss that is divided by this mean, and not by what its own share of the batch counts, has the gradient of the
    whole batch once the processes have averaged theirs. Every process has to call it.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return count
    total = count.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def share_tensors(tensors: Iterable[Tensor], group: TrainingGroup) -> None:
    """Overwrite tensors with those of rank 0.

    What batch normalisation counted differs between processes: each saw its share of the batches alone.
    """
    if group.num_ranks > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)
