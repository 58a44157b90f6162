"""Errors that a user can correct. Each message names the value, what is allowed and the remedy, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

_CREDENTIALS = re.compile(r"(?i)\b(https?|ftp)://[^\s/?#\"'<>]*@")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}


def hide_credentials(text: str) -> str:
    """Return a text in which web addresses have no `user:password@`."""
    return _CREDENTIALS.sub(r"\1://", text) if "://" in text else text


class ModusegError(Exception):
    r"""Base of every error that moduseg raises on purpose; the commands print its message and exit with code 2.

    Names and passwords inside web addresses are left out of the message, and control characters, which a file can hold
    and a terminal obeys, are written as `\x1b`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(hide_credentials(a).translate(_CONTROL) if isinstance(a, str) else a for a in arguments))


class ConfigError(ModusegError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DataError(ModusegError):
    """A file or an image cannot be used. A stage records it and goes on without that image."""


class LabelIdError(DataError):
    """A label map holds an id that its data set does not have."""


class MissingError(ModusegError):
    """A folder, a file or a set of weights that the run needs is missing."""


class MissingWeightsError(MissingError):
    """Weights are neither in the cache folder nor can they be fetched.

    Attributes:
        what: name of the file or model.
        source: its address, or a sentence that names it.
        find_size: gives the bytes to fetch, `None` if they are not known: asks the hub, or knows a package; `None` for
            an address, whose server is asked.
    """

    def __init__(
        self,
        message: str,
        what: str = "",
        source: str = "",
        find_size: Callable[[], int | None] | None = None,
    ) -> None:
        super().__init__(message)
        self.what, self.source, self.find_size = what, source, find_size


class ArtefactError(ModusegError):
    """A stored artefact does not fit the request (another backbone, class list or format)."""


class StorageError(ModusegError):
    """A file cannot be written (disk full, no permission). The run ends; finished images are kept."""


class DeviceError(ModusegError):
    """The device is lost, or image after image fails through no fault of its own. Finished images are kept."""


class TrainingError(ModusegError):
    """A training cannot go on: its loss or its gradient is not a number."""


class IncompleteError(ModusegError):
    """Other shards are unfinished, so the merge cannot run yet. The commands print the message and exit with code 0."""


def suggest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most like a misspelt one, for "did you mean ...?"; `None` if none is close."""
    return next(iter(difflib.get_close_matches(name, list(allowed), 1)), None)


def suggest_all(name: str, allowed: Iterable[str], max_count: int = 4) -> list[str]:
    """Return the allowed names that a misspelt or shortened one may stand for, the most likely first.

    Args:
        name: what was written.
        allowed: the names that exist; those that begin with `name` come first, the shortest of them before the others,
            then those that are most like it.
        max_count: at most this many are returned.
    """
    names = list(allowed)
    longer = sorted(
        (other for other in names if name and other.startswith(name)), key=lambda other: (len(other), other)
    )
    close = difflib.get_close_matches(name, names, max_count)
    return list(dict.fromkeys([*longer, *close]))[:max_count]
