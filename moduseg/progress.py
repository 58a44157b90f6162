"""How far a long step is: a bar on a terminal, and in a log file a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

Entry = TypeVar("Entry")
LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts the finished parts of one step, and shows them on stderr with the time that is left.

    Args:
        total: number of parts; `None` if it is not known.
        title: of the step.
        unit: what one part is.
        num_done: parts that were done before; they do not count for the speed.
        is_quiet: whether another process shows the progress.
    """

    def __init__(
        self, total: int | None, title: str, *, unit: str = "img", num_done: int = 0, is_quiet: bool = False
    ) -> None:
        self.total, self.title, self.unit, self.num_done = total, title, unit, num_done
        self._first_done = num_done
        self._is_quiet = is_quiet
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not is_quiet:
            self._bar = tqdm(total=total, initial=num_done, desc=title, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count finished parts."""
        self.num_done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._is_quiet and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self.describe(), file=sys.stderr, flush=True)

    def rename(self, title: str) -> None:
        """Change the title, which may say more than the name of the step: its latest loss."""
        self.title = title
        if self._bar is not None:
            self._bar.set_description(title, refresh=False)

    def describe(self) -> str:
        """Return how far the step is, how fast, and how long the rest of it takes."""
        speed = (self.num_done - self._first_done) / max(time.monotonic() - self._start, 1e-9)
        counted = f"{self.num_done}" if self.total is None else f"{self.num_done} of {self.total}"
        rate = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        text = f"{self.title}: {counted} {self.unit}, {rate} {self.unit}/s"
        if self.total is None or not speed:
            return text
        return f"{text}, {format_seconds((self.total - self.num_done) / speed)} left"


def track(entries: Iterable[Entry], title: str, total: int | None = None, unit: str = "img") -> Iterator[Entry]:
    """Yield the entries, and show how many are done.

    Args:
        entries: what is gone through.
        title: of the step.
        total: number of entries; their length if omitted and known.
        unit: what one entry is.
    """
    if total is None and isinstance(entries, Sized):
        total = len(entries)
    with Progress(total, title, unit=unit) as progress:
        for entry in entries:
            yield entry
            progress.update()


def format_seconds(seconds: float) -> str:
    """Return a time in the largest two units: `2 h 05 min`, `3 min 20 s`, `41 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
