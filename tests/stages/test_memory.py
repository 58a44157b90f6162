"""Memory that ends: it costs the images that need it, never the run, and one line outside of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moduseg.cli.main import errors_as_exit_code
from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.files import read_json
from moduseg.pipeline.stage import Stage
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.stages.queries import Queries
from moduseg.structures import Sample
from tests.support.runs import overrides


def _id_of(item: Any) -> str:
    """The image of an item, whichever stage it is of."""
    first = item[0] if isinstance(item, tuple) else item
    return first if isinstance(first, str) else str(first.id)


def test_an_image_that_finds_no_memory_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = {Propose: 0, ClassScores: 1, PseudoMasks: 2, BuildBank: 3, Queries: 1, Infer: 2}

    def poison(stage: type[Stage[Any]], position: int) -> None:
        process = stage.process

        def allocate_too_much(self: Stage[Any], items: list[Any]) -> Any:
            if self.image_ids()[position] in map(_id_of, items):
                torch.empty(1 << 50)
            return process(self, items)

        monkeypatch.setattr(stage, "process", allocate_too_much)

    for stage, position in poisoned.items():
        poison(stage, position)
    folder = Infer.run(compose(overrides(tmp_path, train=5, val=4)))
    assert (folder / "results.json").is_file()
    for stage in poisoned:
        (failures,) = tmp_path.glob(f"*/{stage.name}/*-*-*/failures.jsonl")
        assert read_json(failures.parent / "manifest.json")["status"] == "complete"
        lines = failures.read_text().splitlines()
        assert len([line for line in lines if "you tried to allocate" in line and "left out" not in line]) == 1, stage
        assert len(lines) < 5


def test_fitting_goes_on_without_an_image_that_finds_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = Dataset.load

    def allocate_too_much(self: Dataset, image_id: str, **options: Any) -> Sample:
        if image_id == self.ids[1] and self.split == "train":
            torch.empty(1 << 50)
        return load(self, image_id, **options)

    monkeypatch.setattr(Dataset, "load", allocate_too_much)
    Infer.run(compose(overrides(tmp_path, "pseudo_masks=cam", "proposer=superpixels", train=4, val=2)))
    assert "scores: fitted without" in caplog.text


def test_memory_that_ends_outside_of_the_stages_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with errors_as_exit_code() as status:
        torch.empty(1 << 50)
    text = capsys.readouterr().err
    assert status.code == 2
    assert text.startswith("moduseg: error: memory: RuntimeError: ")
    assert text.count("\n") == 1
    with pytest.raises(RuntimeError, match="odd"), errors_as_exit_code():
        raise RuntimeError("odd")
