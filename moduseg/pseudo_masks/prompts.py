"""Texts that CLIP compares with patches: prompt templates, class words, background words (docs/method.md, CorrCLIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moduseg.miniature.models.clip import PROMPT_TEMPLATES
from moduseg.miniature.world.drawing import STUFF

IMAGENET_TEMPLATES: tuple[str, ...] = (
    "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a photo of the hard to see {}.",
    "a low resolution photo of the {}.", "a rendering of a {}.", "graffiti of a {}.", "a bad photo of the {}.",
    "a cropped photo of the {}.", "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}.",
    "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.", "a dark photo of the {}.",
    "a drawing of a {}.", "a photo of my {}.", "the plastic {}.", "a photo of the cool {}.",
    "a close-up photo of a {}.", "a black and white photo of the {}.", "a painting of the {}.", "a painting of a {}.",
    "a pixelated photo of the {}.", "a sculpture of the {}.", "a bright photo of the {}.", "a cropped photo of a {}.",
    "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}.", "a blurry photo of the {}.",
    "a photo of the {}.", "a good photo of the {}.", "a rendering of the {}.", "a {} in a video game.",
    "a photo of one {}.", "a doodle of a {}.", "a close-up photo of the {}.", "a photo of a {}.",
    "the origami {}.", "the {} in a video game.", "a sketch of a {}.", "a doodle of the {}.",
    "a origami {}.", "a low resolution photo of a {}.", "the toy {}.", "a rendition of the {}.",
    "a photo of the clean {}.", "a photo of a large {}.", "a rendition of a {}.", "a photo of a nice {}.",
    "a photo of a weird {}.", "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.",
    "a sketch of the {}.", "a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.",
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.",
    "a photo of the small {}.", "a photo of the weird {}.", "the cartoon {}.", "art of the {}.",
    "a drawing of the {}.", "a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.",
    "a dark photo of a {}.", "itap of a {}.", "graffiti of the {}.", "a toy {}.",
    "itap of my {}.", "a photo of a cool {}.", "a photo of a small {}.", "a tattoo of the {}.",
)  # fmt: skip
"""The 80 wordings with which CLIP was evaluated on ImageNet (Radford et al., 2021)."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "imagenet": IMAGENET_TEMPLATES,
    "miniature": PROMPT_TEMPLATES,
    "single": ("a photo of a {}.",),
}

_TERRAIN = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge",
)  # fmt: skip
_SCENERY = ("sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk")
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "voc": (
        *_SCENERY, "bed", "building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain",
        "stair", "floor", "hill", "rail", "fence",
    ),
    "coco": (*_SCENERY, "building", "cloud", "floor", "hill", "rail"),
    "coco_open": (*_SCENERY, "bed", "building", "cloud", "floor", "hill", "rail"),
    "clip_es_voc": (*_TERRAIN, "keyboard", "sign"),
    "clip_es_coco": _TERRAIN,
    "miniature": STUFF,
    "none": (),
}  # fmt: skip
"""Words for what a background shows, by data set; `clip_es_*` are those of CLIP-ES and TagCLIP; `none` is for ADE20K
and Cityscapes, which have no background."""

_PERSON = (
    "person", "person in shirt", "person in jeans", "person in dress", "person in sweater", "person in skirt",
    "person in jacket",
)  # fmt: skip
CLASS_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "names": {},
    "voc": {"boat": ("ship",), "diningtable": ("table",), "person": ("people",)},
    "voc_spaced": {"diningtable": ("dining table",), "pottedplant": ("potted plant",), "tvmonitor": ("tv monitor",)},
    "coco": {"person": ("people",)},
    "voc_open": {"boat": ("ship",), "diningtable": ("table",)},
    "voc_phrases": {
        "boat": ("ship",), "diningtable": ("table",), "person": _PERSON,
        "tvmonitor": ("television monitor", "tv monitor", "monitor", "television", "screen"),
    },
    "coco_phrases": {"person": (*_PERSON, "body")},
    "ade20k": {
        "windowpane": ("window",), "earth": ("ground",), "base": ("pedestal",), "signboard": ("sign",),
        "grandstand": ("grandstand", "covered stand"), "case": ("display case", "showcase"), "blind": ("window blind",),
        "hovel": ("hut", "shack"), "light": ("light source",),
        "television receiver": ("television",), "apparel": ("clothes",), "bannister": ("banister",),
        "buffet": ("sideboard",), "conveyer belt": ("conveyor belt",), "washer": ("washing machine",),
        "plaything": ("toy",), "minibike": ("motorbike",), "tank": ("storage tank",), "trade name": ("brand name",),
        "screen": ("projection screen",), "hood": ("exhaust hood",), "ashcan": ("trash can",),
    },
    "cityscapes": {"vegetation": ("tree", "hedge", "vegetation"), "terrain": ("grass", "soil", "terrain")},
}  # fmt: skip
"""Words that stand for a class in place of its official name, by data set; `names` has none. VOC's and COCO's are the
paper's, `*_phrases` those of SCLIP and NACLIP, `voc_open` those of ClearCLIP and ProxyCLIP; those of ADE20K (plainer
names of the same thing) and Cityscapes (what its definitions name) are our own, and so is `voc_spaced`, the official
names as they are spoken."""


def resolve_templates(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return a preset's templates, or the caller's own.

    Raises:
        ValueError: an unknown preset, no template, or one without `{}`.
    """
    chosen = _resolve_preset("templates", value, TEMPLATES)
    if not chosen or any(template.count("{}") != 1 for template in chosen):
        raise ValueError(f"templates: got {list(chosen)}, expected sentences with one {{}} each; try imagenet")
    return chosen


def resolve_background_words(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return a preset's background words, or the caller's own; there may be none.

    Raises:
        ValueError: an unknown preset, or an empty word.
    """
    chosen = _resolve_preset("background_words", value, BACKGROUND_WORDS)
    if not all(chosen):
        raise ValueError(f"background_words: got {list(chosen)}, expected words; remove the empty ones")
    return chosen


def resolve_class_words(
    value: str | Mapping[str, str | Sequence[str]] | None, classes: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the words of each foreground class, in the order of ids.

    Args:
        value: a preset, or a mapping from class names to a word or several; a class that is not in it goes by its name,
            underscores read as spaces. `None` is the preset `names`.
        classes: class names, background first.

    Raises:
        ValueError: an unknown preset, a name that is no class, or a class without a word.
    """
    if isinstance(value, str) or value is None:
        # A preset lists what differs; it serves data sets with some of its classes as well.
        words_by_class: Mapping[str, str | Sequence[str]] = CLASS_WORDS[
            _check_preset("class_words", value or "names", CLASS_WORDS)
        ]
    else:
        words_by_class = value
        if unknown := [name for name in words_by_class if name not in classes[1:]]:
            raise ValueError(
                f"class_words: got {unknown[0]!r}, which is no class; expected some of {', '.join(classes[1:])}"
            )
    words = []
    for name in classes[1:]:
        chosen = words_by_class.get(name, name.replace("_", " "))
        chosen = (chosen,) if isinstance(chosen, str) else tuple(chosen)
        if not chosen or not all(isinstance(word, str) and word for word in chosen):
            raise ValueError(f"class_words: got {list(chosen)} for {name!r}, expected one word or more")
        words.append(chosen)
    return tuple(words)


def _resolve_preset(name: str, value: str | Sequence[str], presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the preset that `value` names, or `value` itself."""
    return presets[_check_preset(name, value, presets)] if isinstance(value, str) else tuple(value)


def _check_preset(name: str, value: str, presets: Mapping[str, object]) -> str:
    """Return the name of a preset, which has to exist; `name` is that of the setting, for messages."""
    if value not in presets:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(presets)}, or your own")
    return value
