"""Imported by the server that forks test processes; see `tests.support.processes`."""

from tests.support.processes import preload

preload()
