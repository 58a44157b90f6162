"""The errors that a user can mend. Each message names the value, what is allowed and the remedy, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModusegError(Exception):
    """Base of every error that moduseg raises on purpose; the commands print its message and exit with code 2."""


class ConfigError(ModusegError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DataError(ModusegError):
    """A file or an image cannot be used. In a stage it costs that image only, and is recorded."""


class LabelIdError(DataError):
    """A label map holds an id that its data set does not have."""


class MissingError(ModusegError):
    """A folder, a file or a set of weights that the run needs is not there."""


class ArtefactError(ModusegError):
    """A stored artefact does not fit what is asked of it (another backbone, class list or format)."""


class StorageError(ModusegError):
    """A file cannot be written (disk full, no permission). It ends the run; what was finished before is kept."""


class IncompleteError(ModusegError):
    """Other shards have work left, so that what needs all images has to wait. The commands print it and exit with 0."""


def suggest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most like a misspelt one, for "did you mean ...?"; `None` if none is close."""
    return next(iter(difflib.get_close_matches(name, list(allowed), 1)), None)
