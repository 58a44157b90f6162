"""Every long step says in a log file how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg import progress
from moduseg.config import compose
from moduseg.stages.infer import Infer
from tests.support.runs import overrides


def test_every_step_of_a_run_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    Infer.run(compose(overrides(tmp_path, "pseudo_masks=cam", train=3, val=2)))
    lines = capsys.readouterr().err.splitlines()
    steps = {line.partition(":")[0] for line in lines}
    assert steps >= {
        "propose train", "propose val", "read training images", "fit, pass 2 of 2",
        "class scores train", "pseudo masks train",
        "build bank", "queries", "infer", "score predictions",
    }  # fmt: skip
    assert len([line for line in lines if " of " in line and line.endswith(" left")]) > len(steps)
