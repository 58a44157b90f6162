"""Every proposer, backbone and generator on a pretended GPU, in each precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moduseg import backbones, discovery, proposers, pseudo_masks, taggers
from moduseg.backbones import BACKBONES
from moduseg.devices import Device
from moduseg.discovery import DISCOVERERS
from moduseg.proposers import PROPOSERS
from moduseg.pseudo_masks import GENERATORS
from moduseg.structures import Sample, TokenMap
from moduseg.taggers import TAGGERS
from tests.backbones.contract import picture
from tests.backbones.test_clip import tiny_config
from tests.proposers.contract import sample as proposer_sample
from tests.proposers.test_sam import OPEN
from tests.proposers.test_universal import SETTINGS
from tests.pseudo_masks.contract import CLASSES, NUM_CLASSES, halves, sample
from tests.pseudo_masks.test_diffsegmenter import SETTINGS as DIFFSEGMENTER
from tests.pseudo_masks.test_iseg import SETTINGS as ISEG
from tests.support import tiny_models
from tests.support.devices import CPU
from tests.support.pretend_cuda import CUDA, pretend_cuda
from tests.support.tiny_diffusion import tiny_diffusion

PRECISIONS = ("float32", "bfloat16", "float16")
Configuration = dict[str, Any]
VIT: Configuration = {
    "name": "timm",
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
SAM = {"name": "sam", **OPEN}
FILTERS = {key: value for key, value in OPEN.items() if key not in ("model", "checkpoint")}
HUB_FAMILIES = ("sam", "sam_hq", "sam2", "sam3_tracker")
SAM_CONFIGURATIONS: dict[str, Configuration] = {
    "packaged": SAM,
    "grid": {**SAM, "engine": "grid"},
    "grid with crops": {**SAM, "engine": "grid", "crop_n_layers": 1, "crop_nms_thresh": 0.7, "points_per_batch": 4},
    "grid, small regions removed": {**SAM, "engine": "grid", "min_mask_region_area": 20},
}
BACKBONE_CONFIGURATIONS: dict[str, Configuration] = {
    "timm": VIT,
    "timm, queries and keys": {**VIT, "facet": "qk"},
    "timm, rotary positions": {
        "name": "timm",
        "model": "vit_small_patch16_dinov3",
        "model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "timm, CNN": {"name": "timm", "model": "mobilenetv2_035", "output_stride": 16},
    "timm, windows": {**VIT, "window": 24, "stride": 8},
    "clip": {"name": "clip", "weights": "random", "config": tiny_config()},
    "clip, another attention": {
        "name": "clip", "weights": "random", "config": tiny_config(), "variant": "naclip", "project": True,
    },
    "concat": {"name": "concat", "parts": [VIT, {**VIT, "seed": 1}], "context": 0.5},
}  # fmt: skip


def run_everywhere(run: Callable[[Device], list[Tensor]], precision: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a function gives on the CPU in float32, and on the pretended GPU."""
    expected = run(CPU)
    with torch.inference_mode(), pretend_cuda():
        results = run(Device(CUDA, precision))
        assert {tensor.device for tensor in results} <= {CUDA, torch.device("cpu")}
        return expected, [tensor.cpu() for tensor in results]


def check_close(results: list[Tensor], expected: list[Tensor], precision: str) -> None:
    """Check float tensors: in float32 the CPU's values up to rounding, in half precisions near them."""
    tolerance = 1e-4 if precision == "float32" else 0.1
    assert len(results) == len(expected)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        assert result.shape == reference.shape
        assert (result - reference).norm() <= tolerance * reference.norm()


def propose(configuration: Configuration, device: Device) -> list[Tensor]:
    proposals = proposers.build(configuration, device).propose(proposer_sample(40, 56))
    assert proposals.masks.device.type == "cpu"
    return [proposals.masks, proposals.predicted_iou]


def check_proposals(configuration: Configuration, precision: str) -> None:
    (masks, predicted_iou), results = run_everywhere(lambda device: propose(configuration, device), precision)
    assert len(masks) > 0
    if precision == "float32":
        assert results[0].shape == masks.shape
        assert (results[0] != masks).float().mean() < 1e-3
        torch.testing.assert_close(results[1], predicted_iou, atol=1e-4, rtol=1e-4)
    else:
        assert len(results[0]) > 0
        assert results[1].dtype == torch.float32
        assert results[1].max().item() == pytest.approx(predicted_iou.max().item(), abs=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SAM_CONFIGURATIONS)
def test_sam(name: str, precision: str) -> None:
    check_proposals(SAM_CONFIGURATIONS[name], precision)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Configuration]:
    """Configurations of tiny models of `transformers`, as `save_pretrained` writes them."""
    made = {}
    for family in HUB_FAMILIES:
        weights = tiny_models.save(tiny_models.build_sam(family), tmp_path_factory.mktemp(family))
        made[family] = {"name": "sam_transformers", "weights": weights, **FILTERS}
    for family, settings in SETTINGS.items():
        weights = tiny_models.save_universal(family, tmp_path_factory.mktemp(family), settings)
        made[family] = {"name": "universal", "weights": weights, "score_thresh": 0.0}
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", [*HUB_FAMILIES, *SETTINGS])
def test_proposers_of_transformers(family: str, precision: str, directories: dict[str, Configuration]) -> None:
    check_proposals(directories[family], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_contours(precision: str) -> None:
    check_proposals({"name": "contours", "max_proposals": 20}, precision)


@pytest.mark.parametrize("name", ["superpixels", "ground_truth"])
def test_proposers_without_a_model(name: str) -> None:
    expected, results = run_everywhere(lambda device: propose({"name": name}, device), "float32")
    assert all(map(torch.equal, results, expected))


def encode(configuration: Configuration, device: Device) -> list[Tensor]:
    token_maps = backbones.build(configuration, device).tokens([picture(32, 40), picture(21, 33)])
    assert {token_map.tokens.device.type for token_map in token_maps} == {device.torch_device.type}
    return [token_map.tokens for token_map in token_maps]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BACKBONE_CONFIGURATIONS)
def test_backbones(name: str, precision: str) -> None:
    configuration = BACKBONE_CONFIGURATIONS[name]
    expected, results = run_everywhere(lambda device: encode(configuration, device), precision)
    check_close(results, expected, precision)


def make_generators(words: tuple[Path, int, int], concepts: str = "") -> dict[str, Configuration]:
    """Return a configuration of every generator; `concepts` is the folder of a tiny SAM 3."""
    clip = {
        "weights": "random",
        "config": tiny_config(words[1], words[2]),
        "tokenizer": str(words[0]),
        "templates": ["a {}"],
        "background_words": ["grass"],
        "logit_scale": 5.0,
    }
    affinity = {**VIT, "facet": "qk", "model_kwargs": {**VIT["model_kwargs"], "img_size": 24, "patch_size": 3}}
    return {
        "clip_dense": {"name": "clip_dense", **clip, "window": 16, "stride": 8},
        "clip_dense, proxy": {"name": "clip_dense", **clip, "variant": "proxyclip", "window": None},
        "corrclip": {"name": "corrclip", **clip, "affinity": affinity, "window": 16, "stride": 8},
        "cam": {"name": "cam", "ridge": 0.1},
        "cam, refined": {"name": "cam", "ridge": 0.1, "rounds": 2},
        "cam_neighbours": {"name": "cam_neighbours", "ridge": 0.1},
        "ground_truth": {"name": "ground_truth"},
        "iseg": {**ISEG, **tiny_diffusion(words)},
        "diffsegmenter": {**DIFFSEGMENTER, **tiny_diffusion(words)},
        "sam3_concepts": {"name": "sam3_concepts", "weights": concepts, "min_object_score": 0.1, "batch_size": 1},
        "sam3_concepts, preview": {
            "name": "sam3_concepts",
            "weights": concepts,
            "min_object_score": 0.1,
            "max_classes": 1,
            "preview_side": 56,
        },
        "fusion": {"name": "fusion", "first": {"name": "ground_truth"}, "second": {"name": "cam", "ridge": 0.1}},
    }


GENERATOR_NAMES = (
    "clip_dense", "clip_dense, proxy", "corrclip", "cam", "cam, refined", "cam_neighbours", "ground_truth", "iseg",
    "diffsegmenter", "sam3_concepts", "sam3_concepts, preview", "fusion",
)  # fmt: skip


def list_training_images() -> list[Sample]:
    return [sample((24, 40), labels, "x" * (i + 1)) for i, labels in enumerate([(2,), (4,), (2, 4), ()] * 2)]


def generate(configuration: Configuration, device: Device) -> list[Tensor]:
    def make_backbone() -> backbones.Backbone:
        return backbones.build(VIT, device)

    generator = pseudo_masks.build(configuration, device=device, backbone=make_backbone, classes=CLASSES)
    if generator.is_fitted:
        generator.load_state(generator.fit(list_training_images, NUM_CLASSES, lambda item: halves(item.size)))
    item = sample(name="24-2")
    maps = generator.generate(item, (2, 4), halves(item.size))
    assert maps.scores.device.type == device.torch_device.type
    return [maps.scores, *([] if maps.background is None else [maps.background])]


@pytest.fixture(scope="module")
def concepts(words: tuple[Path, int, int], tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_concepts(words, tmp_path_factory.mktemp("concepts"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GENERATOR_NAMES)
def test_generators(name: str, precision: str, words: tuple[Path, int, int], concepts: str) -> None:
    configuration = make_generators(words, concepts)[name]
    expected, results = run_everywhere(lambda device: generate(configuration, device), precision)
    check_close(results, expected, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["clip", "tagclip"])
def test_taggers(name: str, precision: str, words: tuple[Path, int, int]) -> None:
    settings = {**make_generators(words)["clip_dense"], "name": name, "image_size": 16}
    settings = {key: value for key, value in settings.items() if key not in ("window", "stride")}

    def tag(device: Device) -> list[Tensor]:
        scores = taggers.build(settings, device, CLASSES).tag(sample(name="24-2")).scores
        return [] if scores is None else [scores]

    expected, results = run_everywhere(tag, precision)
    assert len(results) == 1
    check_close(results, expected, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", sorted(DISCOVERERS))
def test_discoverers(name: str, precision: str, words: tuple[Path, int, int]) -> None:
    """Everything happens on the device; in other precisions the attention of a model may part an image elsewhere."""
    model = tiny_diffusion(words) if name in ("diffseg", "iseg_propagation") else {}
    more = {"grid": 4, "tau": 0.001} if model else {}
    if name == "iseg_propagation":
        more |= {"self_places": ["up3.1"], "iterations": 1}
    item = sample(name="24-2")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(6, 10, 4, generator=generator)

    def discover(device: Device) -> list[Tensor]:
        grid = TokenMap(tokens.to(device.torch_device), 4, item.size, item.size)
        found = discovery.build({"name": name, **model, **more}, device).find_segments(item, grid)
        assert found.device.type == device.torch_device.type
        # Which pixels share a segment, whatever its number.
        pixels = found.flatten()[::7]
        return [(pixels[:, None] == pixels).float()] if not model or precision == "float32" else []

    expected, results = run_everywhere(discover, precision)
    check_close(results, expected, precision)


def test_no_class_is_left_out(words: tuple[Path, int, int]) -> None:
    """Files are read on the CPU; class tokens are fitted, and run on every device in tests of their own."""
    generators = make_generators(words)
    assert set(generators) == set(GENERATOR_NAMES)
    assert {c["name"] for c in generators.values()} | {"files", "class_tokens"} == set(GENERATORS)
    assert {c["name"] for c in BACKBONE_CONFIGURATIONS.values()} == set(BACKBONES)
    tested = {"contours", "sam", "sam_transformers", "universal", "superpixels", "ground_truth"}
    assert tested | {"files"} == set(PROPOSERS)
    # The others run no model.
    assert {"clip", "tagclip"} == {name for name, tagger in TAGGERS.items() if tagger.runs_model}
