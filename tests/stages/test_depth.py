"""How many frames lie between a command and the code of a stage: a traceback is to be readable."""

from __future__ import annotations

import runpy
import traceback
from pathlib import Path

import pytest

from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from tests.support.runs import overrides

SCRIPTS = Path(__file__).parents[2] / "scripts"
MAX_FRAMES = 8


@pytest.mark.parametrize(("script", "stage"), [
    pytest.param("propose", Propose, id="propose"),
    pytest.param("infer", Infer, id="infer"),
])  # fmt: skip
def test_few_frames_from_script_to_process(
    script: str, stage: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []
    process = stage.process

    def record(self: object, items: list[object]) -> object:
        names = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()]
        start = max(i for i, name in enumerate(names) if name.endswith("scripts/" + script + ".py:<module>"))
        stacks.append(names[start:])
        return process(self, items)

    monkeypatch.setattr(stage, "process", record)
    monkeypatch.setattr("sys.argv", [script, *overrides(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert exit_info.value.code == 0
    # `record` stands in the place of the stage's own `process`.
    assert max(map(len, stacks)) <= MAX_FRAMES, stacks[0]
