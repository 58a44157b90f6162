"""The command line: `moduseg <command> [key=value ...]`, the same as `python scripts/<command>.py [key=value ...]`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from moduseg.config import Config, compose, config_dir, from_hydra
from moduseg.errors import ConfigError, IncompleteError, ModusegError
from moduseg.pipeline.peers import Peers
from moduseg.pipeline.workspace import count_failures

STAGES = ("propose", "pseudo_masks", "build_bank", "infer", "evaluate")
"""The stages, in the order of the data."""
TOOLS = ("prepare_data", "check_data")
"""What is run on a data set before the stages."""
OWN_KEYS = {
    "bank": "moduseg.tools.bank",
    "predict": "moduseg.tools.predict",
    "new_class": "moduseg.studies.new_class",
    "demo_app": "moduseg.app.serve",
    "report": "moduseg.tools.report",
}
"""Commands with keys of their own beside overrides of the configuration, and the modules whose `main` they are."""
COMMANDS = (*STAGES, *TOOLS, "voc_package", "ablate", "reproduce", "sweep", "compare", *OWN_KEYS)


def entry() -> None:
    """`moduseg <command> [key=value ...]`."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        got = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        sys.exit(f"moduseg: got {got!r}, expected one of {', '.join(COMMANDS)}; try: moduseg build_bank")
    command = sys.argv.pop(1)
    if command == "ablate":
        main_table()
    elif command == "sweep":
        main_sweep()
    elif command == "reproduce":
        main_reproduce()
    elif command == "compare":
        main_compare()
    elif command in OWN_KEYS:
        main_own(command)
    else:
        main(command)


def main(command: str) -> None:
    """Run one stage with the overrides of `sys.argv`, and exit.

    The exit code is 0; 1 where images were left out (`failures.jsonl` says which); 2 where nothing could be done, after
    one line that names the value, what is allowed and the remedy. Options that begin with a dash (`--help`,
    `--cfg job`, `-m`) are Hydra's.
    """
    _log_to_stdout()
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        _run_hydra(command)
        return
    sys.exit(guard(lambda: run_config(command, compose(arguments))))


def main_table() -> None:
    """Make the table that `table=<name>` of `sys.argv` names, the other overrides going to every run, and exit."""
    from moduseg.studies import ablate

    _log_to_stdout(logging.WARNING)
    names = [a.removeprefix("table=") for a in sys.argv[1:] if a.startswith("table=")]
    overrides = [a for a in sys.argv[1:] if not a.startswith("table=")]

    def job() -> int:
        print(ablate.run(names[-1] if names else "", overrides).read_text(encoding="utf-8"))
        return 0

    sys.exit(guard(job))


def main_sweep() -> None:
    """Score the grid that `sys.argv` spans, see `moduseg.studies.sweep`, and exit."""
    from moduseg.studies import sweep

    _log_to_stdout(logging.WARNING)

    def job() -> int:
        path = sweep.run(sys.argv[1:])
        print((path / "sweep.md").read_text(encoding="utf-8") + f"\nsweep -> {path}")
        return 0

    sys.exit(guard(job))


def main_reproduce() -> None:
    """Make the table of the paper that `table=<name>` of `sys.argv` names, and exit.

    `dataset=`, `row=` and `seeds=` choose, the other overrides go to every run; `show` prints the rows' commands.
    The exit code is 0 where every row was run or lacks data or weights, 1 where one failed or left images out.
    """
    from moduseg.studies import reproduce

    _log_to_stdout(logging.WARNING)
    chosen = {key: value for key, _, value in (a.partition("=") for a in sys.argv[1:])}
    name, dataset, row, seeds = (chosen.get(key) for key in ("table", "dataset", "row", "seeds"))
    overrides = [a for a in sys.argv[1:] if a.partition("=")[0] not in ("table", "dataset", "row", "seeds", "show")]

    def job() -> int:
        if "show" in chosen:
            print("\n".join(reproduce.commands(name or "", dataset)))
            return 0
        if seeds is not None and not seeds.isdecimal():
            raise ConfigError(f"seeds: got {seeds!r}, expected a whole number; try seeds=3")
        made = reproduce.run(name or "", overrides, dataset, row, None if seeds is None else int(seeds))
        for path in made.paths:
            print(path.read_text(encoding="utf-8"))
        print("written: " + ", ".join(str(path) for path in made.paths))
        return 1 if made.failed else 0

    sys.exit(guard(job))


def main_compare() -> None:
    """Compare the two folders of `sys.argv`, the other arguments being overrides, and exit."""
    from moduseg.tools import compare

    _log_to_stdout()
    folders = [a for a in sys.argv[1:] if "=" not in a]
    overrides = [a for a in sys.argv[1:] if "=" in a]

    def job() -> int:
        if len(folders) != 2:
            raise ConfigError(
                f"compare: got {len(folders)} folders ({', '.join(folders) or 'none'}), expected two; try: python "
                "scripts/compare.py <folder> <folder> [dataset=<name>]"
            )
        named = any(a.startswith(("dataset=", "experiment=")) for a in overrides)
        compare.run(folders[0], folders[1], compose(overrides), named)
        return 0

    sys.exit(guard(job))


def main_own(command: str) -> None:
    """Run a command of `OWN_KEYS` with the arguments of `sys.argv`, and exit; the codes are those of `main`."""
    _log_to_stdout()
    arguments = sys.argv[1:]
    sys.exit(guard(lambda: int(importlib.import_module(OWN_KEYS[command]).main(arguments))))


def guard(job: Callable[[], int]) -> int:
    """The exit code of `job`; what a user can mend becomes one line on stderr and code 2."""
    try:
        return job()
    except IncompleteError as error:
        print(f"moduseg: {' '.join(str(error).split())}")
        return 0
    except ModusegError as error:
        print(f"moduseg: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moduseg: interrupted; finished images are kept, run the same command to go on", file=sys.stderr)
        return 130


def _log_to_stdout(level: int = logging.INFO) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    # Of several processes that torchrun started, one tells what all are doing.
    logging.getLogger("moduseg").setLevel(level if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def run_config(command: str, cfg: Config) -> int:
    """Run the stage on a checked configuration; see `main` for the exit code."""
    room = "stages" if command in STAGES else "tools"
    stage = importlib.import_module(f"moduseg.{room}.{command}")
    if command in TOOLS:
        return int(stage.main(cfg))
    path = stage.run(cfg)
    failures = count_failures(path) if Peers().leads else 0
    if failures:
        print(f"moduseg: {failures} images left out on the way, see failures.jsonl beside {path}", file=sys.stderr)
    return 1 if failures else 0


def _run_hydra(command: str) -> None:
    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(cfg: DictConfig) -> None:
        _log_to_stdout()  # a launcher may have moved the job to another process
        code = guard(lambda: run_config(command, from_hydra(cfg)))
        if code:
            sys.exit(code)

    job()
