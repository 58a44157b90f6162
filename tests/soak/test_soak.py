"""A short night: accidents of two seeds leave the results of an undisturbed run; a spoilt result is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import night
from tests.soak.accidents import Scene
from tests.soak.night import Night

pytestmark = pytest.mark.slow


def test_a_round_leaves_what_an_undisturbed_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night, "PER_ROUND", 4)
    with Night(tmp_path / "soak", 3) as short:
        assert short.run(0) == 0
    log = (tmp_path / "soak" / "log.txt").read_text()
    assert "seed 3" in log
    assert log.rstrip().endswith("1 rounds, 4 accidents: no fault")


def test_a_spoilt_result_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(scene: Scene) -> str:
        scene.finish(scene.start("propose"))
        (scene.outputs / "miniature/propose/x-train-0/masks").mkdir(parents=True)
        (scene.outputs / "miniature/propose/x-train-0/masks/0.json").write_text("{}")
        return "an unknown file"

    monkeypatch.setattr(night, "PER_ROUND", 1)
    monkeypatch.setattr(night, "ACCIDENTS", ((spoil, 1.0),))
    with Night(tmp_path / "soak", 0) as short:
        assert short.run(0) == 1
    assert short.faults == ["round-0: miniature/propose/x-train-0/masks/0.json is unknown"]
