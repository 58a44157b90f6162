"""Reading JSON that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg.errors import ArtefactError
from moduseg.files import read_json


@pytest.mark.parametrize("text", ["", '{"a": 1', "[" * 100_000, '{"a":' * 100_000])
def test_damaged_json_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=r"bank\.json: not readable as JSON .*; remove the folder") as raised:
        read_json(path)
    assert "\n" not in str(raised.value)
