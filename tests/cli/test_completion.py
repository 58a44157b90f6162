"""Completion of commands, keys, groups and files, as bash, zsh and fish ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moduseg.cli.completion import SCRIPTS, complete, list_candidates
from moduseg.errors import ConfigError
from tests.support.shells import press_tab_in_zsh, write_program


@pytest.mark.parametrize(("words", "expected"), [
    pytest.param(["inf"], ["infer"], id="a command"),
    pytest.param(["completion", ""], ["bash", "fish", "zsh"], id="a shell"),
    pytest.param(["bank", "me"], ["merge"], id="a verb"),
    pytest.param(["bank", "merge", "pre"], ["predictions=", "prefix="], id="own keys and groups"),
    pytest.param(["infer", "backbone=siglip2"], ["backbone=siglip2_b16", "backbone=siglip2_so400m"], id="files"),
    pytest.param(["infer", "proposer@train_proposer=superpixels_p"],
                 ["proposer@train_proposer=superpixels_photo", "proposer@train_proposer=superpixels_photo_nine"],
                 id="files for another group"),
    pytest.param(["infer", "experiment=vo"],
                 ["experiment=voc", "experiment=voc_entityseg", "experiment=voc_published_masks"], id="experiments"),
    pytest.param(["infer", "retrieval.t"], ["retrieval.top_k="], id="a key"),
    pytest.param(["infer", "proposer=superpixels", "proposer.merge"], ["proposer.merge=", "proposer.merge_space="],
                 id="a key of the chosen file"),
    pytest.param(["infer", "retrieval.engine="], ["retrieval.engine=exact", "retrieval.engine=faiss"], id="values"),
    pytest.param(["infer", "bank.purify.enabled=t"], ["bank.purify.enabled=true"], id="true or false"),
    pytest.param(["bank", "export", "format=n"], ["format=npz"], id="values of an own key"),
    pytest.param(["infer", "--"], ["--dry-run", "--help"], id="flags"),
    pytest.param(["nothing", "x", ""], [], id="no command"),
])  # fmt: skip
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert list_candidates(words) == expected


def test_unknown_shells_are_refused() -> None:
    with pytest.raises(ConfigError, match="completion: got 'tcsh', expected one of bash, zsh, fish"):
        complete(["tcsh"])


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_read_by_their_shell(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(complete([shell]))
    assert subprocess.run([program, "-n", str(script)], check=False, capture_output=True).stderr == b""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("line", "expected"), [
    pytest.param("moduseg inf", ["infer"], id="a command"),
    pytest.param("moduseg infer backbone=siglip2", ["siglip2_b16", "siglip2_so400m"], id="after the sign"),
    pytest.param("moduseg infer retrieval.t", ["retrieval.top_k="], id="a key"),
])  # fmt: skip
def test_bash_completes(line: str, expected: list[str]) -> None:
    code = f"""
    moduseg() {{ {sys.executable} -c 'from moduseg.cli import entry; entry()' "$@"; }}
    {complete(["bash"])}
    COMP_LINE={line!r} COMP_POINT={len(line)} COMP_WORDBREAKS='='
    _moduseg
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ended = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == expected


LINES = [
    pytest.param("moduseg inf", "moduseg infer ", id="a command"),
    pytest.param("moduseg infer retrieval.t", "moduseg infer retrieval.top_k=", id="a key"),
    pytest.param(
        "moduseg infer dataset.root={folder}/own", "moduseg infer dataset.root={folder}/own_images/", id="path"
    ),
]
"""A line as it is typed, and as it is after the tabulator; `{folder}` holds `own_images/` alone."""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_zsh_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "own_images").mkdir()
    (tmp_path / "script").write_text(complete(["zsh"]))
    write_program(tmp_path / "bin" / "moduseg")
    completed = press_tab_in_zsh(line.format(folder=tmp_path), tmp_path / "script", tmp_path / "bin")
    assert completed == expected.format(folder=tmp_path)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "own_images").mkdir()
    (tmp_path / "script").write_text(complete(["fish"]))
    write_program(tmp_path / "bin" / "moduseg")
    code = f"set -p PATH {tmp_path}/bin; source {tmp_path}/script; complete -C '{line.format(folder=tmp_path)}'"
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = ["fish", "--no-config", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.splitlines() == [expected.format(folder=tmp_path).split()[-1]]
