"""The folder of a report: scripts that hold data, and the program that shows them.

A page that is opened from disk may not fetch files, so data are scripts: `data/<key>.js` hands its value to the page by
`Report.receive("<key>", value)` when the page adds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from moduseg.files import write_atomic

FORMAT = 1
"""Version of a report's files, raised when their meaning changes."""
_FOLDERS = ("app", "bank", "data", "fit", "photos")


class Page:
    """Writes the files of one report into a folder.

    Args:
        folder: where `index.html` goes; an earlier report there is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "index.html").unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)

    def write_data(self, key: str, value: Any) -> None:
        """Write `data/<key>.js`."""
        write_atomic(self.folder / "data" / f"{key}.js", make_script(key, value))

    def write_picture(self, relative: str, data: bytes) -> None:
        """Write a picture at a path inside the folder."""
        write_atomic(self.folder / relative, data)

    def write_index(self) -> Path:
        """Write the program and then `index.html`, and return its path.

        The index comes last: its presence says that the report is complete.
        """
        program = read_program()
        index = program.pop("index.html")
        for name, content in program.items():
            write_atomic(self.folder / "app" / name, content)
        write_atomic(self.folder / "index.html", index)
        return self.folder / "index.html"


def read_program() -> dict[str, bytes]:
    """Return the files of the page itself, by path: `index.html`, style sheets, `main.js`, `lib/`, `views/`."""
    static = resources.files("moduseg.report") / "static"
    folders = [("", static), *((f"{name}/", static / name) for name in ("lib", "views"))]
    return {
        prefix + entry.name: entry.read_bytes()
        for prefix, folder in folders
        for entry in folder.iterdir()
        if entry.is_file()
    }


def digest_program() -> str:
    """Return the SHA-256 of the program, hexadecimal; a changed program writes older reports again."""
    sha256 = hashlib.sha256()
    for name, content in sorted(read_program().items()):
        sha256.update(f"{name}\n{len(content)}\n".encode() + content)
    return sha256.hexdigest()


def make_script(key: str, value: Any) -> bytes:
    """Return a script that hands `value` to the page under `key`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f"Report.receive({json.dumps(key)},{text});\n".encode("ascii")


def read_script(path: Path) -> Any:
    """Return the value in a file that `make_script` made."""
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])
