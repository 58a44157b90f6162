"""Where timm publishes the weights of its models."""

from __future__ import annotations

from pathlib import Path

from moduseg.backbones.timm_model import pretrained_id
from moduseg.errors import ConfigError
from moduseg.weights.hub import fetch_hub_file, get_page_url


def fetch_published_file(name: str, revision: str | None, key: str) -> Path:
    """The file of timm's published weights of a model, fetched from the hub where it is not here.

    Args:
        name: timm's name, with or without `.tag`.
        revision: branch, tag or commit of the hub's repository; what timm names, mostly `main`, where left out.
        key: the configuration key, for messages.

    Raises:
        ConfigError: see `pretrained_id`.
        MissingError, ArtefactError, StorageError: see `moduseg.weights.hub.fetch_hub_file`.
    """
    import timm

    hub_id, _, named = pretrained_id(name).partition("@")
    given = getattr(timm.get_pretrained_cfg(name), "hf_hub_filename", None) or "pytorch_model.bin"
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    preferred = safe.get(given, given.rpartition(".")[0] + ".safetensors")
    names = list(dict.fromkeys([preferred, given]))
    return fetch_hub_file(hub_id, names, revision or named or None, key, value="hub")


def suggest_hub(name: str, key: str) -> str:
    """The end of a message about weights that are missing: where timm publishes those of a model, if it does."""
    try:
        hub_id = pretrained_id(name).partition("@")[0]
    except ConfigError:
        return ""
    return f", or {key}=hub to fetch model.safetensors from {get_page_url(hub_id)}"
