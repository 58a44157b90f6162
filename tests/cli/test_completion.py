"""Completion of commands, keys, groups and files, as bash asks for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moduseg.cli.completion import SCRIPTS, complete, list_candidates
from moduseg.errors import ConfigError


@pytest.mark.parametrize(("words", "expected"), [
    pytest.param(["inf"], ["infer"], id="a command"),
    pytest.param(["completion", ""], ["bash", "fish", "zsh"], id="a shell"),
    pytest.param(["bank", "me"], ["merge"], id="a verb"),
    pytest.param(["bank", "merge", "pre"], ["predictions=", "prefix="], id="own keys and groups"),
    pytest.param(["infer", "backbone=dinov3"], ["backbone=dinov3_vitb16", "backbone=dinov3_vitl16"], id="files"),
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
    pytest.param("moduseg infer backbone=dinov3", ["dinov3_vitb16", "dinov3_vitl16"], id="after the sign"),
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
