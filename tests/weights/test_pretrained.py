"""Models of transformers by the architecture that their configuration names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moduseg.errors import ArtefactError
from moduseg.weights.pretrained import Pretrained


@pytest.fixture
def source(tmp_path: Path) -> Pretrained:
    """A directory whose files name an architecture and hold no weights."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    return Pretrained(str(tmp_path), None, "group.weights", "model")


@pytest.mark.parametrize(("classes", "message"), [
    pytest.param({"sam": "SamModel"}, r"names model_type 'clip', expected one of sam; check group\.weights, or try it",
                 id="another architecture"),
    pytest.param({"clip": "NoSuchModel"}, r"group\.weights: transformers \S+ has no NoSuchModel.*; upgrade it",
                 id="transformers lacks the class"),
    pytest.param({"clip": "CLIPModel"}, r"not readable as a model \(.*\); fetch the files again", id="damaged weights"),
])  # fmt: skip
def test_a_model_that_cannot_be_loaded(source: Pretrained, classes: dict[str, str], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        source.load_by_type(classes, "try it")


def test_weights_need_a_name() -> None:
    with pytest.raises(ValueError, match="weights: got an empty text"):
        Pretrained("", None, "group.weights", "model")
