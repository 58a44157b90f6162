"""Where weights come from, and what identifies them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.files import file_digest
from moduseg.weights.download import fetch
from moduseg.weights.hub import hub_file

__all__ = ["ADDRESSES", "file_digest", "find_weights", "load_state"]

ADDRESSES = ("https://", "http://", "hf://")
"""How names of weights begin that are not on this machine."""


def find_weights(path: str, key: str) -> Path:
    """The file that a configuration's `weights` names, fetched into the cache folder where it has an address.

    Args:
        path: one of
            a path (`~` allowed),
            `miniature/<file>`, which the package carries,
            `https://<host>/<path>/<file>`, with `#sha256=<64 digits>` behind it where the digest is known,
            `hf://<owner>/<name>[@<revision>]/<file>`, a file of the hub; `hf://datasets/<owner>/...` one of a data set.
        key: the configuration key, for the message.

    Raises:
        MissingError: there is no such file or folder, and none can be fetched.
        ConfigError: an address that is none.
        ArtefactError: a file of another digest.
        StorageError: a fetched file cannot be written.
    """
    if path.startswith(("https://", "http://")):
        url, _, fragment = path.partition("#")
        digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
        if fragment and digest is None:
            raise ConfigError(f"{key}: got {path!r}, expected #sha256=<64 hexadecimal digits> behind the address")
        return fetch(url, key, digest[1] if digest else None, path)
    if path.startswith("hf://"):
        named = re.fullmatch(r"hf://((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", path)
        if named is None:
            raise ConfigError(f"{key}: got {path!r}, expected hf://<owner>/<name>@<revision>/<file>")
        return hub_file(named[1], [named[3]], named[2], key, path)
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
