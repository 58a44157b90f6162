"""What a result may depend on beside its key: versions of packages, and the number of threads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

log = logging.getLogger("moduseg")

_PACKAGES = {
    "moduseg": ("moduseg",),
    "torch": ("torch",),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
}
"""Distributions that bring each package."""
_reported = set[str]()
"""Differences that this process has told of: every stage of a run has the same."""


def describe_environment() -> dict[str, Any]:
    """Return the version of each package, `None` if it is not installed, and the number of torch's threads."""
    return {**_read_versions(), "threads": torch.get_num_threads()}


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs, as `torch 2.6.0 -> 2.7.0, threads 8 -> 2`; empty if nothing does."""
    changes = (f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name])
    return ", ".join(changes)


def report_difference(stage: str, folder: str, before: object) -> None:
    """Say in one line that a folder was made in another environment, once for each difference.

    Args:
        stage: that made the folder.
        folder: its path, for the message.
        before: the environment of its manifest; earlier versions wrote none.
    """
    difference = describe_difference(before, describe_environment()) if isinstance(before, Mapping) else ""
    if difference and difference not in _reported:
        _reported.add(difference)
        log.info("%s: finished work is used that was made otherwise (%s) -> %s", stage, difference, folder)


@lru_cache(maxsize=1)
def _read_versions() -> dict[str, str | None]:
    return {package: _find_version(names) for package, names in _PACKAGES.items()}


def _find_version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
