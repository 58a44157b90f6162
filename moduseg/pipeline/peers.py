"""The processes that share a run: ranks of torchrun, tasks of a job array, or nobody.

Ranks of torchrun talk through its key-value store, in JSON: each says when its share of a stage is done, the first one
merges, the others wait for that. Tasks of a job array know of each other by the records they leave on disk.
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
"""Seconds between two looks at the store, doubled up to 50 times that."""


class Peers:
    """This process among those of the run.

    Args:
        index, count: of the job array (`runtime.shard`); 0 and 1 where there is none.
        alone: whether to look past torchrun's environment (a worker that another engine started).

    Attributes:
        rank, world: of torchrun; 0 and 1 where there is none.
        index, count: of all, those of torchrun counted inside each task of the job array.

    Raises:
        ConfigError: `RANK` and `WORLD_SIZE` are no such numbers.
    """

    def __init__(self, index: int = 0, count: int = 1, alone: bool = False) -> None:
        self.rank, self.world = (0, 1) if alone else _torchrun()
        self.index, self.count = index * self.world + self.rank, count * self.world
        self._seen: Counter[str] = Counter()

    @property
    def leads(self) -> bool:
        """Whether this process merges and speaks for those it is started with."""
        return self.rank == 0

    def together(self, name: str, own: Callable[[], int], merge: Callable[[int], str]) -> str:
        """Let every rank do its own part, and the first merge them when all are done.

        Args:
            name: of what is done, the same on every rank.
            own: this process's part; gives a number.
            merge: called on rank 0 with the sum of the numbers; gives what all return.

        Raises:
            ModusegError: of `own` or `merge`; what one rank meets, all raise.
        """
        if not self._talks:
            return merge(own())
        name = self._numbered(name)
        self._tell(f"{name}/{self.rank}", own)
        if not self.leads:
            return str(self._hear(name))
        return str(self._tell(name, lambda: merge(sum(self._hear(f"{name}/{r}") for r in range(self.world)))))

    def first(self, name: str, job: Callable[[], Any]) -> None:
        """Let rank 0 do a job that is to be done once (`job` itself sees that others find it done), the others wait."""
        if not self._talks:
            job()
            return
        name = self._numbered(name)
        if self.leads:
            self._tell(name, lambda: (job(), 0)[1])
        else:
            self._hear(name)
            job()

    @property
    def _talks(self) -> bool:
        return self.world > 1 and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ

    def _numbered(self, name: str) -> str:
        # A run may come to one artefact twice, and torchrun may have started its processes anew.
        self._seen[name] += 1
        return f"moduseg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}/{self._seen[name]}"

    @cached_property
    def _store(self) -> Any:
        from torch.distributed import TCPStore

        # torchrun's agent serves the store; where processes were started otherwise, the first one does.
        serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.leads
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, self.world, serves, timedelta(minutes=5), wait_for_workers=False)

    def _tell(self, key: str, job: Callable[[], Any]) -> Any:
        try:
            value = job()
        except ModusegError as error:
            self._store.set(key, json.dumps({"error": type(error).__name__, "text": str(error)}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def _hear(self, key: str) -> Any:
        pause = _POLL
        # Looked at again and again, not waited for: so a signal is heard, and torchrun sends one when a rank dies.
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 50 * _POLL)
        answer = json.loads(self._store.get(key))
        if "error" in answer:
            raise getattr(errors, answer["error"], ModusegError)(answer["text"])
        return answer["value"]


def _torchrun() -> tuple[int, int]:
    """`RANK` and `WORLD_SIZE` of the environment; 0 and 1 where they are not set."""
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(texts):
        return 0, 1
    if not all(text.isdigit() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ConfigError(
            f"RANK, WORLD_SIZE: got {texts[0]!r}, {texts[1]!r}, expected a rank from 0 below the number of processes, "
            "as torchrun sets them; unset both, or set runtime.shard.index and runtime.shard.count"
        )
    return int(texts[0]), int(texts[1])
