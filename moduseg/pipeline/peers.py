"""The processes that share a run: ranks of torchrun, tasks of a job array, or a single process.

Ranks of torchrun talk through its key-value store, in JSON: each publishes that its share of a stage is done, rank 0
merges, the others await the merge. Tasks of a job array find each other's records on disk.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import Any

from moduseg import errors
from moduseg.errors import ConfigError, ModusegError

_POLL = 0.02
"""Seconds between the first two polls of the store; each pause doubles, up to 50 times that."""


class Peers:
    """Coordinates this process with the other processes of the run.

    Args:
        index, count: this task of the job array and their number (`runtime.shard`); 0 and 1 without one.
        alone: whether to ignore torchrun's environment (in a worker that another engine started).

    Attributes:
        rank, world: this rank of torchrun and their number; 0 and 1 without it.
        index, count: this process and their number, the ranks of torchrun counted inside each task of the job array.

    Raises:
        ConfigError: `RANK` and `WORLD_SIZE` are not a rank and a number of processes.
    """

    def __init__(self, index: int = 0, count: int = 1, alone: bool = False) -> None:
        self.rank, self.world = (0, 1) if alone else _torchrun()
        self.index, self.count = index * self.world + self.rank, count * self.world
        self._seen: Counter[str] = Counter()

    @property
    def is_leader(self) -> bool:
        """True on rank 0, which merges results and logs for its group."""
        return self.rank == 0

    def run_then_merge(self, task: str, run_share: Callable[[], int], merge: Callable[[int], str]) -> str:
        """Run every rank's share, then merge on rank 0.

        Args:
            task: name of the task, equal on every rank.
            run_share: does this process's share and returns the number of its results.
            merge: called on rank 0 with the sum of the numbers; its result is returned on every rank.

        Raises:
            ModusegError: raised by `run_share` or `merge` on any rank; every rank raises it. Another error is raised
                where it happened, and as a ModusegError elsewhere.
        """
        if not self._has_store:
            return merge(run_share())
        key = self._numbered(task)
        self._publish(f"{key}/{self.rank}", run_share)
        if not self.is_leader:
            return str(self._await(key))
        return str(self._publish(key, lambda: merge(sum(self._await(f"{key}/{r}") for r in range(self.world)))))

    def leader_first(self, task: str, job: Callable[[], Any]) -> None:
        """Run `job` on rank 0, then on the other ranks, where it has to find its work done."""
        if not self._has_store:
            job()
            return
        key = self._numbered(task)
        if self.is_leader:
            self._publish(key, lambda: (job(), 0)[1])
        else:
            self._await(key)
            job()

    @property
    def _has_store(self) -> bool:
        return self.world > 1 and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ

    def _numbered(self, task: str) -> str:
        # A run may do a task twice, and torchrun may restart its processes: each time has a key of its own.
        self._seen[task] += 1
        return f"moduseg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{task}/{self._seen[task]}"

    @cached_property
    def _store(self) -> Any:
        from torch.distributed import TCPStore

        # torchrun's agent serves the store; without an agent, rank 0 does, and lets a training use it as well.
        is_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.is_leader
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(minutes=5)
        return TCPStore(host, port, self.world, is_server, patience, wait_for_workers=False, multi_tenant=True)

    def _publish(self, key: str, job: Callable[[], Any]) -> Any:
        try:
            value = job()
        except Exception as error:  # raised again: the other ranks would wait for ever
            text = str(error)
            if not isinstance(error, ModusegError):
                text = f"rank {self.rank}: {type(error).__name__}: {' '.join(text.split())}; its traceback says where"
            self._store.set(key, json.dumps({"error": type(error).__name__, "text": text}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def _await(self, key: str) -> Any:
        pause = _POLL
        # Poll instead of blocking, so that the signal torchrun sends when a rank dies is handled.
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 50 * _POLL)
        answer = json.loads(self._store.get(key))
        if "error" in answer:
            raise getattr(errors, answer["error"], ModusegError)(answer["text"])
        return answer["value"]


def _torchrun() -> tuple[int, int]:
    """Return `RANK` and `WORLD_SIZE` of the environment; 0 and 1 if they are not set."""
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(texts):
        return 0, 1
    if not all(text.isdigit() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ConfigError(
            f"RANK, WORLD_SIZE: got {texts[0]!r}, {texts[1]!r}, expected a rank from 0 below the number of processes, "
            "as torchrun sets them; unset both, or set runtime.shard.index and runtime.shard.count"
        )
    return int(texts[0]), int(texts[1])
