"""Every block of `examples/own_images.md` runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.cli import entry

PAGE = Path(__file__).parent.parent / "examples" / "own_images.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_blocks_of_two_kinds_and_no_others() -> None:
    kinds = [kind for kind, _ in blocks()]
    assert set(kinds) == {"bash", "python"}
    assert len(kinds) >= 8
    assert PAGE.read_text(encoding="utf-8").count("```") == 2 * len(kinds)


def test_the_walk_through_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a command is what `moduseg` would run, which spares a start of the interpreter for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for number, (kind, text) in enumerate(blocks(), start=1):
        if kind == "python":
            exec(compile(text, f"{PAGE}, block {number}", "exec"), {"__name__": "__main__"})
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[0] == "moduseg", line
            monkeypatch.setattr("sys.argv", words)
            with pytest.raises(SystemExit) as ended:
                entry()
            assert ended.value.code == 0, line
    check(tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_the_walk_through_runs_in_a_shell(tmp_path: Path) -> None:
    """`moduseg` on the path is this clone, whether or not it is installed."""
    command = tmp_path / "bin" / "moduseg"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom moduseg.cli.main import entry\nentry()\n")
    command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PAGE.parent.parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    shells = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    outputs = []
    for number, (kind, text) in enumerate(blocks(), start=1):
        done = subprocess.run(
            [*shells[kind], text], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"block {number} ({kind}):\n{text}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    check(work, "\n".join(outputs))


def check(work: Path, printed: str) -> None:
    """What the blocks should have printed and left behind."""
    assert "| red disc" in printed
    assert re.search(r"regions, added in \d+(\.\d+)? s", printed)
    assert sorted(path.name for path in (work / "found" / "labels").iterdir()) == ["new0.png", "new1.png"]
    for folder in ("found", "found_with_stars"):
        assert np.asarray(Image.open(work / folder / "labels" / "new0.png")).any()
    # A class that the bank did not have is found after it was added.
    stars = (work / "found_with_stars" / "classes.txt").read_text().splitlines().index("yellow star")
    found = [np.asarray(Image.open(path)) for path in (work / "found_with_stars" / "labels").iterdir()]
    assert any((labels == stars).any() for labels in found)
