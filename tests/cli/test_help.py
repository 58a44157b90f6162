"""Help, version and mistyped commands answer without torch, in this program's words."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import pytest

from moduseg import __version__
from moduseg.cli.commands import COMMANDS
from moduseg.cli.help import describe_command, list_commands
from moduseg.errors import ConfigError

MAX_CPU_SECONDS = 0.6
_CODE = """
import atexit, sys, time
atexit.register(lambda: print("torch" in sys.modules, time.process_time(), file=sys.stderr))
from moduseg.cli import entry
sys.argv = ["moduseg", *sys.argv[1:]]
entry()
"""


@pytest.mark.parametrize(("arguments", "code", "text"), [
    pytest.param(["--help"], 0, "moduseg <command> [key=value ...]", id="list of commands"),
    pytest.param([], 0, "moduseg <command> [key=value ...]", id="nothing"),
    pytest.param(["--version"], 0, f"moduseg {__version__}", id="version"),
    pytest.param(["infer", "--help"], 0, "neighbours that vote", id="a stage"),
    pytest.param(["infer", "--help"], 0, "experiment=photos_light   Photographs with tags, on a CPU", id="presets"),
    pytest.param(["bank", "--help"], 0, "bank info bank=latest", id="verbs"),
    pytest.param(["predict", "--help"], 0, "bank=<text>", id="keys of its own"),
    pytest.param(["infr"], 2, "infr: unknown command; did you mean infer?", id="a command"),
    pytest.param(["infer", "experiment=vok"], 2,
                 "experiment=vok: no such file in configs/experiment; did you mean voc?", id="an experiment"),
    pytest.param(["infer", "backbone=dinov2"], 2, "backbone=dinov2: no such file in configs/backbone; did you mean "
                 "dinov2_vitb14, dinov2_vitg14, dinov2_vitl14, dinov2_vits14?", id="a file of a group"),
    pytest.param(["infer", "retrieval.topk=3"], 2, "retrieval.topk: unknown key; did you mean retrieval.top_k?",
                 id="a key"),
    pytest.param(["infer", "dataset.rot=x"], 2, "dataset.rot: unknown key; did you mean dataset.root?",
                 id="a key of a data set"),
    pytest.param(["infer", "-m", "retrieval.topk=3,5"], 2, "retrieval.topk: unknown key; did you mean retrieval.top_k?",
                 id="a key with several values"),
    pytest.param(["ablate", "table=x", "experiment=vok"], 2, "experiment=vok: no such file", id="beside own keys"),
    pytest.param(["predict", "bnk=x"], 2, "bnk: unknown key of predict", id="a key of its own"),
    pytest.param(["infer", "dataset.root=nowhere"], 2, "dataset.root: got 'nowhere' with dataset=miniature",
                 id="a folder for the embedded world"),
])  # fmt: skip
def test_answers_come_without_torch(arguments: list[str], code: int, text: str) -> None:
    ended = subprocess.run([sys.executable, "-c", _CODE, *arguments], capture_output=True, text=True, check=False)
    *errors, last = ended.stderr.splitlines()
    has_torch, seconds = last.split()
    assert (ended.returncode, has_torch) == (code, "False"), ended.stderr
    assert text in ended.stdout + ended.stderr
    assert len(errors) == (0 if code == 0 else 1), errors
    assert float(seconds) < MAX_CPU_SECONDS


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_page_has_the_same_parts(command: object) -> None:
    page = describe_command(command)  # type: ignore[arg-type]
    parts = ["\nreads ", "\nwrites ", "\nkeys\n", "\nexamples\n"]
    positions = [page.index(part) for part in parts]
    assert positions == sorted(positions)
    assert len(page[positions[-1] :].splitlines()) == 4


def test_list_names_every_command() -> None:
    listed = list_commands()
    assert all(f"  {command.name} " in listed and command.summary in listed for command in COMMANDS.values())


def test_page_lists_the_keys_of_the_chosen_file() -> None:
    page = describe_command(COMMANDS["infer"], ["proposer=superpixels"])
    assert "proposer.merge_space=<text> [hue]" in page
    assert "retrieval.top_k=<whole number> [5]         neighbours that vote." in page
    with pytest.raises(ConfigError, match="did you mean superpixels"):
        describe_command(COMMANDS["infer"], ["proposer=superpixel"])


@pytest.mark.parametrize("name", ["infer", "propose", "pseudo_masks", "build_bank", "evaluate", "train_arm"])
def test_every_key_of_the_default_has_a_line(name: str) -> None:
    lines = describe_command(COMMANDS[name]).splitlines()
    bare = [
        line
        for line, following in pairwise(lines)
        if re.match(r"  [\w.]+=<.*\]$", line) and not following.startswith(" " * 20)
    ]
    assert bare == []
