"""From configuration to objects: every mistake is one line that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from moduseg.config.construct import build_named, construct
from moduseg.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: got {self.size}, expected >= 1; try 3")


class Thing:
    def __init__(
        self,
        width: int,
        device: str,
        ratio: float = 0.5,
        mode: Literal["a", "b"] = "a",
        scales: tuple[float, ...] = (1.0,),
        path: str | None = None,
        flag: bool = False,
    ) -> None:
        self.values = (width, device, ratio, mode, scales, path, flag)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


def test_a_section_names_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"bank\.inner: got False, expected keys below it: bank\.inner\.size; set"):
        construct(Outer, {"inner": False}, "bank")


def test_values_are_taken_and_widened() -> None:
    thing = build_named(
        "group", {"thing": Thing}, {"name": "thing", "width": 4, "ratio": 1, "scales": [1, 2]}, device="cpu"
    )
    assert thing.values == (4, "cpu", 1.0, "a", (1.0, 2.0), None, False)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "thnig", "width": 1}, r"group\.name: got 'thnig', expected one of thing"),
        ({"name": "thing", "widht": 1}, r"group\.widht: unknown key.*did you mean group\.width"),
        ({"name": "thing"}, r"group\.width: missing"),
        ({"name": "thing", "width": "wide"}, r"group\.width: got 'wide' \(str\), expected a whole number"),
        ({"name": "thing", "width": True}, r"group\.width: got True \(bool\), expected a whole number"),
        ({"name": "thing", "width": 1, "mode": "c"}, r"group\.mode: got 'c'.*one of a, b"),
        ({"name": "thing", "width": 1, "scales": [1, "x"]}, r"group\.scales\[1\]: got 'x'.*a number"),
        ({"name": "thing", "width": 1, "path": 3}, r"group\.path: got 3 \(int\), expected text or null"),
        ({"name": "thing", "width": 1, "device": "cuda"}, r"group\.device: unknown key"),
    ],
)
def test_mistakes_name_the_key(cfg: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_named("group", {"thing": Thing}, cfg, device="cpu")


def test_nested_dataclasses_are_built_and_checked() -> None:
    assert construct(Outer, {"inner": {"size": 5}}, "bank").inner.size == 5
    with pytest.raises(ConfigError, match=r"bank\.inner: size: got 0, expected >= 1"):
        construct(Outer, {"inner": {"size": 0}}, "bank")
    with pytest.raises(ConfigError, match=r"bank\.inner\.sise: unknown key"):
        construct(Outer, {"inner": {"sise": 5}}, "bank")
