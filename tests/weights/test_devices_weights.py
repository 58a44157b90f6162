"""Devices and weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moduseg.devices import resolve_device
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.files import file_digest
from moduseg.weights.sources import find_weights, load_state
from tests.support.bomb import Bomb


def test_auto_finds_a_device_and_its_precision() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device().torch_device.type == expected
    assert resolve_device("cpu").precision == "float32"


@pytest.mark.parametrize(("name", "precision"), [("gpu", "auto"), ("cuda:99", "auto"), ("cpu", "float8")])
def test_unknown_devices_and_precisions_are_refused(name: str, precision: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.(device|precision): got .*; try runtime"):
        resolve_device(name, precision)


def test_autocast_is_on_in_bfloat16_only() -> None:
    a = torch.ones(2, 2)
    with resolve_device("cpu", "float32").autocast():
        assert (a @ a).dtype == torch.float32
    with resolve_device("cpu", "bfloat16").autocast():
        assert (a @ a).dtype == torch.bfloat16


def test_states_are_read_from_both_formats(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert torch.equal(load_state(tmp_path / name)["a"], state["a"])


def test_pickles_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtefactError, match=r"w\.pth"):
        load_state(tmp_path / "w.pth")
    torch.save(Bomb(), tmp_path / "zip.pth")
    with pytest.raises(ArtefactError, match=r"zip\.pth"):
        load_state(tmp_path / "zip.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_weights_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=name):
        load_state(tmp_path / name)


def test_missing_weights_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"backbone\.weights: got 'nowhere/w.safetensors'.*set backbone\.weights"):
        find_weights("nowhere/w.safetensors", "backbone.weights")
    with pytest.raises(MissingError, match="no such file"):
        file_digest(tmp_path / "w")


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = file_digest(path)
    path.write_bytes(b"three")
    assert file_digest(path) != first
