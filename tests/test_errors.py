"""Messages show what a file holds, and do nothing that it asks for."""

from __future__ import annotations

import pytest

from moduseg.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("got a\0b", r"got a\x00b", id="NUL byte"),
        pytest.param("got \x1b[2Jcleared", r"got \x1b[2Jcleared", id="escape sequence"),
        pytest.param("got Größe \U0001f600", "got Größe \U0001f600", id="other letters stay"),
    ],
)
def test_control_characters_are_written_out(text: str, expected: str) -> None:
    assert str(DataError(text)) == expected
