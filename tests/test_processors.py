"""Inputs of every model of `transformers` against those of the library's own processor, which this package bypasses.

Processors are built from settings, without files of the hub. The library has two resizers: Pillow's, with which the
models were published, has to agree exactly; that of torchvision may differ by one step of 255.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moduseg.backbones.clip import ClipBackbone, ClipOptions
from moduseg.proposers.grid_options import GridOptions
from moduseg.proposers.mask_generation import generate
from moduseg.proposers.sam_transformers import HubSam
from moduseg.proposers.universal import UniversalOptions, UniversalProposer
from moduseg.weights.sources import find_weights
from tests.proposers.contract import sample
from tests.support import tiny_models
from tests.support.devices import CPU

SHORT_SIDE = {"size": {"shortest_edge": 64, "longest_edge": 96}}
SQUARE = {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True}
LONG_SIDE = {"size": {"longest_edge": 128}, "pad_size": {"height": 128, "width": 128}}
UNIVERSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mask2former": ("Mask2FormerImageProcessor", {**SHORT_SIDE, "size_divisor": 32}),
    "oneformer": ("OneFormerImageProcessor", SHORT_SIDE),
    "eomt": ("EomtImageProcessor", SQUARE),
    "eomt_dinov3": ("EomtImageProcessor", SQUARE),
}
"""Image processor of each family, and its settings at the size of the tiny models."""
PROMPTABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": ("SamImageProcessor", LONG_SIDE),
    "sam_hq": ("SamImageProcessor", LONG_SIDE),
    "sam2": ("Sam2ImageProcessor", {"size": {"height": 128, "width": 128}}),
    "sam3_tracker": ("Sam3ImageProcessor", {"size": {"height": 112, "width": 112}}),
}
SIZES = [(48, 64), (64, 64), (90, 50), (96, 128), (150, 90), (200, 33), (300, 400), (33, 20)]
"""Smaller, larger, thinner and exactly as large as the models' inputs, in pixels."""


def make_processors(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the library's image processors of one name by resizer; SAM 2 and SAM 3 have no other than torchvision."""
    import transformers

    names = {"torchvision": name, "pillow": f"{name}Pil"}
    return {key: getattr(transformers, n)(**settings) for key, n in names.items() if hasattr(transformers, n)}


def assert_same_pixels(pixels: Tensor, processors: dict[str, Any], image: Any, **extra: Any) -> None:
    """Compare the model's input with that of the library: Pillow's up to rounding, torchvision's up to one step."""
    for resizer, processor in processors.items():
        expected = processor(image, return_tensors="pt", **extra)["pixel_values"]
        assert pixels.shape == expected.shape
        step = max(1 / (255 * deviation) for deviation in processor.image_std)
        assert (pixels - expected).abs().max() <= (1e-5 if resizer == "pillow" else 1.01 * step)


@pytest.mark.parametrize("family", UNIVERSAL)
def test_universal_pixels_are_the_librarys(family: str, tmp_path: Path) -> None:
    name, settings = UNIVERSAL[family]
    directory = tiny_models.save_universal(family, tmp_path, settings)
    proposer = UniversalProposer(UniversalOptions(weights=directory), CPU)
    processors = make_processors(name, settings)
    assert set(processors) == {"torchvision", "pillow"}
    for size in SIZES:
        image = sample(*size).image
        pixels, frame = proposer.prepare_input(image)
        assert frame.padded_size == pixels.shape[2:]
        assert_same_pixels(
            pixels, processors, image, **({"task_inputs": ["panoptic"]} if family == "oneformer" else {})
        )


@pytest.mark.parametrize("family", PROMPTABLE)
def test_promptable_pixels_are_the_librarys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = PROMPTABLE[family]
    processors = make_processors(name, settings)
    hub = HubSam(tiny_models.build_sam(family), CPU, {})
    inputs: list[Tensor] = []
    monkeypatch.setattr(hub._model, "get_image_embeddings", lambda pixels: inputs.append(pixels) or pixels)
    for size in SIZES:
        image = sample(*size).image
        hub.embed(image)
        assert_same_pixels(inputs.pop(), processors, image)


class Recorder:
    """Stands for a model of `transformers`: keeps what it is called with, and calls it."""

    def __init__(self, model: Any) -> None:
        self.model, self.get_image_embeddings = model, model.get_image_embeddings
        self.arguments: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> Any:
        self.arguments = arguments
        return self.model(**arguments)


@pytest.mark.parametrize("family", PROMPTABLE)
def test_points_are_the_librarys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of four points and their labels, as the library scales them to the model's input."""
    import transformers

    name, settings = PROMPTABLE[family]
    image_processor = make_processors(name, settings)["torchvision"]
    side = settings["size"].get("longest_edge") or settings["size"]["height"]
    kind = getattr(
        transformers, {"sam": "Sam", "sam_hq": "SamHQ", "sam2": "Sam2"}.get(family, "Sam3Tracker") + "Processor"
    )
    processor = kind(image_processor, target_size=side) if family in ("sam2", "sam3_tracker") else kind(image_processor)
    hub = HubSam(tiny_models.build_sam(family), CPU, {})
    recorder = Recorder(hub._model)
    monkeypatch.setattr(hub, "_model", recorder)
    for height, width in [(48, 64), (90, 50), (375, 500)]:
        image = sample(height, width).image
        generate(hub, image, GridOptions(points_per_side=2))
        points = [[[x * width, y * height]] for y in (0.25, 0.75) for x in (0.25, 0.75)]
        theirs = processor(images=image, input_points=[points], input_labels=[[[1]] * 4], return_tensors="pt")
        torch.testing.assert_close(recorder.arguments["input_points"], theirs["input_points"].float())
        assert torch.equal(recorder.arguments["input_labels"], theirs["input_labels"].int())


def test_task_tokens_of_oneformer_are_the_librarys(tmp_path: Path) -> None:
    import transformers

    directory = tiny_models.save_universal("oneformer", tmp_path, SHORT_SIDE)
    processor = transformers.OneFormerProcessor(
        transformers.OneFormerImageProcessor(**SHORT_SIDE),
        transformers.CLIPTokenizer.from_pretrained(directory),
        task_seq_length=77,
    )
    for task in ("panoptic", "instance", "semantic"):
        expected = processor(images=sample(48, 64).image, task_inputs=[task], return_tensors="pt")["task_inputs"]
        proposer = UniversalProposer(UniversalOptions(weights=directory, task=task), CPU)  # type: ignore[arg-type]
        assert torch.equal(proposer.extra_inputs["task_inputs"], expected)


def test_clip_inputs_are_the_librarys(tmp_path: Path) -> None:
    """Pixels without the library's resizing and cropping, which a dense CLIP leaves out, and tokens of texts."""
    import transformers

    backbone = ClipBackbone(ClipOptions(weights="miniature/clip"), CPU)
    folder = find_weights("miniature/clip", "weights")
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    normalisation = {key: settings[key] for key in ("image_mean", "image_std")}
    inputs: list[Tensor] = []
    model = backbone._source.model
    model.vision_model.embeddings.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    patch = backbone._encoder.stride
    image = sample(6 * patch, 8 * patch).image
    backbone.tokens([image])
    processors = make_processors("CLIPImageProcessor", {**normalisation, "do_resize": False, "do_center_crop": False})
    for processor in processors.values():
        expected = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(inputs[0], expected, rtol=0, atol=1e-5)
    texts = ["a red disc", "grass", "a photo of several things " * 20]
    texts_seen: list[dict[str, Any]] = []
    model.text_model.register_forward_pre_hook(lambda _, __, arguments: texts_seen.append(arguments), with_kwargs=True)
    backbone.text_features(texts)
    processor = transformers.CLIPProcessor(processors["pillow"], transformers.CLIPTokenizer.from_pretrained(folder))
    theirs = processor(
        text=texts,
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(texts_seen[0][key], theirs[key])
