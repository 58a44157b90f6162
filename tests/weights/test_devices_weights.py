"""Devices and weights."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moduseg.devices import Device, copy_arrays, resolve_device
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.files import file_digest
from moduseg.weights.sources import find_weights
from moduseg.weights.tensors import load_state
from tests.support.bomb import Bomb
from tests.support.pretend_cuda import CUDA, pretend_cuda


def test_auto_finds_a_device_and_its_precision() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device().torch_device.type == expected
    assert resolve_device("cpu").precision == "float32"


@pytest.mark.parametrize(("name", "precision"), [("gpu", "auto"), ("cuda:99", "auto"), ("cpu", "float8")])
def test_unknown_devices_and_precisions_are_refused(name: str, precision: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.(device|precision): got .*; try runtime"):
        resolve_device(name, precision)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("cuda:0", "bfloat16", id="Ampere"),
        pytest.param("cuda:1", "float32", id="Turing would emulate it"),
        pytest.param("cuda", "float32", id="the GPU of the second rank"),
    ],
)
def test_bfloat16_is_taken_where_the_device_has_it(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(8, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device(name).precision == precision


def test_autocast_is_on_in_bfloat16_only() -> None:
    a = torch.ones(2, 2)
    with resolve_device("cpu", "float32").autocast():
        assert (a @ a).dtype == torch.float32
    with resolve_device("cpu", "bfloat16").autocast():
        assert (a @ a).dtype == torch.bfloat16


def read_tf32() -> tuple[bool, bool]:
    """Whether matrix products and convolutions on CUDA may round to TF32."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[(False, True), (True, True), (False, False)], ids=["as PyTorch starts", "all on", "all off"])
def switches(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """What the program that uses this package has set."""
    before = read_tf32()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("device", "precision", "expected"), [
    pytest.param(CUDA, "float32", (False, False), id="float32 is not rounded"),
    pytest.param(CUDA, "tf32", (True, True), id="tf32 is"),
    pytest.param(CUDA, "bfloat16", None, id="lower precisions leave the switches alone"),
    pytest.param(torch.device("cpu"), "float32", None, id="other devices as well"),
])  # fmt: skip
def test_tf32_is_set_within_a_pass_and_restored(
    device: torch.device, precision: str, expected: tuple[bool, bool] | None, switches: tuple[bool, bool]
) -> None:
    made = Device(device, precision)
    for context in (made.run_uncast, made.hold_tf32, *([made.autocast] if precision != "bfloat16" else [])):
        with context():
            assert read_tf32() == (expected or switches)
            with context():
                assert read_tf32() == (expected or switches)
            assert read_tf32() == (expected or switches)
        assert read_tf32() == switches
    with pytest.raises(KeyError), made.run_uncast():
        raise KeyError
    assert read_tf32() == switches


def test_newer_names_of_precisions_are_restored() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no names for precisions")
    before = matmul.fp32_precision, conv.fp32_precision
    for precision in ("float32", "tf32"):
        with Device(CUDA, precision).hold_tf32():
            expected = "ieee" if precision == "float32" else "tf32"
            assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)
        assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_passes_of_several_threads_share_the_switches(switches: tuple[bool, bool]) -> None:
    """A pass that ends while another runs does not switch TF32 on for it."""
    first_is_in, first_may_leave = threading.Event(), threading.Event()

    def run_first() -> None:
        with Device(CUDA, "float32").hold_tf32():
            first_is_in.set()
            first_may_leave.wait(30)

    thread = threading.Thread(target=run_first)
    thread.start()
    assert first_is_in.wait(30)
    with Device(CUDA, "float32").hold_tf32(), Device(CUDA, "tf32").hold_tf32():
        first_may_leave.set()
        thread.join()
        assert read_tf32() == (False, False)
    assert read_tf32() == switches


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.precision: got tf32 on cpu, expected it on cuda only; try"):
        resolve_device("cpu", "tf32")


def test_arrays_of_a_batch_are_copied_at_once(rng: np.random.Generator) -> None:
    """From another order of axes, a part of a larger array, and memory that cannot be written."""
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((4, 5, 3), (7, 9), (6, 2))]
    views = [arrays[0].transpose(1, 0, 2), arrays[1][:, ::-2], arrays[2]]
    views[2].flags.writeable = False
    with pretend_cuda() as log:
        copied = copy_arrays(views, CUDA)
        on_host = [tensor.cpu() for tensor in copied]
    assert log.copies_by_function() == {"devices.py:copy_arrays": 1}
    for tensor, host, view in zip(copied, on_host, views, strict=True):
        assert tensor.device == CUDA
        assert np.array_equal(host.numpy(), view)
    for tensor, view in zip(copy_arrays(views, torch.device("cpu")), views, strict=True):
        assert np.array_equal(tensor.numpy(), view)
        assert not np.shares_memory(tensor.numpy(), view)


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
