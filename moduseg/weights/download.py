"""The cache folder, and files fetched into it from a web address: resumed, checked, complete or absent.

The file of `https://<host>/<path>` is stored as `$MODUSEG_HOME/<host>/<path>`, where a query adds 8 digits to its name;
a copy that somebody put there is used.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from moduseg.errors import ArtefactError, ConfigError, MissingError, MissingWeightsError, StorageError, hide_credentials
from moduseg.files import file_digest
from moduseg.progress import Progress

log = logging.getLogger("moduseg")

ATTEMPTS = 4
"""A download is given up after so many tries in a row that bring nothing; bytes that arrive reset the count."""
PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
PROBE_TIMEOUT = 5.0
"""Seconds that a server has to say how large a file is."""
_BLOCK = 1 << 20
_OFFLINE = {"1", "ON", "YES", "TRUE"}


class _LostError(Exception):
    """The connection ended early; the bytes that arrived are kept."""


def get_cache_home() -> Path:
    """Return the folder for fetched weights: `MODUSEG_HOME`, else `~/.cache/moduseg`."""
    return Path(os.environ.get("MODUSEG_HOME") or "~/.cache/moduseg").expanduser()


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`) forbids every use of the network."""
    from huggingface_hub import constants

    # The hub's client reads the variable once, on import; here it also counts when it is set later.
    asked = any(os.environ.get(name, "").upper() in _OFFLINE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return asked or bool(constants.HF_HUB_OFFLINE)


_dry_run: ContextVar[bool] = ContextVar("dry_run", default=False)


@contextmanager
def forbid_downloads() -> Iterator[None]:
    """Let what would be fetched inside be an error that names it, as in a run without a network."""
    token = _dry_run.set(True)
    try:
        yield
    finally:
        _dry_run.reset(token)


def is_dry_run() -> bool:
    """Return whether this is inside `forbid_downloads`, where nothing is written either."""
    return _dry_run.get()


def why_not_fetched() -> str:
    """Return why nothing may be fetched; empty if it may."""
    if is_dry_run():
        return "a dry run fetches nothing"
    return "HF_HUB_OFFLINE forbids to fetch it" if is_offline() else ""


def find_download_size(url: str) -> int | None:
    """Return the bytes that a web address announces; `None` offline, or if the server does not say."""
    if is_offline() or not url.startswith("http"):
        return None
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "moduseg"})
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT) as response:
            return _length(response, 0)
    except (OSError, http.client.HTTPException):
        return None


def get_cached_path(url: str, key: str = "weights") -> Path:
    """Return the path in the cache folder that the file of an address has, whether it is there or not.

    Raises:
        ConfigError: the address names no file.
    """
    parts = urlsplit(url)
    names = [unquote(name) for name in parts.path.split("/") if name]
    harmless = all(name not in (".", "..") and not re.search(r"[/\\\x00-\x1f]", name) for name in names)
    if parts.scheme not in ("http", "https") or not parts.hostname or not names or not harmless:
        raise ConfigError(f"{key}: got {url!r}, expected the address of a file; try https://<host>/<path>/<file>")
    if parts.query:
        # One path with two queries is two files; the suffix stays, because it tells how weights are read.
        suffix = Path(names[-1]).suffix
        names[-1] = f"{names[-1].removesuffix(suffix)}-{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}{suffix}"
    return get_cache_home().joinpath(parts.netloc.rpartition("@")[2].replace(":", "_"), *names)


def fetch(url: str, key: str, sha256: str | None = None, value: str | None = None) -> Path:
    """Return the file of an address from the cache folder, fetching it if it is not there.

    Processes that want the same file wait for the one that fetches it. A part (`<file>.part`) that a broken connection
    or a killed process left behind is continued.

    Args:
        url: `http(s)://<host>/<path>/<file>`.
        key: the configuration key, for messages.
        sha256: expected digest, 64 hexadecimal digits; checked on arrival and for a file that was there before.
        value: the value of `key`, for messages; the address if omitted.

    Raises:
        ConfigError: the address names no file.
        MissingError: the file is not there, and the program is offline or the server does not give it.
        ArtefactError: the digest differs; a file that has just arrived is removed.
        StorageError: the file cannot be written.
    """
    target = get_cached_path(url, key)
    if not target.is_file():
        missing = partial(
            missing_weights,
            key=key,
            got=repr(value or url),
            what=target.name,
            source=url,
            folder=target.parent,
            otherwise=f"<path of {target.name}>",
        )
        if reason := why_not_fetched():
            raise missing(reason)
        with locked(target):
            if not target.is_file():
                download = _Download(url, target, missing, has_digest=sha256 is not None)
                download.run()
                if sha256 is not None and (got := file_digest(download.part)) != sha256:
                    download.part.unlink()
                    raise ArtefactError(
                        f"{key}: got sha256 {got} from {url}, expected {sha256}, so it was removed; run again, and if "
                        f"it comes again, fetch the file by other means and set {key}=<path of {target.name}>"
                    )
                with storage(download.part):
                    download.part.replace(target)
    if sha256 is not None and (got := file_digest(target)) != sha256:
        raise ArtefactError(
            f"{key}: {target} has sha256 {got}, expected {sha256}; remove the file and run again, or fetch {url} anew"
        )
    return target


def missing_weights(
    reason: str, *, key: str, got: str, what: str, source: str, folder: Path | str, otherwise: str
) -> MissingWeightsError:
    """Return the error for weights that are neither in the cache folder nor can be fetched.

    Args:
        reason: why they could not be fetched.
        key: the configuration key.
        got: its value.
        what: name of the file or repository.
        source: what a person would fetch, with its address.
        folder: where a person would put it so that it is found.
        otherwise: the value of `key` that names another place.
    """
    place = f"fetch {source} into {folder}, or set {key}={otherwise}"
    return MissingWeightsError(
        f"{key}: got {got}, but {what} is not here and {reason}; {place}",
        what,
        source,
    )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time make `target`, whose folder is created; a process that dies releases its lock.

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
    """Turn an error of the file system into a StorageError, which is one line.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the error for a file of the cache folder that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space" if full else "check the permissions"
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); {remedy}, or set the environment variable "
        "MODUSEG_HOME=<folder on another disk>, and run again"
    )


@dataclass(frozen=True)
class _Download:
    """One file on its way into the cache folder.

    Attributes:
        url: its address.
        target: its path once it is complete.
        missing: makes the error for a reason why it cannot be fetched.
        has_digest: whether the caller compares its digest, so that a part of unknown origin may be continued.
    """

    url: str
    target: Path
    missing: Callable[[str], MissingError]
    has_digest: bool

    @property
    def part(self) -> Path:
        """The file that holds what has arrived."""
        return self.target.with_name(self.target.name + ".part")

    @property
    def _tag(self) -> Path:
        """The file that holds the server's validator of the version that `part` belongs to."""
        return self.part.with_name(self.part.name + ".tag")

    def run(self) -> None:
        """Complete `part`, whatever it holds already.

        Raises:
            MissingError: the server does not give the file.
            StorageError: the file cannot be written.
        """
        tries = 0
        began = _size(self.part)
        while True:
            before = _size(self.part)
            try:
                self._transfer()
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    raise self.missing(reason) from error
            except (_LostError, urllib.error.URLError, http.client.HTTPException, OSError) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                reason = f"could not be fetched ({' '.join(str(cause).split()) or type(cause).__name__})"
                # Without a network there is nothing to wait for.
                if not isinstance(error, _LostError) and _size(self.part) == began:
                    raise self.missing(reason) from error
            else:
                self._tag.unlink(missing_ok=True)
                return
            tries = 1 if _size(self.part) > before else tries + 1
            if tries >= ATTEMPTS:
                arrived = _size(self.part)
                raise self.missing(f"{reason}, {arrived} bytes are kept, run again to go on" if arrived else reason)
            time.sleep(PAUSE * 2 ** (tries - 1))

    def _transfer(self) -> None:
        """Make one connection and append to `part` until the end of the file.

        A part is continued if the server confirms that it still has the same version, or if a digest will tell.
        """
        had = _size(self.part)
        validator = self._tag.read_text(encoding="utf-8") if self._tag.is_file() else ""
        if had and not validator and not self.has_digest:
            had = 0
        headers = {"User-Agent": "moduseg", "Accept-Encoding": "identity"}
        if had:
            headers["Range"] = f"bytes={had}-"
            if validator:
                headers["If-Range"] = validator
        try:
            response = urllib.request.urlopen(_make_request(self.url, headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not had:
                raise
            # The server has no byte after these: `part` is the complete file, or a part of another version.
            if re.fullmatch(rf"bytes \*/{had}", error.headers.get("Content-Range", "")):
                return
            self._discard()
            raise _LostError("the file is another one now") from error
        with response:
            self._append(response, had)

    def _append(self, response: Any, had: int) -> None:
        """Append the response to `part`, of which the server was told to skip `had` bytes."""
        total = _length(response, had)
        if response.status != 206:
            had = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
            self._discard()
            raise _LostError(f"got bytes {response.headers.get('Content-Range')}, asked for {had} onwards")
        _check_free_space(self.part, None if total is None else total - had)
        strong = response.headers.get("ETag", "")
        validator = strong if strong.startswith('"') else response.headers.get("Last-Modified", "")
        # Network errors are no OSError inside this block: `_blocks` turns them into _LostError.
        with storage(self.part):
            if not had:
                self._tag.write_text(validator, encoding="utf-8")
            with (
                self.part.open("ab" if had else "wb") as file,
                Progress(total, self.target.name, unit="B", num_done=had) as progress,
            ):
                for block in _blocks(response):
                    file.write(block)
                    progress.update(len(block))
        if total is not None and _size(self.part) < total:
            raise _LostError(f"the connection ended at {_size(self.part)} of {total} bytes")
        if total is not None and _size(self.part) > total:
            self._discard()
            raise _LostError(f"more than the announced {total} bytes came")

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)


def _make_request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """Return the request for an address; its `user:password@` becomes a header that no other host gets."""
    request = urllib.request.Request(hide_credentials(url), headers=headers)
    credentials, is_given, _ = urlsplit(url).netloc.rpartition("@")
    if is_given:
        encoded = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield the body of a response block by block; network errors become `_LostError`."""
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
    """Return the size of the complete file in bytes; `None` if the server does not say it."""
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else None


def _check_free_space(part: Path, needed: int | None) -> None:
    """Raise StorageError if `needed` bytes do not fit on the disk."""
    free = shutil.disk_usage(part.parent).free
    if needed is not None and needed > free:
        raise StorageError(
            f"{part}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free; free some space, or set "
            "the environment variable MODUSEG_HOME=<folder on another disk>, and run again"
        )


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0
