"""Stages in processes of their own that start at once, to be killed, starved of disk or run side by side."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

STAGES = {
    "propose": "propose:Propose.run",
    "class_scores": "class_scores:ClassScores.run",
    "pseudo_masks": "pseudo_masks:PseudoMasks.run",
    "build_bank": "build_bank:BuildBank.run",
    "queries": "queries:Queries.run",
    "infer": "infer:Infer.run",
    "evaluate": "evaluate:run",
}
"""What runs each stage, in the order of the data: module of `moduseg.stages` and function."""


def context() -> ForkServerContext:
    """Processes forked from one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.processes_preload"])
    return found


def start(stage: str, arguments: Sequence[str], log: Path, file_limit: int | None = None) -> BaseProcess:
    """Run a stage as the command line does; what it says goes to `log`.

    Args:
        stage: a key of `STAGES`.
        arguments: overrides.
        log: stdout and stderr.
        file_limit: largest file that the process may write, in bytes.
    """
    process = context().Process(target=_run, args=(stage, list(arguments), str(log), file_limit))
    process.start()
    return process


def run_two_ranks(script: Path, arguments: Sequence[str], log: Path, seconds: float = 240) -> None:
    """Run a script in two processes of torchrun, and raise an error with what they said if they fail.

    What they say goes into a file, since processes that outlived torchrun would hold a pipe open, and the reader would
    wait for them for ever.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        torchrun = subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=output)
    try:
        code = torchrun.wait(seconds)
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # it ends its processes before itself
        torchrun.wait()
        raise
    if code:
        raise RuntimeError(f"exit code {code}:\n{log.read_text()[-2000:]}")


def _run(stage: str, arguments: list[str], log: str, file_limit: int | None) -> None:
    import torch

    from moduseg.cli.main import errors_as_exit_code, load, to_exit_code
    from moduseg.config import compose

    torch.set_num_threads(1)
    with Path(log).open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with errors_as_exit_code() as status:
            status.code = to_exit_code(load(f"moduseg.stages.{STAGES[stage]}")(compose(arguments)))
    os._exit(status.code)


def preload() -> None:
    """Import what the stages import on first use."""
    for name in ("timm", "cv2", "pycocotools.mask", "skimage.segmentation", "moduseg.backbones.timm_model"):
        importlib.import_module(name)
    for stage in STAGES:
        importlib.import_module(f"moduseg.stages.{stage}")
