"""Imported by the server that forks test processes; see `tests.stages.processes`."""

from tests.stages.processes import preload

preload()
