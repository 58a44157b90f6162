"""What a training goes through, and in which order: a function of the seed and the step alone.

Nothing about order and randomness is kept between steps. So a training that was killed goes on with the batches that
it would have seen, and several processes see together what one would see alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_SEEDS = 2**62


@dataclass(frozen=True)
class BatchDraw:
    """The items of one forward pass.

    Attributes:
        step: number of the optimiser steps made before.
        progress: `step` divided by the number of steps, in [0, 1).
        items: indices into the data.
        seeds: one number for each item, in `[0, 2**62)`, for whatever is random about it (crop, flip, masking). It is
            another one each time that the item comes, and does not depend on the process that loads it.
    """

    step: int
    progress: float
    items: tuple[int, ...]
    seeds: tuple[int, ...]


class TrainingData(Protocol):
    """Items that can be loaded by index, in several threads at once."""

    def __len__(self) -> int:
        """Return the number of items, 1 or more."""

    def load(self, draw: BatchDraw) -> Any:
        """Return the batch that `compute_loss` gets: tensors on the CPU, also in tuples, lists and mappings."""

    def name_of(self, item: int) -> str:
        """Return what a message calls an item: the id of its image."""


def derive_seed(*parts: int) -> int:
    """Return a number in `[0, 2**62)` that is a hash of other numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % _SEEDS


class ItemOrder:
    """Endless passes over the items, each in an order of its own.

    A batch may reach from one pass into the next: every batch is full, and each item comes once a pass.

    Args:
        num_items: number of items, 1 or more.
        seed: of the orders.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        self._num_items, self._seed = num_items, seed
        self._pass = -1
        self._order: list[int] = []

    def draw(self, step: int, batch: int) -> list[tuple[int, int]]:
        """Return the item and its seed at each place of the batch of a step."""
        return [self._at(position) for position in range(step * batch, (step + 1) * batch)]

    def _at(self, position: int) -> tuple[int, int]:
        number, index = divmod(position, self._num_items)
        if number != self._pass:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, number))
            self._order = torch.randperm(self._num_items, generator=generator).tolist()
            self._pass = number
        return self._order[index], derive_seed(self._seed, 1, position)


def plan_step(
    order: ItemOrder, step: int, *, steps: int, batch: int, passes: int, rank: int = 0, num_ranks: int = 1
) -> list[BatchDraw]:
    """Return what one process passes through the model in an optimiser step.

    Args:
        order: of the items.
        step: number of the steps made before.
        steps: of the training.
        batch: items of the step over all processes, a multiple of `passes * num_ranks`.
        passes: forward passes of each process.
        rank: of this process.
        num_ranks: number of processes.

    Returns:
        `passes` draws of equal size. Those of all ranks together are the batch of one process.
    """
    drawn = order.draw(step, batch)
    size = batch // (passes * num_ranks)
    draws = []
    for index in range(passes):
        first = (index * num_ranks + rank) * size
        items, seeds = zip(*drawn[first : first + size], strict=True)
        draws.append(BatchDraw(step, step / steps, items, seeds))
    return draws


def load_ahead(data: TrainingData, plans: Iterator[list[BatchDraw]], workers: int) -> Iterator[list[Any]]:
    """Yield the `(draw, batch)` pairs of each step, in order, loading the next steps in threads meanwhile.

    Args:
        data: what is loaded.
        plans: the draws of each step.
        workers: number of threads; 0 loads in the caller's.
    """
    if not workers:
        for draws in plans:
            yield [(draw, data.load(draw)) for draw in draws]
        return
    waiting: list[list[tuple[BatchDraw, Future[Any]]]] = []
    with ThreadPoolExecutor(workers, "load") as pool:
        try:
            for draws in plans:
                waiting.append([(draw, pool.submit(data.load, draw)) for draw in draws])
                # One step more than there are threads is under way.
                if len(waiting) > workers:
                    yield [(draw, future.result()) for draw, future in waiting.pop(0)]
            while waiting:
                yield [(draw, future.result()) for draw, future in waiting.pop(0)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; what is no tensor stays as it is."""
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and batch.device.type == "cpu":
            # Only from pinned memory does the copy go on while the host prepares the next batch.
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: move_batch(part, device) for name, part in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        moved = [move_batch(part, device) for part in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)  # type: ignore[call-arg]
    return batch
