"""What is said of a run before its first image: the plan of a dry run, and what is looked for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from moduseg.cli.main import bind_command, find_command
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError, StorageError
from moduseg.pipeline import preflight
from moduseg.pipeline.plan import plan_run
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from tests.support.runs import overrides

STAGES = ["class scores train", "pseudo masks train", "build bank train", "propose val", "queries val", "infer val"]
VIT_H = ("proposer=sam_vit_h", "pseudo_masks=clip_dense", "backbone=miniature_random")


def list_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def dry_run(name: str, *arguments: str) -> int:
    return int(bind_command(*find_command(name, ["--dry-run", *arguments]))())  # type: ignore[arg-type]


@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_dry_run_writes_nothing(tmp_path: Path, is_drawn: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = overrides(tmp_path)
    if is_drawn:
        _ = Workspace(compose(arguments)).dataset("train").ids
    before = list_files(tmp_path)
    assert dry_run("infer", *arguments) == 0
    assert list_files(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device cpu, float32, ")
    assert [next(title for title in STAGES if line.startswith(title)) for line in lines[1:7]] == STAGES
    assert ("6 to do" in lines[1]) == is_drawn
    assert ("4 to do" in lines[4]) == is_drawn
    assert lines[7].startswith("disk: about ")


def test_planned_keys_are_those_of_the_run(tmp_path: Path) -> None:
    """All but the last: the bank's content is part of its key."""
    cfg = compose(overrides(tmp_path))
    _ = Workspace(cfg).dataset("train").ids
    before = plan_run(Infer(Workspace(cfg)), may_fetch=False)
    folder = Infer.run(cfg)
    after = plan_run(Infer(Workspace(cfg)), may_fetch=False)
    assert [stage.title for stage in after.stages] == STAGES
    assert [stage.folder for stage in before.stages[:-1]] == [stage.folder for stage in after.stages[:-1]]
    assert (before.stages[-1].folder, after.stages[-1].folder) == (None, folder)
    assert before.stages[-1].note == "named by content that is made on the way"
    assert all(stage.folder is not None and stage.folder.is_dir() for stage in after.stages)
    assert [stage.num_done for stage in before.stages] == [0] * 6
    assert [stage.num_done for stage in after.stages] == [6, 6, 6, 4, 4, 4]
    assert before.num_bytes > after.num_bytes == 0


def test_missing_weights_are_downloads_of_a_dry_run_and_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proposer of the labelled images runs after the bank is built; its weights are looked for before."""
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    arguments = overrides(tmp_path, "proposer=sam_vit_h", "proposer.checkpoint=published")
    _ = Workspace(compose(arguments)).dataset("train").ids
    assert dry_run("infer", *arguments) == 0
    out = capsys.readouterr().out
    assert "fetch proposer: sam_vit_h_4b8939.pth, size unknown, https://dl.fbaipublicfiles.com/" in out
    assert "(named when the weights are there)" in out
    with pytest.raises(MissingError, match=r"proposer\.checkpoint: got 'published', but sam_vit_h_4b8939"):
        Infer.run(compose(arguments))
    assert not (tmp_path / "miniature" / "scores").exists()
    assert not (tmp_path / "home").exists()


def test_a_missing_data_set_is_named_with_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*overrides(tmp_path)[:5], "dataset=voc", f"dataset.root={tmp_path}/nowhere"]
    assert dry_run("build_bank", *arguments) == 2
    assert capsys.readouterr().out.count("missing: dataset.root: got ") == 1
    assert list_files(tmp_path) == set()


def test_a_split_that_is_missing_ends_a_run_before_the_first_image(tmp_path: Path) -> None:
    """The bank is of the training split; the other one is opened hours later."""
    cfg = compose(overrides(tmp_path))
    _ = Workspace(cfg).dataset("train").ids
    voc = [*overrides(tmp_path)[:5], "dataset=voc", f"dataset.root={tmp_path}/world-6-4", "dataset.val_split=none"]
    with pytest.raises(MissingError, match="none"):
        Infer.run(compose(voc))
    assert list(tmp_path.glob("voc*/*")) == []


def test_only_stages_have_plans() -> None:
    with pytest.raises(ConfigError, match="--dry-run: got compare, expected one of propose, pseudo_masks, build_bank"):
        dry_run("compare", "a", "b")


def test_a_run_begins_with_its_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moduseg")
    work = Workspace(compose(overrides(tmp_path)))
    Propose.run(work.cfg, work)
    BuildBank.run(work.cfg, work)
    lines = [message for message in caplog.messages if message.startswith("device ")]
    assert lines == caplog.messages[:1] == [f"device cpu, float32, {torch.get_num_threads()} threads"]


def test_a_folder_that_cannot_be_written_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot be written .* set runtime.outputs="):
        Propose.run(compose(overrides(tmp_path / "file", world=tmp_path)))


@pytest.mark.parametrize(("device", "has_driver", "num_bytes", "message"), [
    pytest.param("auto", True, 0, "although an NVIDIA driver is here", id="a driver that torch cannot use"),
    pytest.param("auto", False, 2_600_000_000, "for 2.6 GB of weights", id="large models"),
    pytest.param("auto", False, 1000, "", id="small models"),
    pytest.param("cpu", True, 2_600_000_000, "", id="the CPU was asked for"),
])  # fmt: skip
def test_a_silent_fall_back_to_the_cpu_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    device: str,
    has_driver: bool,
    num_bytes: int,
    message: str,
) -> None:
    driver = tmp_path / "version"
    if has_driver:
        driver.touch()
    monkeypatch.setattr(preflight, "_DRIVER", driver)
    monkeypatch.setattr("shutil.which", lambda name: None)
    work = Workspace(compose(overrides(tmp_path, f"runtime.device={device}")))
    work.device = Device(torch.device("cpu"))
    preflight.warn_of_cpu(work, num_bytes)
    assert len(caplog.messages) == bool(message)
    assert message in caplog.text


def test_a_full_disk_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    Propose.run(compose(overrides(tmp_path)))
    assert "the run will write about 0.0 GB, and 0.0 GB are free" in caplog.text
