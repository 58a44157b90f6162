"""Run the work of a report in threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from moduseg.config import Config
from moduseg.devices import count_workers
from moduseg.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    cfg: Config, function: Callable[[Item], Result], items: Collection[Item], title: str
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order, computed in `evaluation.workers` threads, with a progress bar."""
    num_workers = count_workers(cfg.evaluation.workers)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="report") as pool:
        yield from track(pool.map(function, items), title, len(items))
