"""Captions of the miniature latent diffusion model: the world's own, and prompts as the methods write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moduseg.miniature.models.clip import EXTRA_WORDS
from moduseg.miniature.training.pool import SceneFacts
from moduseg.miniature.world.drawing import STUFF
from moduseg.miniature.world.scenes import CLASSES, describe

PREFIXES: tuple[str, ...] = ("a photo of", "a photograph of", "a picture of", "an image of", "a drawing of", "")


def write_prompt(facts: SceneFacts, rng: np.random.Generator) -> str:
    """Write a text for what a picture shows.

    Args:
        facts: class of each object, and names of the background textures.
        rng: decides the kind of the text and its wording.

    Returns:
        For one in two a caption of the world, else every class once in random order, after a prefix, with or without
        the textures: `"a photo of a red disc and a blue ring and grass"`.
    """
    classes, stuff = facts
    if rng.random() < 0.5:
        return describe(classes, stuff, rng) + ("." if rng.random() < 0.3 else "")
    names = [CLASSES[int(number)] for number in rng.permutation(sorted(set(classes)))]
    article = "a " if rng.random() < 0.7 else ""
    objects = [article + name for name in names]
    textures = [stuff[int(i)] for i in rng.permutation(len(stuff))] if rng.random() < 0.5 else []
    if rng.random() < 0.2:
        objects.append("other object and background")
    separator = " and " if rng.random() < 0.6 else ", "
    prefix = PREFIXES[int(rng.integers(len(PREFIXES)))]
    return f"{prefix} {separator.join([*objects, *textures])}".strip()


def draw_objects(rng: np.random.Generator) -> SceneFacts:
    """Draw what a picture could show: one to five objects, up to three textures; sometimes any word as a texture."""
    classes = tuple(int(number) for number in rng.integers(1, len(CLASSES), size=int(rng.integers(1, 6))))
    words: Sequence[str] = STUFF if rng.random() < 0.7 else (*STUFF, *EXTRA_WORDS)
    chosen = rng.permutation(len(words))[: int(rng.integers(0, 4))]
    return classes, tuple(words[int(i)] for i in chosen)
