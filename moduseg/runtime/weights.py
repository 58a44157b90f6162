"""Where weights come from, and what identifies them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moduseg.errors import ArtefactError, MissingError


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal; read once for each size and modification time.

    Raises:
        MissingError: there is no such file.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such file; check the path")
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def find_weights(path: str, key: str) -> Path:
    """The file that a configuration's `weights` names.

    Args:
        path: a path (`~` allowed), or `miniature/<file>` for one that the package carries.
        key: the configuration key, for the message.

    Raises:
        MissingError: there is no such file or folder.
    """
    if path.startswith("miniature/"):
        found = Path(__file__).parent.parent / "miniature" / "weights" / path.removeprefix("miniature/")
    else:
        found = Path(path).expanduser()
    if not found.exists():
        raise MissingError(f"{key}: got {path!r}, no such file; set {key}=<path of the weights>")
    return found


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` file, or from a PyTorch file without running anything it contains.

    Raises:
        ArtefactError: the file is damaged or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ArtefactError(f"{path}: not readable as weights ({error}); fetch the file again") from error
    except Exception as error:  # pickle.UnpicklingError and its kin, all of which mean "not plain tensors"
        raise ArtefactError(
            f"{path}: holds more than tensors ({type(error).__name__}); convert it to .safetensors"
        ) from error
    if isinstance(state, dict) and set(state) >= {"model"} and isinstance(state["model"], dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtefactError(f"{path}: got {type(state).__name__}, expected tensors by name; convert it to .safetensors")
    return state
