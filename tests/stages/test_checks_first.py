"""Everything that the stages use is built before the first image is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.errors import ModusegError
from moduseg.pipeline.stage import Stage
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from tests.support.runs import overrides


@pytest.mark.parametrize(("stage", "wrong", "message"), [
    pytest.param(BuildBank, "+backbone.lair=1", "backbone.lair: unknown key", id="backbone of the bank"),
    pytest.param(BuildBank, "+pseudo_masks.generator.x=1", "generator.x: unknown key", id="generator"),
    pytest.param(Infer, "+backbone.lair=1", "backbone.lair: unknown key", id="backbone of the queries"),
    pytest.param(Infer, "+proposer.scal=1", "proposer.scal: unknown key", id="proposer"),
    pytest.param(Infer, "+pseudo_masks.generator.x=1", "generator.x: unknown key", id="generator of the bank"),
    pytest.param(Infer, "backbone.weights=nowhere.safetensors", "nowhere.safetensors", id="weights"),
])  # fmt: skip
def test_wrong_part_ends_the_run_first(stage: type[Stage], wrong: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModusegError, match=message):
        stage.run(compose([*overrides(tmp_path), wrong]))
    assert list(tmp_path.glob("*/*/*/batches")) == []
