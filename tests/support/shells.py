"""A shell that a person types into, for tests of completion."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

_SECONDS = 60.0
"""How long a shell may take for an answer; a loaded machine is slow."""
_FINISH = "\x14"
"""Ctrl-T, which the session binds to a widget that prints the line."""


def write_program(path: Path) -> None:
    """Write the program `moduseg` of this environment."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from moduseg.cli import entry; entry()' \"$@\"\n")
    path.chmod(0o755)


def press_tab_in_zsh(line: str, script: Path, programs: Path) -> str:
    """Return what a line becomes when it is typed into an interactive zsh, and the tabulator pressed.

    Args:
        line: what is typed.
        script: the completion script, which the session reads.
        programs: a folder of programs that come before all others.
    """
    process, terminal = pty.fork()
    if not process:
        os.environ.update(TERM="dumb", HOME=str(script.parent), PATH=f"{programs}:{os.environ['PATH']}")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        session = (
            f"PS1='> '; COLUMNS=500; autoload -Uz compinit; compinit -u -D; source {script}",
            'finish() { print -r -- "LINE<$BUFFER>"; }; zle -N finish; bindkey "^T" finish; echo REA""DY',
        )
        for command in session:
            os.write(terminal, f"{command}\n".encode())
        _read_until(terminal, "READY")
        os.write(terminal, f"{line}\t{_FINISH}".encode())
        return _read_until(terminal, r"LINE<(moduseg[^>]*)>")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def _read_until(terminal: int, pattern: str) -> str:
    """Return the last group of a pattern, or all of it, as soon as it is printed."""
    text, end = "", time.monotonic() + _SECONDS
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
            if match := re.search(pattern, text):
                return match[match.lastindex or 0]
    raise TimeoutError(f"zsh: got {text!r}, expected {pattern!r}")
