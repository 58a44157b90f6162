"""Every shipped preset on a machine that has nothing: one line says what is missing, where it is and where to put it.

New presets are found by themselves. One that needs neither weights nor a folder is added to `NEEDS_NOTHING`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moduseg.cli import run_script
from moduseg.config import compose, config_dir
from tests.support.packages import offer_index
from tests.support.runs import overrides
from tests.support.serving import go_online

STAGES = {
    "dataset": "propose", "proposer": "propose", "backbone": "build_bank", "pseudo_masks": "pseudo_masks",
    "tagger": "segment", "discoverer": "discover", "student": "train_student",
}  # fmt: skip
"""The first stage that uses what a group configures."""
PRESETS = [(group, path.stem) for group in STAGES for path in sorted((config_dir() / group).glob("*.yaml"))]
NEEDS_NOTHING = {
    ("dataset", "miniature"),
    ("dataset", "miniature_large"),
    ("proposer", "ground_truth"),
    ("proposer", "sam_miniature"),
    ("proposer", "superpixels"),
    ("proposer", "superpixels_photo"),
    ("proposer", "superpixels_photo_nine"),
    ("backbone", "clip_miniature"),
    ("backbone", "miniature"),
    ("backbone", "miniature_random"),
    ("backbone", "miniature_both"),
    ("pseudo_masks", "cam"),
    ("pseudo_masks", "cam_photo"),
    ("pseudo_masks", "clip_dense"),
    ("pseudo_masks", "corrclip_miniature"),
    ("pseudo_masks", "diffsegmenter_miniature"),
    ("pseudo_masks", "fusion"),
    ("pseudo_masks", "fusion_miniature"),
    ("pseudo_masks", "ground_truth"),
    ("pseudo_masks", "iseg_miniature"),
    ("pseudo_masks", "mctformer_miniature"),
    ("pseudo_masks", "token_masking_miniature"),
    ("discoverer", "diffseg_miniature"),
    ("discoverer", "iseg_propagation_miniature"),
    ("discoverer", "kmeans"),
    ("discoverer", "spectral"),
    ("student", "linear"),
    ("student", "lraspp_miniature"),
    ("student", "mlp"),
    ("tagger", "all"),
    ("tagger", "clip"),
    ("tagger", "given"),
    ("tagger", "tagclip"),
}
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
NEEDS_SOMETHING = [preset for preset in PRESETS if preset not in NEEDS_NOTHING]


def names(presets: list[tuple[str, str]]) -> list[str]:
    return [f"{group}={name}" for group, name in presets]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes of the miniature world are drawn, once."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(autouse=True)
def _a_machine_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("MODUSEG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger()
    handlers = logger.handlers[:]
    yield
    logger.handlers[:] = handlers  # the command sends the log to a stdout that is gone after the test


def run(
    group: str, name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, list[str]]:
    """Exit code of the command, and its lines on stderr without progress bars."""
    if name.startswith("miniature") or group != "dataset":
        short = ["student.training.steps=1", "student.training.batch=2"] if group == "student" else []
        if name in ("mctformer_miniature", "token_masking_miniature"):
            short = ["pseudo_masks.generator.training.steps=2", "pseudo_masks.generator.training.warmup=1"]
        scenes = world / name if group == "dataset" else world
        arguments = overrides(Path("outputs"), f"{group}={name}", *short, train=2, val=1, world=scenes)
    else:
        arguments = [f"dataset={name}", "proposer=superpixels", "runtime.device=cpu"]
    monkeypatch.setattr("sys.argv", [STAGES[group], *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(STAGES[group])
    lines = [line.strip() for line in re.split(r"[\r\n]", capsys.readouterr().err)]
    return ended.value.code, [line for line in lines if line and not re.search(r"\|.*\[\S+<.*\]$", line)]


def check(group: str, name: str, code: object, lines: list[str], home: Path) -> None:
    """One line, with key, value, address or folder, and remedy."""
    assert code == 2, lines
    assert len(lines) == 1, lines
    (line,) = lines
    key = {"pseudo_masks": r"pseudo_masks\.generator", "student": r"student\.model"}.get(group, group)
    assert re.match(rf"moduseg: error: {key}\.\w+: got \S", line)
    cfg = getattr(compose([f"{group}={name}"]), group)
    part = {"pseudo_masks": "generator", "student": "model"}.get(group)
    settings = cfg if part is None else getattr(cfg, part)
    needs_folder = next((settings[k] for k in ("root", "folder", "annotations", "path") if k in settings), None)
    if needs_folder is not None:
        assert needs_folder in line
        assert re.search(rf"set {key}\.\w+=<|data/README\.md", line)
    else:
        assert re.search(r"https://[\w.-]+/\S+", line), line
        assert re.search(r"\w\.(safetensors|pth|pt|bin|npz|h5)\b", line), line
        assert f"into {home}" in line or "environment variable" in line, line
        assert re.search(rf"{key}\.\w+=<", line), line


def test_the_list_of_what_needs_nothing_is_up_to_date() -> None:
    assert set(PRESETS) >= NEEDS_NOTHING
    assert {group for group, _ in NEEDS_SOMETHING} == set(STAGES)


@pytest.mark.parametrize(("group", "name"), NEEDS_SOMETHING, ids=names(NEEDS_SOMETHING))
def test_missing_and_offline(
    group: str,
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", touched)
    monkeypatch.setattr(socket.socket, "connect", touched)
    code, lines = run(group, name, world, monkeypatch, capsys)
    check(group, name, code, lines, tmp_path / "home")


@pytest.mark.parametrize(("group", "name"), NEEDS_SOMETHING, ids=names(NEEDS_SOMETHING))
def test_missing_and_no_network(
    group: str,
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    go_online(monkeypatch)
    offer_index(monkeypatch, "http://127.0.0.1:9/simple")  # pip is a process of its own
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    code, lines = run(group, name, world, monkeypatch, capsys)
    check(group, name, code, lines, tmp_path / "home")
    if "https://" in lines[0] and "environment variable" not in lines[0]:
        assert "could not be fetched (" in lines[0]


@pytest.mark.parametrize(("group", "name"), sorted(NEEDS_NOTHING), ids=names(sorted(NEEDS_NOTHING)))
def test_what_needs_nothing_runs(
    group: str, name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(group, name, world, monkeypatch, capsys) == (0, [])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a researcher types first, on a machine without the data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["build_bank", f"experiment={name}"])
    with pytest.raises(SystemExit) as ended:
        run_script("build_bank")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert re.match(r"moduseg: error: (dataset\.root|proposer\.folder): got '\S+', no such folder; .*\w+/\w+\.md", line)
