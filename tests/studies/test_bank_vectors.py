"""The vectors of a bank beside those of true masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.pipeline.workspace import Workspace
from moduseg.studies.bank_vectors import measure_vectors
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
