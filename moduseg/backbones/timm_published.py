"""Where timm publishes the weights of its models, and where their makers do."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from moduseg.backbones.timm_model import find_pretrained_id
from moduseg.errors import ConfigError, MissingError, MissingWeightsError
from moduseg.weights.hub import fetch_hub_file, get_page_url
from moduseg.weights.sources import find_weights

log = logging.getLogger("moduseg")
MAKERS = {
    "naflexvit_base_patch16_radio_v3": "nvidia/C-RADIOv3-B",
    "naflexvit_large_patch16_radio_v3": "nvidia/C-RADIOv3-L",
    "naflexvit_huge_patch16_radio_v3": "nvidia/C-RADIOv3-H",
    "naflexvit_giant_patch16_radio_v3": "nvidia/C-RADIOv3-g",
    "naflexvit_so400m_patch16_radio_v4": "nvidia/C-RADIOv4-SO400M",
    "naflexvit_huge_patch16_radio_v4": "nvidia/C-RADIOv4-H",
}
"""Repositories of NVIDIA, as timm's list of C-RADIO models names them. timm converts the names of their tensors
(`radio_model.model.*`) when a file is loaded, and drops input conditioner and teachers' heads."""


def fetch_published_file(name: str, revision: str | None, key: str) -> Path:
    """Return the file of timm's published weights of a model, fetched from the hub if it is not on this machine.

    If it cannot be had, the maker's own file is taken where timm can read it, and a warning says so.

    Args:
        name: timm's name, with or without `.tag`.
        revision: branch, tag or commit of timm's repository, and then of no other; what timm names, mostly `main`, if
            omitted.
        key: the configuration key, for messages.

    Raises:
        ConfigError: as `find_pretrained_id` does.
        MissingError, ArtefactError, StorageError: as `moduseg.weights.hub.fetch_hub_file` does.
    """
    import timm

    hub_id, _, named = find_pretrained_id(name).partition("@")
    published = getattr(timm.get_pretrained_cfg(name), "hf_hub_filename", None) or "pytorch_model.bin"
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    preferred = safe.get(published, published.rpartition(".")[0] + ".safetensors")
    names = list(dict.fromkeys([preferred, published]))
    maker = MAKERS.get(name.partition(".")[0]) if revision is None else None
    try:
        return fetch_hub_file(hub_id, names, revision or named or None, key, value="hub")
    except MissingError as error:
        if maker is None:
            raise
        try:
            path = fetch_hub_file(maker, ["model.safetensors"], None, key, value="hub")
        except MissingError:
            address = f"hf://{maker}/model.safetensors"
            message = f"{error}; {address}, the maker's own file, could not be had either"
            find_size = getattr(error, "find_size", None)
            raise MissingWeightsError(message, hub_id, f"https://huggingface.co/{hub_id}", find_size) from error
    log.warning("%s: timm's file of %s could not be had; the maker's own, %s, has its place", key, name, path)
    return path


def find_timm_weights(name: str, weights: str, revision: str | None, key: str) -> Path:
    """Return the weight file of a timm model, fetched if needed.

    Args:
        name: timm's name of the model.
        weights: `hub` for what timm publishes, or what `moduseg.weights.sources.find_weights` takes, with `$VARIABLE`.
        revision: of the hub's repository, for `hub`.
        key: the configuration key, for messages.

    Raises:
        ConfigError: timm publishes no weights of the model, or a malformed address.
        MissingError: a variable that is not set, or a file that is not there and cannot be fetched.
        ArtefactError, StorageError: as `find_weights` does.
    """
    if weights == "hub":
        return fetch_published_file(name, revision, key)
    path = os.path.expandvars(weights)
    if unset := re.search(r"\$\{?(\w+)", path):
        raise MissingError(
            f"{key}: got {weights!r}, but the environment variable {unset[1]} is not set; set it to the path "
            f"of the weights of {name}, or give the path: {key}=<path>{suggest_hub(name, key)}"
        )
    return find_weights(path, key)


def suggest_hub(name: str, key: str) -> str:
    """Return the end of a message about missing weights: where timm publishes them; empty if it does not."""
    try:
        hub_id = find_pretrained_id(name).partition("@")[0]
    except ConfigError:
        return ""
    return f", or {key}=hub to fetch model.safetensors from {get_page_url(hub_id)}"
