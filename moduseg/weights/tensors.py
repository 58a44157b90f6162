"""Tensors by name from the weight files that are in use: safetensors, PyTorch, HDF5 as Keras writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moduseg.errors import ArtefactError

HDF5 = (".h5", ".hdf5")
"""Suffixes of HDF5 files."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", *HDF5)
"""Suffixes of the files that `load_state` reads."""


def load_state(path: Path, name: str = "") -> dict[str, Tensor]:
    """Read tensors by name from a weight file, without running code that it contains.

    Args:
        path: a `.safetensors` file; an HDF5 file (`.h5`, `.hdf5`), whose arrays are named by their path inside it
            (`block1/layers/conv2d/vars/0`) and keep their shapes and axes; else a PyTorch file.
        name: of the file, for messages; its path if empty.

    Raises:
        ArtefactError: the file is damaged or holds more than tensors.
    """
    name = name or str(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = _read_hdf5(path) if path.suffix in HDF5 else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ArtefactError(f"{name}: not readable as weights ({error}); fetch the file again") from error
    except Exception as error:  # a pickle raises what it likes (UnpicklingError, KeyError, ...): no plain tensors
        raise ArtefactError(
            f"{name}: holds more than tensors ({type(error).__name__}); convert it to .safetensors"
        ) from error
    if isinstance(state, dict) and set(state) >= {"model"} and isinstance(state["model"], dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtefactError(f"{name}: got {type(state).__name__}, expected tensors by name; convert it to .safetensors")
    return state


def _read_hdf5(path: Path) -> dict[str, Tensor]:
    """Return every array of an HDF5 file by its path inside it.

    Raises:
        TypeError: an array that holds no numbers.
    """
    import h5py

    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, node: h5py.Group | h5py.Dataset) -> None:
        # Links that lead to other files are not followed by `visititems`.
        if isinstance(node, h5py.Dataset):
            arrays[name] = np.asarray(node[()])

    with h5py.File(path, "r") as file:
        file.visititems(collect)
    # PyTorch knows no other byte order than the machine's.
    return {
        name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C")) for name, array in arrays.items()
    }
