"""Image -> the classes that it shows, before anything says where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moduseg.config.construct import build_named
from moduseg.datasets.vocabulary import WordList
from moduseg.devices import Device
from moduseg.taggers.base import Tagger
from moduseg.taggers.clip import ClipTagger, TagClipTagger
from moduseg.taggers.listed import AllTagger, FileTagger, GivenTagger

TAGGERS: dict[str, type[Tagger]] = {
    "all": AllTagger,
    "clip": ClipTagger,
    "file": FileTagger,
    "given": GivenTagger,
    "tagclip": TagClipTagger,
}

__all__ = ["TAGGERS", "Tagger", "build"]


def build(cfg: Mapping[str, Any], device: Device, classes: Sequence[str], vocabulary: WordList | None = None) -> Tagger:
    """Return the tagger that `cfg["name"]` names; no model is loaded.

    Args:
        cfg: its configuration.
        device: where models run.
        classes: class names, background first.
        vocabulary: words of these classes, in place of those that `cfg` names.

    Raises:
        ConfigError: unknown name or key, or a value that the tagger refuses.
    """
    settings = dict(cfg)
    tagger = TAGGERS.get(str(cfg.get("name")))
    if vocabulary is not None and tagger is not None and tagger.takes_words:
        settings |= vocabulary.as_settings()
    return build_named("tagger", TAGGERS, settings, device=device, classes=tuple(classes))
