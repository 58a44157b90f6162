"""The table of commands: each entry leads to a function of the shape that the table promises, and has a script."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from moduseg.cli import run_script
from moduseg.cli.commands import COMMANDS, Command
from moduseg.cli.main import _log_to_stdout, find_command, load, to_exit_code
from moduseg.cli.options import describe_keys
from moduseg.errors import ConfigError
from tests.support.runs import overrides

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEVELOPMENT = {"benchmark"}
"""Scripts that need the repository and are no command of the package."""
WITH_OPTIONS = [command for command in COMMANDS.values() if command.options is not None]


def test_every_command_has_a_script() -> None:
    names = {name.split()[0] for name in COMMANDS}
    assert {path.stem for path in SCRIPTS.glob("*.py")} - DEVELOPMENT == names


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in COMMANDS}))
def test_scripts_have_the_same_lines(name: str) -> None:
    _, docstring, code = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8").split('"""')
    assert docstring.strip()
    expected = ["from moduseg.cli import run_script", 'if __name__ == "__main__":', f'    run_script("{name}")']
    assert [line for line in code.splitlines() if line] == expected


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_functions_have_the_promised_shape(command: Command) -> None:
    function = load(command.function)
    parameters = list(inspect.signature(function).parameters.values())
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if command.options is None:
        assert required == ["cfg"]
    else:
        assert [parameter.name for parameter in parameters] == ["options", "overrides"]
        assert get_type_hints(function)["options"] is command.options


@pytest.mark.parametrize("command", WITH_OPTIONS, ids=[command.name for command in WITH_OPTIONS])
def test_help_names_every_key(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *verb = command.name.split()
    monkeypatch.setattr("sys.argv", [first, *verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        run_script(first)
    printed = capsys.readouterr().out
    assert (ended.value.code, command.summary in printed) == (0, True)
    for field in dataclasses.fields(command.options):  # type: ignore[arg-type]
        assert f"\n  {field.name.removesuffix('_')}=<" in printed
    # What a key means comes from the docstring of its class.
    assert all(len(meaning) > 10 for _, meaning in describe_keys(command.options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "arguments", "found"), [
    pytest.param("infer", ["a=1"], ("infer", ["a=1"]), id="one word"),
    pytest.param("bank", ["merge", "a=1"], ("bank merge", ["a=1"]), id="a verb"),
])  # fmt: skip
def test_commands_are_found_by_name(name: str, arguments: list[str], found: tuple[str, list[str]]) -> None:
    command, rest = find_command(name, arguments)
    assert (command.name, rest) == found


@pytest.mark.parametrize("arguments", [[], ["merg"]], ids=["no verb", "an unknown verb"])
def test_unknown_verbs_name_the_others(arguments: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"bank: got '\w+', expected one of info, add, remove, merge, apply, export; try"
    ):
        find_command("bank", arguments)


def test_finished_command_is_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["propose", *overrides(Path("outputs"), train=2, val=1), "name=first"])
    with pytest.raises(SystemExit) as ended:
        run_script("propose")
    stage = tmp_path / "outputs" / "miniature" / "propose"
    assert ended.value.code == 0
    assert (stage / "latest").resolve() == (stage / "first").resolve() == next(stage.glob("*-val-*"))


@pytest.mark.parametrize(("arguments", "message"), [
    pytest.param(["bank", "info", "bank=latest"], "latest: no finished run in outputs/*/{build_bank,bank}", id="bank"),
    pytest.param(["report", "run=latest"], "latest: no finished run in outputs/*/{infer,", id="run"),
    pytest.param(["infer", "bank.path=latest"], "latest: no finished run", id="bank.path"),
    pytest.param(["infer", "--bank", "latest"], "infer: got '--bank', expected <key>=<value> without", id="dashes"),
    pytest.param(["predict", "bank=lastest", "images=."], "got 'lastest', no such folder, expected a bank's, a run's "
                 "name, or latest; did you mean latest?", id="a misspelt latest"),
    pytest.param(["infer", "name=a/b"], "name: got 'a/b', expected letters or digits", id="name"),
])  # fmt: skip
def test_absent_runs_are_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        run_script(arguments[0])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_last_line_says_what_to_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pets" / "infer" / "timm-val-11111111"
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "index.html").touch()
    (folder / "manifest.json").write_text('{"stage": "infer", "failures": 0}')
    _log_to_stdout(is_quiet=False)
    assert to_exit_code(folder) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"open {folder.parent}/latest/report/index.html"


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, str(SCRIPTS / "reproduce.py"), "table=open_vocabulary", "dataset=voc21", "show"]
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def test_demo_installs_the_package_alone() -> None:
    """The development set follows with the first test."""
    makefile = (SCRIPTS.parent / "Makefile").read_text(encoding="utf-8")
    assert "--editable .\n" in makefile
    assert "demo: $(READY)\n" in makefile
    assert "lint: $(DEV)\n" in makefile
