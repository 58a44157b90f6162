"""The vectors of a bank beside those of true masks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moduseg.config import compose
from moduseg.errors import ConfigError
from moduseg.pipeline.workspace import Workspace
from moduseg.studies.bank_vectors import _index_foreground, measure_vectors
from tests.support.runs import overrides

UNCHANGED = ("bank.purify.enabled=false", "bank.min_area=1")


def measure(outputs: Path, *settings: str) -> dict[str, float]:
    cfg = compose(overrides(outputs, *settings, train=4, val=1))
    return measure_vectors(cfg, Workspace(cfg))


def test_true_masks_agree_with_themselves(tmp_path: Path) -> None:
    assert measure(tmp_path, *UNCHANGED) == pytest.approx({"agreement": 100.0, "kept": 100.0})


def test_wrong_masks_agree_less(tmp_path: Path) -> None:
    """Masks that spill by 12 pixels take in what surrounds them; eroded by half of it they are nearer to the truth."""
    spilt = measure(tmp_path, *UNCHANGED, "pseudo_masks.spill=12", "pseudo_masks.background.rule=constant")
    purified = measure(
        tmp_path,
        "bank.min_area=1",
        "bank.purify.iterations=6",
        "pseudo_masks.spill=12",
        "pseudo_masks.background.rule=constant",
    )
    assert spilt["kept"] == 100.0 >= purified["kept"]
    assert spilt["agreement"] < purified["agreement"] < 100.0


def test_a_class_that_erosion_removes_is_not_kept(tmp_path: Path) -> None:
    assert measure(tmp_path, "bank.purify.iterations=60", "bank.min_area=1") == {"agreement": None, "kept": 0.0}


def test_parts_of_a_region_do_not_take_its_place() -> None:
    """With `bank.parts` several vectors of an image have one label; that of the whole region comes first."""
    bank: Any = SimpleNamespace(
        image_ids=["a", "b"], image_index=torch.tensor([0, 0, 0, 0, 1]), labels=torch.tensor([0, 3, 3, 5, 3])
    )
    assert _index_foreground(bank) == {("a", 3): 1, ("a", 5): 3, ("b", 3): 4}


def test_a_finished_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bank\.path: got 'bank', expected null"):
        measure(tmp_path, "bank.path=bank")
