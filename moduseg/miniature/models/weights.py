"""Find, write and read the weights of the miniature models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moduseg.errors import ArtefactError, MissingError

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"
WEIGHTS: dict[str, str] = {"vit": "vit.safetensors", "sam": "sam.safetensors", "clip": "clip", "diffusion": "diffusion"}
"""Name of each miniature model and its file (`clip`, `diffusion`: a directory) inside `WEIGHTS_DIR`."""
_COMPLETE = {"clip": "model.safetensors", "diffusion": "unet/diffusion_pytorch_model.safetensors"}
"""The file that a directory of weights holds if it is complete."""


def weights_path(name: str) -> Path:
    """Return the path of the shipped weights of a miniature model.

    Args:
        name: `"vit"` or `"sam"` (safetensors files), `"clip"` or `"diffusion"` (directories for `from_pretrained`).

    Raises:
        MissingError: an unknown name, or the file is not there.
    """
    if name not in WEIGHTS:
        raise MissingError(f"miniature weights: got {name!r}, expected one of {sorted(WEIGHTS)}; try 'vit'")
    path = WEIGHTS_DIR / WEIGHTS[name]
    complete = path / _COMPLETE[name] if name in _COMPLETE else path
    if not complete.is_file():
        raise MissingError(
            f"miniature weights: got no file at {complete}, expected the shipped weights; "
            f"try `python scripts/train_miniature.py model={name}`, or install the package again"
        )
    return path


def save_weights(state: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as float16 safetensors, to a temporary name that is then renamed.

    Args:
        state: name to tensor; floating tensors are stored as float16, integer ones as they are.
        path: file to write; its folder is made if absent.
        metadata: text stored in the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {
        name: (tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.detach().cpu()).contiguous()
        for name, tensor in state.items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(half, temporary, metadata=dict(metadata or {}))
    temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    temporary.replace(path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill `model` with the tensors of a safetensors file, converted to the model's own dtype.

    Raises:
        MissingError: no such file.
        ArtefactError: names or shapes do not fit the model.
    """
    if not Path(path).is_file():
        raise MissingError(f"weights: got no file at {path}, expected safetensors; try `weights_path('vit')`")
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ArtefactError(
            f"weights {path}: got tensors that do not fit the model, expected those of "
            f"{type(model).__name__}; try the settings it was trained with ({str(error).splitlines()[-1].strip()})"
        ) from error
