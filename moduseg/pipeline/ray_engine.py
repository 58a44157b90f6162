"""Batches spread over the workers of a Ray cluster, by Ray Data (extra `ray`).

A worker builds the stage's loop anew, holds its models, and runs the loop's own body on the batches it is given; files
and records go to the artefact's folder, which all machines of the cluster see. A task whose worker died is given to
another one, which leaves out what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moduseg import errors
from moduseg.errors import MissingError, ModusegError
from moduseg.pipeline.batches import Loop

_RETRIES = 3
"""Times that a task is given to another worker after one died on it."""


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

    def run(self, rebuild: Callable[[], Loop[Any]], todo: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Do batches on the workers.

        Args:
            rebuild: gives the stage's loop; called once in every worker, so it has to be picklable.
            todo: indices of batches.

        Yields:
            Index and number of results of each batch when it is done, in any order.

        Raises:
            MissingError: Ray is not installed, or its cluster cannot be reached.
            ModusegError: of the loop in a worker, or a worker died again and again on the same batches.
        """
        ray = _connected(self)
        import torch

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        pieces = -(-len(todo) // self.batches)
        rows = ray.data.from_items([{"batch": index} for index in todo], override_num_blocks=pieces).map_batches(
            _Worker,
            batch_size=None,
            batch_format="numpy",
            fn_constructor_args=(rebuild, torch.get_num_threads()),
            concurrency=min(self.actors, pieces),
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
                "short of memory: set runtime.ray.actors or runtime.batch_size lower; finished images are kept"
            ) from error


class _Worker:
    """Lives in a process of the cluster; called with batches of indices by Ray Data."""

    def __init__(self, rebuild: Callable[[], Loop[Any]], threads: int) -> None:
        import torch

        # Ray sets the number of threads by the worker's CPUs; sums are grouped by it, and bytes are to be the same.
        torch.set_num_threads(threads)
        self._rebuild = rebuild
        self._loop: Loop[Any] | None = None

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        indices = [int(index) for index in rows["batch"]]
        done: dict[int, int] = {}
        error, text = "", ""
        try:
            loop = self._loop = self._loop or self._rebuild()
            todo = loop.unfinished(indices)
            done = {index: len(loop.batches[index]) for index in indices if index not in todo}
            done.update(loop.batches_done(todo))
        except ModusegError as caught:
            # By name and text: Ray would wrap it into its own error, traceback and all.
            error, text = type(caught).__name__, str(caught)
        failed = [index for index in indices if index not in done] if error else []
        answered = [*done, *failed[:1]]
        return {
            "batch": answered,
            "results": [done.get(index, 0) for index in answered],
            "error": ["" if index in done else error for index in answered],
            "text": ["" if index in done else text for index in answered],
        }


def _connected(workers: RayWorkers) -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
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
