"""Batches distributed over the workers of a Ray cluster, by Ray Data (extra `ray`).

A worker builds the stage and its `BatchRunner` itself, holds the models, and processes the batches it is given; files
and records go to the artefact's folder, which all machines of the cluster see. A task whose worker died is given to
another worker, which skips the batches that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moduseg import errors
from moduseg.config import Config, RayConfig, ShardConfig
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError, ModusegError
from moduseg.pipeline.batches import BatchRunner

_RETRIES = 3
"""How often a task is given to another worker after its worker died."""


@dataclass(frozen=True)
class RayWorkers:
    """The workers, as `runtime.ray` describes them.

    Attributes:
        address: of a running cluster; `None` starts one on this machine, which ends with the process.
        actors: number of workers.
        cpus, gpus: of each worker; fractions share one.
        batches: given to a worker at once.
    """

    address: str | None = None
    actors: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    batches: int = 4

    def run(self, rebuild: Callable[[], BatchRunner[Any]], indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Process batches on the workers.

        Args:
            rebuild: returns the stage's runner; called once in every worker, so it has to be picklable.
            indices: of the batches.

        Yields:
            Index and number of results of each batch when it is done, in any order.

        Raises:
            MissingError: Ray is not installed, or its cluster cannot be reached.
            ModusegError: raised by a runner in a worker, or a worker died again and again on the same batches.
        """
        ray = _connect(self)
        import torch

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        num_tasks = -(-len(indices) // self.batches)
        rows = ray.data.from_items([{"batch": index} for index in indices], override_num_blocks=num_tasks).map_batches(
            _Worker,
            batch_size=None,
            batch_format="numpy",
            fn_constructor_args=(rebuild, torch.get_num_threads()),
            concurrency=min(self.actors, num_tasks),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        try:
            for row in rows.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"], ModusegError)(row["text"])
                yield int(row["batch"]), int(row["results"])
        except ray.exceptions.RayError as error:
            raise ModusegError(
                f"runtime.engine: Ray gave up ({_first_line(error)}); a worker that dies again and again is most often "
                "short of memory: set runtime.ray.actors lower; finished images are kept"
            ) from error


class _Worker:
    """Lives in a process of the cluster; called with batches of indices by Ray Data."""

    def __init__(self, rebuild: Callable[[], BatchRunner[Any]], threads: int) -> None:
        import torch

        # Ray sets the thread count from num_cpus. The order of floating-point sums depends on it, so fix it to get
        # identical bytes.
        torch.set_num_threads(threads)
        self._rebuild = rebuild
        self._runner: BatchRunner[Any] | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        indices = [int(index) for index in rows["batch"]]
        done: dict[int, int] = {}
        error, text = "", ""
        try:
            runner = self._runner = self._runner or self._rebuild()
            unfinished = runner.unfinished(indices)
            done = {index: len(runner.batches[index]) for index in indices if index not in unfinished}
            done.update(runner.process_batches(unfinished))
        except ModusegError as caught:
            # The error travels as name and text: Ray would wrap it, traceback included, into an error of its own.
            error, text = type(caught).__name__, str(caught)
        failed = [index for index in indices if index not in done] if error else []
        answered = [*done, *failed[:1]]
        return {
            "batch": answered,
            "results": [done.get(index, 0) for index in answered],
            "error": ["" if index in done else error for index in answered],
            "text": ["" if index in done else text for index in answered],
        }


def worker_config(cfg: Config, device: Device) -> Config:
    """Return the configuration of one worker: the driver's device and precision, and no sharding of its own.

    Raises:
        ConfigError: the device is a GPU, and workers get none.
    """
    kind = device.torch_device.type
    if kind != "cpu" and not cfg.runtime.ray.gpus:
        raise ConfigError(
            f"runtime.ray.gpus: got 0 with runtime.device={kind}, expected more than 0; set runtime.ray.gpus=1, or "
            "runtime.device=cpu"
        )
    runtime = replace(
        cfg.runtime, engine="local", shard=ShardConfig(), ray=RayConfig(), device=kind, precision=device.precision
    )
    return replace(cfg, runtime=runtime)


def _connect(workers: RayWorkers) -> Any:
    try:
        import ray

        # Loaded here, so that they are attributes of `ray` for the callers.
        import ray.data  # noqa: F401
        import ray.exceptions  # noqa: F401
    except ImportError as error:
        raise MissingError(
            f"runtime.engine: got ray, which is not installed ({error}); pip install 'moduseg[ray]', or set "
            "runtime.engine=local"
        ) from error
    if ray.is_initialized():
        return ray
    import logging
    import math
    import os

    try:
        if workers.address is not None:
            ray.init(workers.address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            cpus = max(os.cpu_count() or 1, math.ceil(workers.actors * workers.cpus))
            ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise MissingError(
            f"runtime.ray.address: got {workers.address!r}, no cluster could be reached or started "
            f"({_first_line(error)}); start one with `ray start --head`, or set runtime.engine=local"
        ) from error
    return ray


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
