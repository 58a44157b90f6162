"""Progress of long steps in a log file: a line every 30 seconds, with the time that is left."""

from __future__ import annotations

import pytest

from moduseg import progress
from moduseg.progress import Progress, format_seconds, track


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of a clock that tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_every_30_seconds(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(100), "fit"):
        seconds[0] += 10.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fit: 3 of 100 img, 0.1 img/s, 16 min 10 s left"
    assert len(lines) == 33


def test_work_of_earlier_runs_does_not_count(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, "propose", num_done=60) as bar:
        seconds[0] = 40.0
        bar.update(20)
    assert capsys.readouterr().err == "propose: 80 of 100 img, 0.5 img/s, 40 s left\n"


def test_short_steps_and_other_ranks_say_nothing(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("ab"), "short")) == ["a", "b"]
    with Progress(100, "propose", is_quiet=True) as bar:
        seconds[0] = 100.0
        bar.update()
    assert capsys.readouterr().err == ""


def test_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track([1, 2], "propose")) == [1, 2]
    assert "propose" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [
    pytest.param(41.4, "41 s", id="seconds"),
    pytest.param(200, "3 min 20 s", id="minutes"),
    pytest.param(7500, "2 h 05 min", id="hours"),
])  # fmt: skip
def test_times_have_two_units(value: float, text: str) -> None:
    assert format_seconds(value) == text
