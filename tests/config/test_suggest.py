"""What is suggested for a misspelt name."""

from __future__ import annotations

import pytest

from moduseg.errors import suggest


@pytest.mark.parametrize(("name", "allowed", "expected"), [
    pytest.param("topk", ["top_k", "nms_iou"], "top_k", id="one is close"),
    pytest.param("topk", {"nms_iou": 1, "engine": 2}, None, id="none is close"),
    pytest.param("", [], None, id="nothing is allowed"),
])  # fmt: skip
def test_the_closest_name_is_suggested(name: str, allowed: list[str], expected: str | None) -> None:
    assert suggest(name, allowed) == expected
