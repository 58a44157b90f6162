"""Images per class, chosen after the bank is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from moduseg.bank.store import Bank
from moduseg.bank.subset import choose_rows
from moduseg.config import OutliersConfig, compose
from moduseg.errors import ConfigError
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from tests.support.runs import overrides

NO_FILTER = OutliersConfig(enabled=False)
IDS = tuple(f"image{i}" for i in range(8))
# Image -> classes with a vector; image 7 gave none.
HOLDS = ((0, 1), (0, 1, 2), (0, 2), (0, 1), (1, 2), (0, 3), (0,), ())
LABELS = torch.tensor([label for labels in HOLDS for label in labels])
INDEX = torch.tensor([image for image, labels in enumerate(HOLDS) for _ in labels])


def images(count: int, seed: int, device: torch.device | None = None) -> set[int]:
    rows = choose_rows(LABELS.to(device), INDEX.to(device), IDS, count, seed)
    assert rows.tolist() == sorted(rows.tolist())
    chosen = set(INDEX[rows.cpu()].tolist())
    # Images count whole.
    assert rows.tolist() == [row for row, image in enumerate(INDEX.tolist()) if image in chosen]
    return chosen


def holding(label: int, chosen: set[int]) -> set[int]:
    return {image for image in chosen if label in HOLDS[image]}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 100])
def test_every_class_gets_its_images(count: int, seed: int) -> None:
    chosen = images(count, seed)
    for label in (1, 2, 3):
        everywhere = holding(label, set(range(8)))
        assert len(holding(label, chosen)) >= min(count, len(everywhere))
    # Nobody is chosen for the background or for nothing.
    assert chosen.isdisjoint({6, 7})
    # No image is there without need: one of its classes has it among its first `count`.
    assert len(chosen) <= sum(min(count, len(holding(label, set(range(8))))) for label in (1, 2, 3))


@pytest.mark.parametrize("seed", range(6))
def test_a_larger_number_keeps_the_images_of_a_smaller_one(seed: int) -> None:
    assert images(1, seed) <= images(2, seed) <= images(3, seed) <= images(4, seed) == {0, 1, 2, 3, 4, 5}


def test_seeds_choose_differently_and_a_seed_always_the_same(device: torch.device) -> None:
    assert len({frozenset(images(1, seed)) for seed in range(10)}) > 1
    assert images(2, 3, device) == images(2, 3)


def test_the_choice_depends_on_no_other_image() -> None:
    """Without an image that was not chosen, and in another order of the data set, the choice is the same."""
    chosen = images(2, 0)
    spare = min({0, 1, 2, 3, 4} - chosen)
    keep = torch.ne(INDEX, spare)
    again = choose_rows(LABELS[keep], INDEX[keep], IDS, 2, 0)
    assert set(INDEX[keep][again].tolist()) == chosen
    turned = choose_rows(LABELS, 7 - INDEX, IDS[::-1], 2, 0)
    assert set(INDEX[turned].tolist()) == chosen


def test_no_foreground_and_an_empty_bank() -> None:
    assert choose_rows(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), IDS, 1, 0).tolist() == []
    empty = torch.empty(0, dtype=torch.int64)
    assert choose_rows(empty, empty, IDS, 1, 0).tolist() == []
    with pytest.raises(ValueError, match=r"images_per_class: got 0, expected 1 or more"):
        choose_rows(empty, empty, IDS, 0, 0)


def test_the_search_bank_is_that_of_the_chosen_images_alone() -> None:
    """Mean, filter and rows are as if the other images had never been there."""
    pooled = torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(0)) + 3
    bank = Bank(pooled, LABELS, INDEX, torch.ones_like(LABELS), IDS, ("background", "a", "b", "c"), {})
    found = bank.select_vectors(True, NO_FILTER, images_per_class=1, images_seed=2)
    rows = choose_rows(LABELS, INDEX, IDS, 1, 2)
    assert found.rows.tolist() == rows.tolist()
    assert found.labels.tolist() == LABELS[rows].tolist()
    assert found.centre is not None
    assert torch.allclose(found.centre, pooled[rows].mean(0))
    assert torch.allclose(found.vectors, functional.normalize(pooled[rows] - pooled[rows].mean(0), dim=1))
    dropped = bank.select_vectors(True, OutliersConfig(drop_ratio=0.5), images_per_class=2, images_seed=2)
    alone = choose_rows(LABELS, INDEX, IDS, 2, 2)
    small = Bank(pooled[alone], LABELS[alone], INDEX[alone], torch.ones_like(alone), IDS, bank.classes, {})
    expected = small.select_vectors(True, OutliersConfig(drop_ratio=0.5))
    assert torch.equal(dropped.vectors, expected.vectors)
    assert dropped.rows.tolist() == alone[expected.rows].tolist()


def test_in_a_run_it_changes_the_result_and_no_bank(tmp_path: Path) -> None:
    def run(*more: str) -> tuple[Path, Path]:
        cfg = compose(overrides(tmp_path, *more, train=6, val=2))
        return BuildBank.run(cfg), Infer.run(cfg)

    everything = run()
    one, same, other = (
        run("bank.images_per_class=1", *more) for more in ([], ["bank.images_seed=0"], ["bank.images_seed=1"])
    )
    assert {bank for bank, _ in (everything, one, same, other)} == {everything[0]}
    assert one[1] == same[1]
    assert len({path for _, path in (everything, one, other)}) == 3
    assert run("bank.images_seed=5") == everything  # a seed without a number decides nothing
    with pytest.raises(ConfigError, match=r"images_per_class: got 0, expected 1 to"):
        compose(["bank.images_per_class=0"])
