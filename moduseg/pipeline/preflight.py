"""What a run needs, looked for before its first image, while the person who started it is still there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moduseg.errors import StorageError
from moduseg.files import get_digested_bytes, write_atomic
from moduseg.pipeline.estimate import RunEstimate, StageWork
from moduseg.pipeline.plan import Plan, plan_run

if TYPE_CHECKING:
    from moduseg.pipeline.stage import Stage
    from moduseg.pipeline.workspace import Workspace

log = logging.getLogger("moduseg")

_LARGE_WEIGHTS = 500_000_000
"""Bytes of weights with which the CPU takes minutes an image."""
_DRIVER = Path("/proc/driver/nvidia/version")


class HasDigest(Protocol):
    """A backend: proposer, backbone or generator."""

    @property
    def digest(self) -> str:
        """Digest of its weights, which are found, and fetched if need be, to take it."""


def check_before_run(stage: Stage[Any]) -> None:
    """Look once for what a stage and those before it need.

    The first line of the log names device and precision. Then data sets are opened and weights found, fetched and
    hashed, so that what is missing ends the run now.

    Args:
        stage: the one that a person asked for.

    Raises:
        MissingError: a data set or weights are missing.
        StorageError: the folder of all artefacts cannot be written.
        ModusegError: a backend refuses its settings.
    """
    work = stage.work
    if work.is_checked:
        return
    work.is_checked = True
    log.info(describe_device(work))
    _check_writable(work.outputs)
    _ = stage.dataset.ids
    plan = plan_run(stage, may_fetch=True)
    work.estimate = RunEstimate(
        StageWork(
            planned.name, planned.title, planned.cost, -(-(planned.num_images - planned.num_done) // work.shard.count)
        )
        for planned in plan.stages
    )
    if work.peers.is_leader:
        warn_of_cpu(work, get_digested_bytes())
        _warn_of_space(plan)


def describe_device(work: Workspace) -> str:
    """Return device, precision and threads of a run, in one line."""
    device, name = work.device, ""
    if device.torch_device.type == "cuda":
        name = f" ({torch.cuda.get_device_name(device.torch_device)})"
    return f"device {device.torch_device}{name}, {device.precision}, {torch.get_num_threads()} threads"


def warn_of_cpu(work: Workspace, num_bytes: int) -> None:
    """Warn if the CPU was taken because no GPU was found, where one was to be expected.

    Args:
        work: of the run.
        num_bytes: size of the weights that the run uses.
    """
    if work.cfg.runtime.device != "auto" or work.device.torch_device.type != "cpu":
        return
    remedy = "install a build of torch for your driver (python -c 'import torch; print(torch.cuda.is_available())')"
    if _DRIVER.is_file() or shutil.which("nvidia-smi"):
        log.warning("runtime.device: auto took the CPU, although an NVIDIA driver is here; %s", remedy)
    elif num_bytes > _LARGE_WEIGHTS:
        log.warning(
            "runtime.device: auto took the CPU for %.1f GB of weights, which takes minutes an image; run on a machine "
            "with a GPU, or try a smaller model",
            num_bytes / 1e9,
        )


def _warn_of_space(plan: Plan) -> None:
    if plan.num_bytes > plan.num_free_bytes:
        log.warning(
            "runtime.outputs: the run will write about %.1f GB, and %.1f GB are free; free some space, or set "
            "runtime.outputs=<folder on another disk>",
            plan.num_bytes / 1e9,
            plan.num_free_bytes / 1e9,
        )


def _check_writable(folder: Path) -> None:
    """Raise StorageError if a folder cannot be written."""
    probe = folder / ".writable"
    write_atomic(probe, b"")
    try:
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{probe}: cannot be removed ({error.strerror}); check the permissions") from error
