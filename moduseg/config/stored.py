"""A configuration that was stored with an artefact, with some of its values replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moduseg.config.files import compose, from_hydra
from moduseg.config.overrides import PATH_KEYS, describe_unknown, keys_of_group, read_path
from moduseg.config.schemas import Config
from moduseg.errors import ConfigError


def reconfigure(stored: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Return a stored configuration, such as that of a bank, with some of its values replaced.

    Args:
        stored: group -> settings, as `Config.as_dict` gives them.
        overrides: `group.key=value` for a key that the group has, or `group=file` for one of the shipped files. Files
            are applied first, so that a key overrides a file wherever it stands.

    Raises:
        ConfigError: an unknown key or file, a wrong type, or a value out of range.
    """
    content = copy.deepcopy(dict(stored))
    for override in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):
        path, _, text = override.partition("=")
        group, *keys = path.split(".")
        if keys:
            _set_key(content, path, text)
        else:
            content[group] = compose([override]).as_dict()[group]
    return from_hydra(content)


def parse_yaml(text: str) -> Any:
    """Return the value that a piece of YAML holds; the text itself if it cannot be read."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except OmegaConfBaseException:
        return text


def _set_key(content: dict[str, Any], path: str, text: str) -> None:
    """Replace the value of `group.key` or `group.key.key`, which must be there."""
    group, *parents, key = path.split(".")
    settings: Any = content.get(group)
    for parent in parents:
        settings = settings.get(parent) if isinstance(settings, Mapping) else None
    # A bank of an earlier version lacks the keys that a group has gained since.
    allowed = () if parents else keys_of_group(group)
    if not isinstance(settings, dict) or (key not in settings and key not in allowed):
        prefix = path.removesuffix(key)
        names = [f"{prefix}{name}" for name in settings] if isinstance(settings, Mapping) else []
        raise ConfigError(describe_unknown(path, list(dict.fromkeys([*names, *(f"{prefix}{n}" for n in allowed)]))))
    # A file or folder is taken as it is typed.
    is_path = key in PATH_KEYS and not (isinstance(settings.get(key), list) and text.startswith("["))
    settings[key] = read_path(text) if is_path else parse_yaml(text)
