"""Run a command of the table: `moduseg <command> [key=value ...]`, or `python scripts/<command>.py [key=value ...]`.

The exit code is 0; 1 where images failed (`failures.jsonl` says which); 2 where nothing could be done, after one line
that names the value, what is allowed and the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from moduseg import __version__
from moduseg.allocator import pause_collection
from moduseg.cli.commands import COMMANDS, Command
from moduseg.cli.completion import complete
from moduseg.cli.help import describe_command, describe_verbs, list_commands
from moduseg.cli.options import parse
from moduseg.config import compose, compose_hydra, config_dir, from_hydra
from moduseg.config.overrides import check_names, quote_for_hydra
from moduseg.errors import ConfigError, IncompleteError, ModusegError, hide_credentials, suggest
from moduseg.pipeline.run_names import BANKS, LATEST, RUNS, STUDENTS, check_name, name_run, resolve_run

log = logging.getLogger("moduseg")
_RUN_KEYS = {"bank": BANKS, "banks": BANKS, "run": RUNS, "compare": RUNS, "folders": RUNS, "student": STUDENTS}
"""Keys of commands that name finished runs, and the stages that they may be of."""

DRY_RUN = "--dry-run"
"""The argument that has a stage's command print its plan and do nothing."""
HYDRA_OPTIONS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
)  # fmt: skip
"""Options that Hydra reads for commands that have no keys of their own; each may be shortened."""


def entry() -> None:
    """Run the command that the first argument names, and exit."""
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else "--help"
    names = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    if first in ("-h", "--help", "help"):
        sys.exit(_print_text(list_commands()))
    if first == "--version":
        sys.exit(_print_text(f"moduseg {__version__}"))
    if first == "completion":
        with errors_as_exit_code() as status:
            print(complete(arguments[1:]))
        sys.exit(status.code)
    if first not in names:
        close = suggest(first, names)
        hint = f"did you mean {close}?" if close else "try: moduseg --help"
        print(f"moduseg: error: {first}: unknown command; {hint}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_script(first)


def run_script(name: str) -> None:
    """Run a command with the arguments of `sys.argv`, and exit.

    Args:
        name: first word of a command's name.
    """

    with errors_as_exit_code() as status:
        if name not in COMMANDS and sys.argv[1:2] in (["-h"], ["--help"]):
            sys.exit(_print_text(describe_verbs(name)))
        command, arguments = find_command(name, sys.argv[1:])
        _log_to_stdout(is_quiet=command.is_quiet)
        run_name, arguments = split_name(command, resolve_bank_path(arguments))
        with pause_collection():
            run = bind_command(command, arguments, run_name)
        # The command's function is called from here, so that a traceback has few lines above the stage's own.
        status.code = to_exit_code(run(), run_name)
        sys.stdout.flush()
    sys.exit(status.code)


def find_command(name: str, arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Return a command and its arguments; for one with verbs, the first argument is the verb.

    Raises:
        ConfigError: no such verb.
    """
    if name in COMMANDS:
        return COMMANDS[name], list(arguments)
    verbs = [other.split()[1] for other in COMMANDS if other.startswith(f"{name} ")]
    verb = arguments[0] if arguments else "nothing"
    if verb not in verbs:
        raise ConfigError(
            f"{name}: got {verb!r}, expected one of {', '.join(verbs)}; try: python scripts/{name}.py {verbs[0]} --help"
        )
    return COMMANDS[f"{name} {verb}"], list(arguments[1:])


def split_name(command: Command, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the name that the result gets, and the other arguments; commands with keys of their own have none.

    Raises:
        ConfigError: it may not be a name.
    """
    if command.options is not None or command.config_name != "config":
        return None, list(arguments)
    names = [argument.removeprefix("name=") for argument in arguments if argument.startswith("name=")]
    rest = [argument for argument in arguments if not argument.startswith("name=")]
    return check_name(names[-1]) if names else None, rest


def bind_command(command: Command, arguments: Sequence[str], run_name: str | None = None) -> Callable[[], int | Path]:
    """Return the command's function with its arguments, checked, ready to be called.

    Options of Hydra (`--cfg job`, `-m`) work for commands that read the configuration alone.

    Raises:
        ConfigError: an unknown, missing or wrong argument.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        overrides = [argument for argument in arguments if not argument.startswith("-") and command.options is None]
        return partial(_print_text, describe_command(command, overrides))
    if DRY_RUN in arguments:
        return _bind_plan(command, [argument for argument in arguments if argument != DRY_RUN])
    if command.options is not None:
        return _bind_options(command, command.options, arguments)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in HYDRA_OPTIONS):
            raise ConfigError(
                f"{command.name}: got {name!r}, expected <key>=<value> without dashes; try --help for the keys"
            )
    if any(argument.startswith("-") for argument in arguments):
        return partial(_run_with_hydra, command, arguments, run_name)
    cfg = compose(arguments) if command.config_name == "config" else compose_hydra(arguments, command.config_name)
    return partial(load(command.function), cfg)


def _bind_plan(command: Command, arguments: Sequence[str]) -> Callable[[], int]:
    """Return what prints the plan of a stage.

    Raises:
        ConfigError: the command runs no stage, or an argument is wrong.
    """
    if command.stage is None:
        stages = ", ".join(name for name, other in COMMANDS.items() if other.stage is not None)
        raise ConfigError(f"{DRY_RUN}: got {command.name}, expected one of {stages}; leave it out")
    return partial(load("moduseg.pipeline.plan:print_plan"), load(command.stage), compose(arguments))


def to_exit_code(result: int | Path, run_name: str | None = None) -> int:
    """Return the exit code of what a command's function returned: the code, or the folder of an artefact.

    Args:
        result: of the function.
        run_name: a name that the folder gets beside `latest`.
    """
    if isinstance(result, int):
        return result
    from moduseg.pipeline.manifests import count_failures
    from moduseg.pipeline.peers import Peers

    if not Peers().is_leader:
        return 0
    name_run(result, run_name)
    if (result / "report" / "index.html").is_file():
        latest = result.parent / LATEST
        log.info("open %s", (latest if latest.is_symlink() else result) / "report" / "index.html")
    failures = count_failures(result)
    if failures:
        print(f"moduseg: {failures} images left out on the way, see failures.jsonl beside {result}", file=sys.stderr)
    return 1 if failures else 0


@dataclass
class ExitStatus:
    """The exit code of a command.

    Attributes:
        code: 0 at first; set by the command, or by the error that ended it.
    """

    code: int = 0


@contextmanager
def errors_as_exit_code() -> Iterator[ExitStatus]:
    """Turn an error that a user can mend into one line on stderr and an exit code."""
    status = ExitStatus()
    try:
        yield status
    except IncompleteError as error:
        print(f"moduseg: {' '.join(str(error).split())}")
        status.code = 0
    except ModusegError as error:
        print(f"moduseg: error: {' '.join(str(error).split())}", file=sys.stderr)
        status.code = 2
    except KeyboardInterrupt:
        print("moduseg: interrupted; finished images are kept, run the same command to go on", file=sys.stderr)
        status.code = 130
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        # `moduseg ... | head` has read what it wanted; what is left goes nowhere, the last flush included.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status.code = 128 + signal.SIGPIPE
    except Exception as error:
        from moduseg.pipeline.forward import describe, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"moduseg: error: memory: {describe(error)}; close other programs, or set evaluation.workers=1 "
            "runtime.workers=1, and run the same command to go on: finished images are kept",
            file=sys.stderr,
        )
        status.code = 2


def _has_lost_its_reader() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    if not hasattr(select, "poll"):
        return False
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)  # errors are reported whatever is asked for
    return any(event & select.POLLERR for _, event in waiting.poll(0))


def _bind_options(command: Command, cls: type[Any], arguments: Sequence[str]) -> Callable[[], int | Path]:
    options, overrides = parse(
        arguments,
        cls,
        command.name.split()[-1],
        words=command.words,
        repeated=command.repeated,
        accepts=command.accepts,
    )
    check_names(overrides, config_dir())
    return partial(load(command.function), resolve_runs(options, overrides), overrides)


def resolve_bank_path(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `bank.path` is a folder, not `latest` or the name of a run."""
    outputs = _find_outputs(arguments)
    prefix = "bank.path="
    return [
        f"{prefix}{resolve_run(text.removeprefix(prefix), BANKS, outputs)}" if text.startswith(prefix) else text
        for text in arguments
    ]


def _find_outputs(overrides: Sequence[str]) -> Path:
    return Path(next((text.partition("=")[2] for text in overrides if text.startswith("runtime.outputs=")), "outputs"))


def resolve_runs(options: Any, overrides: Sequence[str]) -> Any:
    """Return the options of a command with the folders that `latest` and names of runs stand for."""
    outputs = _find_outputs(overrides)
    resolved: dict[str, Any] = {}
    for key, stages in _RUN_KEYS.items():
        value = getattr(options, key, None)
        if isinstance(value, str):
            resolved[key] = resolve_run(value, stages, outputs)
        elif value:
            resolved[key] = tuple(resolve_run(text, stages, outputs) for text in value)
    return dataclasses.replace(options, **resolved)


def _print_text(text: str) -> int:
    print(text)
    return 0


def _run_with_hydra(command: Command, arguments: Sequence[str], run_name: str | None) -> int:
    """Run a command as Hydra does with its own options; names are checked before, in this program's words."""
    values = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
    has_own_files = any(
        argument.startswith(("--config", "-cd", "-cn", "-cp", "hydra.searchpath")) for argument in arguments
    )
    if not has_own_files and command.config_name == "config":
        check_names(values, config_dir())
    is_multirun = any(argument in ("-m", "--multirun") for argument in arguments)

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command.config_name)
    def job(composed: DictConfig) -> None:
        _log_to_stdout(is_quiet=command.is_quiet)  # a launcher may have moved the job to another process
        with errors_as_exit_code() as status:
            cfg = from_hydra(composed) if command.config_name == "config" else composed
            status.code = to_exit_code(load(command.function)(cfg), run_name)
        if status.code:
            sys.exit(status.code)

    sys.argv[1:] = [quote_for_hydra(argument, is_multirun=is_multirun) for argument in arguments]
    job()
    return 0


def load(path: str) -> Any:
    """Return the function or class that `module:name` names; a method as `module:class.name`."""
    module, _, name = path.partition(":")
    return attrgetter(name)(importlib.import_module(module))


def _hide_credentials(record: logging.LogRecord) -> bool:
    """Take names and passwords out of the web addresses in a message."""
    record.msg, record.args = hide_credentials(record.getMessage()), None
    return True


def _log_to_stdout(*, is_quiet: bool) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_hide_credentials)
    # Under torchrun, only rank 0 logs.
    is_leader = os.environ.get("RANK", "0") == "0"
    logging.getLogger("moduseg").setLevel(logging.INFO if is_leader and not is_quiet else logging.WARNING)
