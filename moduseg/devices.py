"""The device that models run on, and their precision."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moduseg.clock import model_pass
from moduseg.errors import ConfigError

PRECISIONS = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
MAX_AUTO_WORKERS = 4
"""More threads than this are only taken if the configuration says so."""

_seeding = threading.Lock()


@contextmanager
def seed_weights(seed: int) -> Iterator[None]:
    """Draw the random weights of a model from a seed; the caller's random state does not change.

    Threads wait for each other: they share one random state.
    """
    # Only the CPU's generator draws weights; seeding it alone leaves the others untouched.
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Device:
    """A device, and the precision of model forward passes on it.

    Attributes:
        torch_device: the device itself.
        precision: only model forward passes are cast, never what follows them. `float32`; `tf32`, which is float32
            whose products a CUDA device rounds to 10 bits of mantissa; `bfloat16` or `float16`.
    """

    torch_device: torch.device
    precision: str = "float32"

    def key_parts(self) -> dict[str, str]:
        """Return the part of a key that stands for the device: the precision, and the kind unless it is the CPU."""
        kind = self.torch_device.type
        return {"precision": self.precision} if kind == "cpu" else {"precision": self.precision, "device": kind}

    def with_precision(self, precision: str | None) -> Device:
        """Return this device with the precision that a preset names for its model; only CUDA follows presets.

        Args:
            precision: a key of `PRECISIONS`; `None` keeps the device's own.
        """
        # Published models ran in half precision on GPUs, where it is fast; on a CPU it would be slower than float32.
        if precision is None or self.torch_device.type != "cuda":
            return self
        return replace(self, precision=precision)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run a model's forward pass in this precision, and count its seconds (`moduseg.clock`)."""
        dtype = PRECISIONS[self.precision]
        cast = nullcontext() if dtype is None else torch.autocast(self.torch_device.type, dtype=dtype)
        with self.run_uncast(), cast:
            yield

    @contextmanager
    def run_uncast(self) -> Iterator[None]:
        """Run a part of a model that stays in float32 in every precision, and count its seconds."""
        with model_pass(self.torch_device), self.hold_tf32():
            yield

    def hold_tf32(self) -> AbstractContextManager[None]:
        """Keep PyTorch's TF32 off inside under `float32`, on under `tf32`, as it is under lower precisions.

        Unless it is told otherwise, PyTorch rounds what goes into a CUDA device's convolutions.
        """
        if self.torch_device.type != "cuda" or PRECISIONS[self.precision] is not None:
            return nullcontext()
        return _tf32.hold(self.precision == "tf32")


def _computes_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA device multiplies in bfloat16 itself; emulated, it is slower than float32."""
    # PyTorch's own function answers for the current device, which may be another one.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


class _Tf32:
    """PyTorch's switches for TF32, which are the process's: set while a pass needs them, then as they were.

    Passes may overlap in several threads. While any of them is in float32, TF32 is off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_passes = {True: 0, False: 0}
        self._before: tuple[Any, ...] = ()

    @contextmanager
    def hold(self, is_allowed: bool) -> Iterator[None]:
        """Keep the switches on or off in a pass."""
        self._change(is_allowed, 1)
        try:
            yield
        finally:
            self._change(is_allowed, -1)

    def _change(self, is_allowed: bool, step: int) -> None:
        with self._lock:
            if not any(self._num_passes.values()):
                self._before = _read_tf32()
            self._num_passes[is_allowed] += step
            if any(self._num_passes.values()):
                is_on = not self._num_passes[False]
                _allow_tf32(is_on, is_on)
            else:
                _restore_tf32(self._before)


_tf32 = _Tf32()


def _read_tf32() -> tuple[Any, ...]:
    """Return the state of PyTorch's switches: matrix products first, convolutions second."""
    switches = _list_switches()
    if switches:
        return tuple(switch.fp32_precision for switch in switches)
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _list_switches() -> list[Any]:
    """List the switches of newer versions, which hold names of precisions; the older switches are a view of them."""
    matmul = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    return [matmul, cudnn.conv, cudnn.rnn] if hasattr(matmul, "fp32_precision") else []


def _allow_tf32(in_products: bool, in_convolutions: bool) -> None:
    """Set the older switches, which every version has, so that the newer ones agree with them."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = in_products, in_convolutions
    if not in_convolutions:
        # Switched off, convolutions would follow the precision of the whole process, which may be TF32.
        for switch in _list_switches()[1:]:
            switch.fp32_precision = "ieee"


def _restore_tf32(state: tuple[Any, ...]) -> None:
    """Set the switches to what `_read_tf32` returned."""
    _allow_tf32(*(value in (True, "tf32") for value in state[:2]))
    for switch, precision in zip(_list_switches(), state, strict=False):
        switch.fp32_precision = precision


def count_workers(configured: int = 0) -> int:
    """Return how many threads work: as many as configured; for 0, one a core and at most `MAX_AUTO_WORKERS`."""
    return configured or min(MAX_AUTO_WORKERS, os.cpu_count() or 1)


def resolve_device(name: str = "auto", precision: str = "auto") -> Device:
    """Return the device that `runtime.device` and `runtime.precision` name.

    Args:
        name: `auto` (CUDA, then MPS, then CPU), `cpu`, `mps`, `cuda` or `cuda:N`. If torchrun started several processes
            on a machine, `auto` and `cuda` are the GPU of this process.
        precision: `auto` is bfloat16 on a CUDA device that has it and float32 elsewhere.

    Raises:
        ConfigError: an unknown name, a device that is not present, or `tf32` on one that has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"runtime.device: got {name!r}, expected auto, cpu, mps, cuda or cuda:N; try runtime.device=auto"
        ) from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise ConfigError(f"runtime.device: got {name!r}, which is not present here; try runtime.device=auto")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and _computes_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise ConfigError(
            f"runtime.precision: got {precision!r}, expected auto, {', '.join(PRECISIONS)}; try runtime.precision=auto"
        )
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"runtime.precision: got tf32 on {device.type}, expected it on cuda only; try runtime.precision=float32"
        )
    return Device(device, precision)


def copy_arrays(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy arrays of bytes to a device; to a CUDA device all at once, without waiting for it.

    Args:
        arrays: uint8, of any shapes and strides; the tensors share no memory with them.
        device: where the tensors are.

    Returns:
        The arrays as contiguous uint8 tensors, in their order; on CUDA views of one tensor.
    """
    if device.type != "cuda":
        return [torch.from_numpy(np.array(array, order="C")).to(device) for array in arrays]
    # Only from pinned memory does a copy go on while the host prepares the next batch.
    packed = torch.empty(sum(array.size for array in arrays), dtype=torch.uint8, pin_memory=True)
    sizes = [array.size for array in arrays]
    for part, array in zip(packed.split(sizes), arrays, strict=True):
        part.numpy().reshape(array.shape)[...] = array
    on_device = packed.to(device, non_blocking=True).split(sizes)
    return [part.view(array.shape) for part, array in zip(on_device, arrays, strict=True)]
