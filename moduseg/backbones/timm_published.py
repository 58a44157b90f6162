"""Where timm publishes the weights of its models."""

from __future__ import annotations

from pathlib import Path

from moduseg.backbones.timm_model import find_pretrained_id
from moduseg.errors import ConfigError
from moduseg.weights.hub import fetch_hub_file, get_page_url


def fetch_published_file(name: str, revision: str | None, key: str) -> Path:
    """Return the file of timm's published weights of a model, fetched from the hub if it is not on this machine.

    Args:
        name: timm's name, with or without `.tag`.
        revision: branch, tag or commit of the hub's repository; what timm names, mostly `main`, if omitted.
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
    return fetch_hub_file(hub_id, names, revision or named or None, key, value="hub")


def suggest_hub(name: str, key: str) -> str:
    """Return the end of a message about missing weights: where timm publishes them; empty if it does not."""
    try:
        hub_id = find_pretrained_id(name).partition("@")[0]
    except ConfigError:
        return ""
    return f", or {key}=hub to fetch model.safetensors from {get_page_url(hub_id)}"
