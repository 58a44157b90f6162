"""The device that models run on, and their precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from moduseg.clock import model_pass
from moduseg.errors import ConfigError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A device, and the precision of model forward passes on it.

    Attributes:
        torch_device: the device itself.
        precision: `float32`, `bfloat16` or `float16`; only model forward passes are cast, never what follows them.
    """

    torch_device: torch.device
    precision: str = "float32"

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run a model's forward pass in this precision, and count its seconds (`moduseg.clock`)."""
        dtype = PRECISIONS[self.precision]
        cast = nullcontext() if dtype is None else torch.autocast(self.torch_device.type, dtype=dtype)
        with model_pass(self.torch_device), cast:
            yield


def resolve_device(name: str = "auto", precision: str = "auto") -> Device:
    """Return the device that `runtime.device` and `runtime.precision` name.

    Args:
        name: `auto` (CUDA, then MPS, then CPU), `cpu`, `mps`, `cuda` or `cuda:N`. If torchrun started several processes
            on a machine, `auto` and `cuda` are the GPU of this process.
        precision: `auto` is bfloat16 on a CUDA device that has it and float32 elsewhere.

    Raises:
        ConfigError: an unknown name, or a device that is not present.
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
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision not in PRECISIONS:
        raise ConfigError(
            f"runtime.precision: got {precision!r}, expected auto, {', '.join(PRECISIONS)}; try runtime.precision=auto"
        )
    return Device(device, precision)
