"""sha256 of files."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from moduseg.errors import MissingError


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal; read once for each size and modification time.

    Raises:
        MissingError: there is no such file.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such file; check the path")
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)
