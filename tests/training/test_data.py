"""The order of the items, and how processes and passes share a batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moduseg.training.data import BatchDraw, ItemOrder, load_ahead, move_batch, plan_step
from tests.support.tiny_training import Points


def test_each_item_comes_once_a_pass() -> None:
    order = ItemOrder(10, seed=0)
    items = [item for step in range(15) for item, _ in order.draw(step, 4)]
    for first in range(0, 60, 10):
        assert sorted(items[first : first + 10]) == list(range(10))
    assert items[:10] != items[10:20]


def test_order_follows_from_seed_and_step() -> None:
    once, later = ItemOrder(7, seed=3), ItemOrder(7, seed=3)
    drawn = [once.draw(step, 5) for step in range(9)]
    assert later.draw(8, 5) == drawn[8]
    assert later.draw(2, 5) == drawn[2]
    assert ItemOrder(7, seed=4).draw(2, 5) != drawn[2]


def test_an_item_has_another_seed_each_time() -> None:
    order = ItemOrder(3, seed=0)
    seeds = Counter(seed for step in range(40) for _, seed in order.draw(step, 3))
    assert len(seeds) == 120


@pytest.mark.parametrize(("passes", "num_ranks"), [(1, 1), (1, 2), (3, 2), (2, 3)])
def test_shares_make_up_the_batch(passes: int, num_ranks: int) -> None:
    order = ItemOrder(50, seed=0)
    draws = [
        draw
        for rank in range(num_ranks)
        for draw in plan_step(order, 5, steps=10, batch=12, passes=passes, rank=rank, num_ranks=num_ranks)
    ]
    assert {len(draw.items) for draw in draws} == {12 // (passes * num_ranks)}
    shared = sorted((item, seed) for draw in draws for item, seed in zip(draw.items, draw.seeds, strict=True))
    assert shared == sorted(order.draw(5, 12))
    assert {(draw.step, draw.progress) for draw in draws} == {(5, 0.5)}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(workers: int) -> None:
    order, points = ItemOrder(50, seed=0), Points()
    plans = [plan_step(order, step, steps=9, batch=4, passes=2) for step in range(9)]
    loaded = list(load_ahead(points, iter(plans), workers))
    assert [[draw for draw, _ in passes] for passes in loaded] == plans
    for passes in loaded:
        for draw, batch in passes:
            assert torch.equal(batch["points"], points.load(draw)["points"])


def test_error_of_a_loader_reaches_the_caller() -> None:
    class Broken(Points):
        def load(self, draw: BatchDraw) -> dict[str, torch.Tensor]:
            raise OSError(f"step {draw.step}")

    plans = iter([plan_step(ItemOrder(50, seed=0), step, steps=9, batch=4, passes=1) for step in range(9)])
    with pytest.raises(OSError, match="step 0"):
        list(load_ahead(Broken(), plans, 2))


def test_batch_is_moved_whatever_it_is_made_of(device: torch.device) -> None:
    batch = {"pixels": torch.zeros(2), "more": [torch.ones(1), ("name", torch.ones(3))], "ids": ["a", "b"]}
    moved = move_batch(batch, device)
    assert moved["pixels"].device.type == moved["more"][1][1].device.type == device.type
    assert moved["ids"] == ["a", "b"]
    assert moved["more"][1][0] == "name"
