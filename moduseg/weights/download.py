"""The cache folder, and files fetched into it from a web address: resumed, checked, complete or not there.

A file of `https://<host>/<path>` lies at `$MODUSEG_HOME/<host>/<path>`, whoever put it there.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from moduseg.errors import ArtefactError, ConfigError, MissingError, StorageError
from moduseg.files import file_digest

log = logging.getLogger("moduseg")

ATTEMPTS = 4
"""Tries in a row that bring nothing before a download is given up; one that brings something starts the count anew."""
PAUSE = 1.0
"""Seconds before the first new try; doubled each time."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
_BLOCK = 1 << 20
_OFFLINE = {"1", "ON", "YES", "TRUE"}


class _LostError(Exception):
    """The connection ended early; what was fetched is kept."""


def home() -> Path:
    """The one folder for weights that are fetched: `MODUSEG_HOME`, else `~/.cache/moduseg`."""
    return Path(os.environ.get("MODUSEG_HOME") or "~/.cache/moduseg").expanduser()


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`) forbids every use of the network."""
    from huggingface_hub import constants

    # The hub's client reads the variable once, on import; here it also counts when it is set later.
    asked = any(os.environ.get(name, "").upper() in _OFFLINE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return asked or bool(constants.HF_HUB_OFFLINE)


def place_of(url: str, key: str = "weights") -> Path:
    """Where in the cache folder the file of an address lies.

    Raises:
        ConfigError: not an address of a file.
    """
    parts = urlsplit(url)
    names = [unquote(name) for name in parts.path.split("/") if name]
    harmless = all(name not in (".", "..") and "/" not in name and "\\" not in name for name in names)
    if parts.scheme not in ("http", "https") or not parts.hostname or not names or not harmless:
        raise ConfigError(f"{key}: got {url!r}, expected the address of a file; try https://<host>/<path>/<file>")
    return home().joinpath(parts.netloc.rpartition("@")[2].replace(":", "_"), *names)


def fetch(url: str, key: str, sha256: str | None = None, value: str | None = None) -> Path:
    """The file of an address in the cache folder, fetched where it is not there.

    Processes that want the same file wait for the one that fetches it. What a broken connection or a killed process
    leaves (`<file>.part`) is continued.

    Args:
        url: `http(s)://<host>/<path>/<file>`.
        key: the configuration key, for messages.
        sha256: of the file, hexadecimal; checked on arrival and of a file that was there.
        value: what the configuration holds, for messages; the address where left out.

    Raises:
        ConfigError: not an address of a file.
        MissingError: not there, and offline or not to be had.
        ArtefactError: another digest; a file that was just fetched is removed.
        StorageError: the file cannot be written.
    """
    target = place_of(url, key)
    if not target.is_file():
        if is_offline():
            raise _not_had(url, key, value, target, "HF_HUB_OFFLINE forbids to fetch it")
        with locked(target):
            if not target.is_file():
                part = target.with_name(target.name + ".part")
                _download(url, part, key, value, target, known=sha256 is not None)
                if sha256 is not None and file_digest(part) != sha256:
                    got = file_digest(part)
                    part.unlink()
                    raise ArtefactError(
                        f"{key}: got sha256 {got} from {url}, expected {sha256}, so it was removed; run again, and if "
                        f"it comes again, fetch the file by other means and set {key}=<path of {target.name}>"
                    )
                with storage(part):
                    part.replace(target)
    if sha256 is not None and (got := file_digest(target)) != sha256:
        raise ArtefactError(
            f"{key}: {target} has sha256 {got}, expected {sha256}; remove the file and run again, or fetch {url} anew"
        )
    return target


def not_here(
    key: str, got: str, what: str, reason: str, fetching: str, folder: Path | str, otherwise: str
) -> MissingError:
    """The line for weights that are neither here nor to be had.

    Args:
        key, got: the configuration key and its value.
        what: name of the file or repository.
        reason: why it could not be fetched.
        fetching: what to fetch, with its address.
        folder: where to put it so that it is found.
        otherwise: the value of `key` that names another place.
    """
    return MissingError(
        f"{key}: got {got}, but {what} is not here and {reason}; fetch {fetching} into {folder}, "
        f"or set {key}={otherwise}"
    )


def _not_had(url: str, key: str, value: str | None, target: Path, reason: str) -> MissingError:
    return not_here(key, repr(value or url), target.name, reason, url, target.parent, f"<path of {target.name}>")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time make `target`; its folder is made. The lock goes with the process that holds it.

    Raises:
        StorageError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    with storage(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(target.with_name(f".{target.name}.lock")))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that fetches %s", target)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what the file system answers into one line.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """The line for a file of the cache folder that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space" if full else "check the permissions"
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); {remedy}, or set the environment variable "
        "MODUSEG_HOME=<folder on another disk>, and run again"
    )


def _download(url: str, part: Path, key: str, value: str | None, target: Path, known: bool) -> None:
    """Bring `part` to completeness, whatever is in it already."""
    tries = 0
    began = _size(part)
    while True:
        before = _size(part)
        try:
            _transfer(url, part, target.name, known)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                raise _not_had(url, key, value, target, reason) from error
        except (_LostError, urllib.error.URLError, http.client.HTTPException, OSError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = f"could not be fetched ({' '.join(str(cause).split()) or type(cause).__name__})"
            # Without a network there is nothing to wait for.
            if not isinstance(error, _LostError) and _size(part) == began:
                raise _not_had(url, key, value, target, reason) from error
        else:
            part.with_name(part.name + ".tag").unlink(missing_ok=True)
            return
        tries = 1 if _size(part) > before else tries + 1
        if tries >= ATTEMPTS:
            kept = f"{reason}, {_size(part)} bytes are kept, run again to go on" if _size(part) else reason
            raise _not_had(url, key, value, target, kept)
        time.sleep(PAUSE * 2 ** (tries - 1))


def _transfer(url: str, part: Path, title: str, known: bool) -> None:
    """One connection: from what `part` holds to the end.

    A part is continued where the server says that it still has the same file, or where the digest will tell (`known`).
    """
    tag = part.with_name(part.name + ".tag")
    had = _size(part)
    seen = tag.read_text(encoding="utf-8") if tag.is_file() else ""
    if had and not seen and not known:
        had = 0
    headers = {"User-Agent": "moduseg", "Accept-Encoding": "identity"}
    if had:
        headers["Range"] = f"bytes={had}-"
        if seen:
            headers["If-Range"] = seen
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not had:
            raise
        # Nothing lies behind what is here: it is the whole file, or not this file.
        if re.fullmatch(rf"bytes \*/{had}", error.headers.get("Content-Range", "")):
            return
        _discard(part, tag)
        raise _LostError("the file is another one now") from error
    with response:
        total = _length(response, had)
        if response.status != 206:
            had = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
            _discard(part, tag)
            raise _LostError(f"got bytes {response.headers.get('Content-Range')}, asked for {had} onwards")
        _check_room(part, None if total is None else total - had)
        strong = response.headers.get("ETag", "")
        validator = strong if strong.startswith('"') else response.headers.get("Last-Modified", "")
        # What the network answers is no OSError here: see `_blocks`.
        with storage(part):
            if not had:
                tag.write_text(validator, encoding="utf-8")
            with (
                part.open("ab" if had else "wb") as file,
                tqdm(total=total, initial=had, desc=title, unit="B", unit_scale=True, leave=False) as progress,
            ):
                for block in _blocks(response):
                    file.write(block)
                    progress.update(len(block))
    if total is not None and _size(part) < total:
        raise _LostError(f"the connection ended at {_size(part)} of {total} bytes")
    if total is not None and _size(part) > total:
        _discard(part, tag)
        raise _LostError(f"more than the announced {total} bytes came")


def _blocks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK)
        except http.client.IncompleteRead as error:
            if error.partial:
                yield error.partial
            raise _LostError(str(error)) from error
        except (http.client.HTTPException, OSError) as error:
            raise _LostError(str(error) or type(error).__name__) from error
        if not block:
            return
        yield block


def _length(response: Any, had: int) -> int | None:
    """Bytes of the whole file, where the server says so."""
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _check_room(part: Path, needed: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed is not None and needed > free:
        raise StorageError(
            f"{part}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free; free some space, or set "
            "the environment variable MODUSEG_HOME=<folder on another disk>, and run again"
        )


def _discard(part: Path, tag: Path) -> None:
    part.unlink(missing_ok=True)
    tag.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
