"""The presets of the open-vocabulary protocols against the published settings, typed once more."""

from __future__ import annotations

from typing import Any

import pytest

from moduseg.config import compose, config_dir
from moduseg.datasets import build

SETS = {
    "voc21": ("voc", 20, True), "voc20": ("voc20", 20, False), "context60": ("context60", 59, True),
    "context59": ("context59", 59, False), "coco_object": ("coco_object", 80, True),
    "coco_stuff": ("coco_stuff", 171, False), "cityscapes": ("cityscapes", 19, False), "ade20k": ("ade20k", 150, False),
}  # fmt: skip
"""Name of the data set, number of classes, and whether the background is one."""
METHODS = ("sclip", "clearclip", "naclip", "proxyclip", "corrclip")
SHORT_SIDES = {
    "sclip": {"coco_stuff": 448, "cityscapes": 560}, "clearclip": dict.fromkeys(SETS, 448),
    "naclip": {"cityscapes": 560},
    "proxyclip": {"ade20k": 448, "cityscapes": 448}, "corrclip": {"ade20k": 448, "cityscapes": 448},
}  # fmt: skip
"""Where they are not 336."""
WINDOWS = {
    "sclip": (224, 112), "clearclip": (448, 224), "naclip": (224, 112), "proxyclip": (336, 112),
    "corrclip": (336, 112),
}  # fmt: skip
OTHER_WINDOWS = {
    ("clearclip", "cityscapes"): (224, 224), ("proxyclip", "cityscapes"): (224, 112),
    ("corrclip", "cityscapes"): (224, 112), ("naclip", "voc21"): (None, 112), ("naclip", "voc20"): (None, 112),
}  # fmt: skip
SCALES = {("sclip", "voc21"): 65, ("sclip", "context60"): 50, ("sclip", "coco_object"): 50}
THRESHOLDS = {
    "sclip": (0.1, 0.1, 0.1), "clearclip": (0.5, 0.15, 0.4), "naclip": (0.1, 0.1, 0.1), "proxyclip": (0.2, 0.15, 0.25),
    "corrclip": (0.2, 0.15, 0.25),
}  # fmt: skip
"""Of VOC21, PC60 and COCO-Object; no other set has a background to give way to."""
NUM_BACKGROUND_WORDS = {
    "sclip": (26, 1, 26), "clearclip": (1, 1, 1), "naclip": (26, 1, 26), "proxyclip": (26, 1, 17),
    "corrclip": (26, 1, 16),
}  # fmt: skip
PERSONS = {
    "sclip": (7, 8), "clearclip": (1, 1), "naclip": (7, 8), "proxyclip": (1, 1), "corrclip": (1, 1),
}  # fmt: skip
"""Words for a person in VOC and in COCO-Object."""


def compose_preset(name: str) -> Any:
    return compose([f"protocol={name}"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETS)
def test_presets_have_the_published_settings(name: str, method: str) -> None:
    from moduseg.pseudo_masks.prompts import resolve_background_words, resolve_class_words

    cfg = compose_preset(f"{name}_{method}")
    settings, generator = cfg.pseudo_masks, cfg.pseudo_masks.generator
    dataset = build(cfg.dataset, "val")
    assert (dataset.name, dataset.num_classes, dataset.has_background) == SETS[name]
    assert generator["short_side"] == SHORT_SIDES[method].get(name, 336)
    window = OTHER_WINDOWS.get((method, name), WINDOWS[method])
    assert (generator["window"], generator["stride"]) == window
    assert generator["padding"] == {"clearclip": 16, "proxyclip": 56, "corrclip": 56}.get(method, 0)
    assert generator["logit_scale"] == SCALES.get((method, name), 50 if method == "clearclip" else 40)
    assert (generator["long_side"], generator["resampling"], generator["templates"]) == (2048, "linear", "imagenet")
    assert generator.get("variant", generator["name"]) == method
    # Class 0: its words, and the threshold below which it wins.
    words = resolve_background_words(generator["background_words"])
    with_background = ("voc21", "context60", "coco_object")
    index = with_background.index(name) if name in with_background else None
    assert len(words) == (0 if index is None else NUM_BACKGROUND_WORDS[method][index])
    assert settings.background.rule == "probability"
    assert settings.background.value == (0 if index is None else THRESHOLDS[method][index])
    # Refinement.
    assert settings.refine == ("region_vote" if method == "corrclip" else "none")
    assert settings.min_class_share == (0.1 if (method, name) == ("sclip", "voc21") else 0)
    # Names.
    class_words = dict(
        zip(dataset.classes[1:], resolve_class_words(generator["class_words"], dataset.classes), strict=True)
    )
    if name in ("voc21", "voc20"):
        assert (class_words["boat"], class_words["diningtable"]) == (("ship",), ("table",))
        assert len(class_words["person"]) == PERSONS[method][0]
        assert len(class_words["tvmonitor"]) == (5 if method in ("sclip", "naclip") else 1)
    if name == "coco_object":
        assert len(class_words["person"]) == PERSONS[method][1]
    if method == "corrclip" and name in ("voc21", "voc20", "coco_object"):
        assert class_words["person"] == ("people",)
    if method == "proxyclip":
        assert cfg.backbone["model"] == "vit_base_patch8_224.dino"


@pytest.mark.parametrize(("name", "generator", "value"), [
    pytest.param("voc21_iseg", {"entropy": 0.015, "iterations": 8}, 2.0, id="iSeg, VOC21"),
    pytest.param("context60_iseg", {"entropy": 0.002, "iterations": 5}, 2.0, id="iSeg, PC60"),
    pytest.param("coco_object_iseg", {"entropy": 0.2, "iterations": 10}, 0.45, id="iSeg, COCO-Object"),
    pytest.param("voc21_diffsegmenter", {"name": "diffsegmenter"}, 0.5, id="DiffSegmenter, VOC21"),
    pytest.param("context60_diffsegmenter", {"name": "diffsegmenter"}, 0.5, id="DiffSegmenter, PC60"),
    pytest.param("coco_object_diffsegmenter", {"name": "diffsegmenter"}, 0.5, id="DiffSegmenter, COCO-Object"),
])  # fmt: skip
def test_presets_of_diffusion_attention(name: str, generator: dict[str, Any], value: float) -> None:
    cfg = compose_preset(name)
    assert {key: cfg.pseudo_masks.generator[key] for key in generator} == generator
    assert cfg.pseudo_masks.background.value == value
    assert cfg.tagger is not None
    assert cfg.tagger["name"] == "tagclip"


SAM3 = {
    "voc21": (0.5, 0.4), "voc20": (0.5, 0.0), "context60": (0.3, 0.1), "context59": (0.3, 0.0),
    "coco_object": (0.5, 0.4), "coco_stuff": (0.2, 0.0), "cityscapes": (0.3, 0.0), "ade20k": (0.3, 0.0),
}  # fmt: skip
"""Score above which objects count, and threshold of the background."""


@pytest.mark.parametrize("name", SETS)
def test_presets_of_sam3(name: str) -> None:
    cfg = compose_preset(f"{name}_sam3")
    settings, generator = cfg.pseudo_masks, cfg.pseudo_masks.generator
    assert (build(cfg.dataset, "val").name, generator["name"]) == (SETS[name][0], "sam3_concepts")
    assert (generator["min_object_score"], settings.background.value) == SAM3[name]
    assert (settings.background.rule, settings.refine, generator["heads"]) == ("probability", "none", "both")
    assert (generator["max_classes"], generator["preview_side"]) == (40, 672)


def test_every_file_is_a_set_or_a_method_on_one() -> None:
    names = {path.stem for path in (config_dir() / "protocol").glob("*.yaml")}
    methods = {f"{name}_{method}" for name in SETS for method in METHODS}
    diffusion = {f"{name}_{m}" for name in ("voc21", "context60", "coco_object") for m in ("iseg", "diffsegmenter")}
    unsupervised = {
        f"{name}_{pictures}" for name in ("cityscapes27", "coco_stuff27") for pictures in ("diffseg", "picie")
    }
    assert names == {*SETS, *methods, *diffusion, *(f"{name}_sam3" for name in SETS), *unsupervised}


@pytest.mark.parametrize(("name", "tau"), [("cityscapes27", 0.9), ("coco_stuff27", 1.1)])
def test_unsupervised_presets_have_the_published_pictures(name: str, tau: float) -> None:
    diffseg, picie = compose_preset(f"{name}_diffseg"), compose_preset(f"{name}_picie")
    for cfg, pictures in ((diffseg, "diffseg"), (picie, "picie")):
        dataset = build(cfg.dataset, cfg.dataset["val_split"])
        assert (dataset.name, dataset.num_classes, dataset.has_background) == (name, 27, False)
        assert cfg.dataset["picture"] == pictures
    assert (diffseg.discoverer["name"], diffseg.discoverer["tau"]) == ("diffseg", tau)
    assert picie.discoverer["name"] == "kmeans"
