"""What the processes of a run tell each other, with a dictionary in the place of torchrun's store."""

from __future__ import annotations

import pytest

from moduseg.errors import DataError, ModusegError
from moduseg.pipeline.peers import Peers


class Store:
    """Keeps values by key, as torchrun's store does."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> str:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Peers]:
    """Two ranks that share a store."""
    peers, store = [], Store()
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        peers.append(Peers())
        peers[-1].__dict__["_store"] = store
    return peers


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(("error", "expected", "message"), [
    pytest.param(DataError("a.png: damaged"), DataError, "^a.png: damaged$", id="one that a user can correct"),
    pytest.param(ZeroDivisionError("x\ny"), ModusegError, "^rank 1: ZeroDivisionError: x y; its traceback", id="a bug"),
])  # fmt: skip
def test_an_error_of_one_rank_reaches_the_others(
    ranks: list[Peers], error: Exception, expected: type[Exception], message: str
) -> None:
    leader, other = ranks
    with pytest.raises(type(error)):
        other.run_then_merge("task", lambda: fail(error), str)
    with pytest.raises(expected, match=message):
        leader.run_then_merge("task", lambda: 1, str)


def test_an_error_in_merge_reaches_the_others(ranks: list[Peers]) -> None:
    leader, other = ranks
    # Rank 1 has published its share; what it waits for is what rank 0 publishes last.
    leader._store.set("moduseg/0/task/1/1", '{"value": 2}')
    with pytest.raises(KeyError):
        leader.run_then_merge("task", lambda: 1, lambda num: str(fail(KeyError(num))))
    with pytest.raises(ModusegError, match="rank 0: KeyError: 3; its traceback says where"):
        other.run_then_merge("task", lambda: 2, str)


def test_all_ranks_get_what_the_leader_merged(ranks: list[Peers]) -> None:
    leader, other = ranks
    leader._store.set("moduseg/0/task/1/1", '{"value": 2}')
    assert leader.run_then_merge("task", lambda: 1, str) == "3"
    assert other.run_then_merge("task", lambda: 2, str) == "3"
