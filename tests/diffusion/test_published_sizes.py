"""Stable Diffusion at full size: names and shapes on the meta device, and one image through both generators."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.diffusion.attention import AttentionSource
from moduseg.diffusion.layers import MapRequest, choose_heads, list_layers
from moduseg.diffusion.model import DiffusionModelOptions
from moduseg.pseudo_masks import build
from moduseg.structures import Sample
from tests.pseudo_masks.test_given_masks import no_backbone
from tests.support import diffusion_manifests
from tests.support.devices import CPU
from tests.support.key_names import read, shapes_of

CLASSES = ("background", "person", "dog", "potted plant")
MODELS = {"iseg": "sd_2_1_base", "diffsegmenter": "sd_1_5"}


@pytest.mark.parametrize("name", diffusion_manifests.PARTS)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    built, manifest = shapes_of(diffusion_manifests.build(name).state_dict()), read(name)
    assert built == manifest
    assert sum(map(math.prod, manifest.values())) == diffusion_manifests.PARTS[name][2]


@pytest.mark.parametrize(("model", "kind", "num_layers", "num_heads"), [
    pytest.param("sd_1_5", "cross", {8: 1, 16: 5, 32: 5, 64: 5}, {8: 8, 16: 40, 32: 40, 64: 40}, id="1.5, cross"),
    pytest.param("sd_1_5", "self", {8: 1, 16: 5, 32: 5, 64: 5}, {8: 8, 16: 40, 32: 40, 64: 40}, id="1.5, self"),
    pytest.param("sd_2_1_base", "cross", {8: 1, 16: 5, 32: 5, 64: 5}, {8: 20, 16: 100, 32: 50, 64: 25}, id="2.1"),
])  # fmt: skip
def test_layers_are_counted_by_side(
    model: str, kind: str, num_layers: dict[int, int], num_heads: dict[int, int]
) -> None:
    layers = [layer for layer in list_layers(diffusion_manifests.build(f"{model}_unet"), 64) if layer.kind == kind]
    sides = sorted({layer.side for layer in layers})
    assert {side: sum(layer.side == side for layer in layers) for side in sides} == num_layers
    assert {side: sum(layer.num_heads for layer in layers if layer.side == side) for side in sides} == num_heads
    assert [layer.place for layer in layers][:3] == ["down0.0", "down0.1", "down1.0"]
    assert [layer.place for layer in layers][-1] == "up3.2"


def requests_of(generator: Any) -> list[MapRequest]:
    options = generator._options
    if hasattr(options, "completion"):
        others = [MapRequest(kind="self", side=side) for side in options.completion]
    else:
        others = [MapRequest(kind="self", places=options.self_places, heads=options.self_heads)]
    return [*(level.request for level in options.cross), *others]


@pytest.mark.parametrize(("preset", "num_heads"), [
    pytest.param("iseg_voc", [100, 30, 2], id="iSeg"),
    pytest.param("iseg_coco", [100, 30, 2], id="iSeg on COCO"),
    pytest.param("diffsegmenter_voc", [8, 40, 40, 40, 40], id="DiffSegmenter"),
])  # fmt: skip
def test_presets_fit_their_model(preset: str, num_heads: list[int]) -> None:
    cfg = compose([f"pseudo_masks={preset}"]).pseudo_masks.generator
    generator = build(cfg, CPU, no_backbone, CLASSES)
    layers = list_layers(diffusion_manifests.build(f"{MODELS[cfg['name']]}_unet"), 64)
    chosen = [choose_heads(layers, request, "cross") for request in requests_of(generator)]
    assert [sum(len(part.heads) for part in parts) for parts in chosen] == num_heads


def peak_memory(reset: bool) -> float:
    """Return the most memory that this process has had, in GB; `reset` starts anew where Linux can."""
    if reset and (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def random_weights(model: str, tokenizer: Path) -> dict[str, Any]:
    return {"weights": "random", "config": diffusion_manifests.CONFIGS[model], "tokenizer": str(tokenizer)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_image_at_full_size(
    name: str, words: tuple[Path, int, int], device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose([f"pseudo_masks={name}_voc", "pseudo_masks.generator.captioner.name=none"][: 1 + (name != "iseg")])
    settings = {**cfg.pseudo_masks.generator, **random_weights(MODELS[name], words[0])}
    del settings["revision"]
    generator = build(settings, Device(device), no_backbone, CLASSES)
    item = Sample("a", np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8), (1, 3))
    assert len(generator.generate(item, (1,), None).scores) == 1  # builds the model
    before, started = peak_memory(reset=True), time.process_time()
    scores = generator.generate(item, (1, 3), None).scores
    seconds = time.process_time() - started
    assert scores.shape == (2, 375, 500)
    assert scores.isfinite().all()
    assert float(scores.std()) > 0
    with capsys.disabled():
        print(f"\n{name}: two classes in {seconds:.1f} s of CPU, {peak_memory(reset=False):.2f} GB at most")
    assert before > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_a_capture(name: str, words: tuple[Path, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """At most 1.2 times the plain pass, and the requested means."""
    source = AttentionSource(DiffusionModelOptions(**random_weights(MODELS[name], words[0])), CPU)
    overrides = [f"pseudo_masks={name}_voc", "pseudo_masks.generator.captioner.name=none"][: 1 + (name != "iseg")]
    requests = requests_of(build(compose(overrides).pseudo_masks.generator, CPU, no_backbone, CLASSES))
    latents, states = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, source.model.unet.config.cross_attention_dim)
    measured = {}
    for title, asked in (("first", []), ("plain", []), ("captured", requests)):
        peak_memory(reset=True)
        started = time.process_time()
        maps = source.collect(latents, states, asked).maps
        measured[title] = (peak_memory(reset=False), time.process_time() - started)
    size = sum(means.numel() * 4 for means in maps) / 1e9
    with capsys.disabled():
        print(f"\n{name}: " + ", ".join(f"{t} pass {gb:.2f} GB, {s:.1f} s of CPU" for t, (gb, s) in measured.items()))
        print(f"means: {size:.3f} GB")
    assert measured["captured"][0] <= 1.2 * measured["plain"][0] + size
