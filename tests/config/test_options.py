"""Backends whose settings are one dataclass are filled from the same flat keys, with the same messages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moduseg.config.construct import build_named
from moduseg.errors import ConfigError


@dataclass(frozen=True)
class _Settings:
    size: int = 8
    name_of_model: str = "small"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: got {self.size}, expected 1 or more; try 8")


class _Backend:
    def __init__(self, options: _Settings, device: str) -> None:
        self.options, self.device = options, device


def _build(**keys: object) -> _Backend:
    return build_named("proposer", {"it": _Backend}, {"name": "it", **keys}, device="cpu", classes=("background",))


def test_flat_keys_fill_the_options() -> None:
    backend = _build(size=3)
    assert (backend.options, backend.device) == (_Settings(3), "cpu")


@pytest.mark.parametrize(("keys", "message"), [
    pytest.param({"sise": 3}, r"proposer\.sise: unknown key.*did you mean proposer\.size\?", id="unknown key"),
    pytest.param({"size": "3"}, r"proposer\.size: got '3' \(str\), expected a whole number", id="wrong type"),
    pytest.param({"size": 0}, r"proposer: size: got 0, expected 1 or more", id="out of range"),
])  # fmt: skip
def test_a_wrong_option_names_its_key(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _build(**keys)
