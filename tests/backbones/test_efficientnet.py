"""EfficientNet-Lite2: the names of its published file, tokens, and what the real weights recognise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from moduseg.backbones import Backbone, build
from moduseg.backbones.efficientnet_names import to_timm_names
from moduseg.backbones.timm_backbone import TimmBackbone
from moduseg.backbones.timm_model import load_weights
from moduseg.config import compose
from moduseg.datasets.io import read_image
from moduseg.devices import Device
from moduseg.errors import ArtefactError
from moduseg.weights.sources import find_weights
from moduseg.weights.tensors import load_state
from tests.backbones.contract import BackboneContract, picture
from tests.conftest import external_folder
from tests.support.devices import CPU
from tests.support.key_names import read, shapes_of
from tests.support.real_weights import EFFICIENTNET_LITE2, use_real_weights

PRESETS = ("efficientnet_lite2", "efficientnet_lite2_scales")


@cache
def random_preset(device: torch.device) -> Backbone:
    """The preset at native size with random weights; measuring its grid costs more than using it."""
    cfg = {**compose(["backbone=efficientnet_lite2"]).backbone, "weights": "random", "short_side": None}
    return build(cfg, Device(device))


class TestEfficientNetLite2(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> Backbone:
        return random_preset(device)


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of the published file, in its order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) * 0.1 + 0.01 for name, shape in read("efficientnet_lite2").items()
    }


def make_lite2(num_classes: int = 1000) -> Any:
    return timm.create_model("tf_efficientnet_lite2", num_classes=num_classes)


# Names ----------------------------------------------------------------------------------------------------------------


def test_published_names_are_timms_in_order() -> None:
    with torch.device("meta"):
        model = make_lite2()
    ours = {name: shape for name, shape in shapes_of(model.state_dict()).items() if "num_batches" not in name}
    published = {name: torch.empty(shape, device="meta") for name, shape in read("efficientnet_lite2").items()}
    assert len(published) == 322
    assert list(shapes_of(to_timm_names(published, model)).items()) == list(ours.items())


def test_blocks_with_attention_and_names_without_counterpart() -> None:
    """B0 has squeeze-and-excitation; its second stage begins with block 1."""
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    layers = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"]
    names = [f"_blocks.2.{layer}.weight" for layer in layers]
    names += ["_blocks.0._se_reduce.bias", "_blocks.0._bn2.bias", "_blocks.16._bn0.weight", "_blocks.0._bn7.bias", "x"]
    renamed = to_timm_names(dict.fromkeys(names, torch.zeros(1)), model)
    expected = [f"blocks.1.1.{layer}.weight" for layer in (
        "conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")]  # fmt: skip
    unknown = ["_blocks.16._bn0.weight", "_blocks.0._bn7.bias", "x"]
    assert list(renamed) == [*expected, "blocks.0.0.se.conv_reduce.bias", "blocks.0.0.bn2.bias", *unknown]
    assert set(renamed) - set(unknown) <= set(model.state_dict())


def test_both_names_give_the_same_model(tmp_path: Path) -> None:
    state = published_state()
    reference = make_lite2(0)
    torch.save(state, tmp_path / "published.pth")
    save_file(to_timm_names(state, reference), tmp_path / "timm.safetensors")
    states = []
    for file in ("published.pth", "timm.safetensors"):
        model = make_lite2(0)
        load_weights(model, tmp_path / file)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(states[0]["blocks.6.0.conv_pwl.weight"], state["_blocks.20._project_conv.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s.pop("_blocks.9._bn1.bias"), r"1 missing \(blocks\.3\.2\.bn2\.bias\)", id="missing"),
        pytest.param(
            lambda s: s.update({"_blocks.99._bn1.bias": torch.zeros(1)}),
            r"1 unexpected \(_blocks\.99\._bn1\.bias\)", id="left over",
        ),
        pytest.param(
            lambda s: s.update({"_bn0.bias": torch.zeros(5)}), r"bn1\.bias \(5,\) instead of \(32,\)", id="shape"
        ),
    ],
)  # fmt: skip
def test_a_file_is_taken_whole_or_not_at_all(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    state = published_state()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ArtefactError, match=message):
        load_weights(make_lite2(0), tmp_path / "w.safetensors")


# Presets --------------------------------------------------------------------------------------------------------------


def test_presets_name_the_same_published_file() -> None:
    single, several = (compose([f"backbone={name}"]).backbone for name in PRESETS)
    assert {single["weights"], *(part["weights"] for part in several["parts"])} == {EFFICIENTNET_LITE2}
    sides = [part["short_side"] for part in several["parts"]]
    assert sides == sorted(sides, reverse=True)  # the finest grid first
    assert several["parts"][0] == single


def test_tokens_of_the_preset() -> None:
    """Stage 4 at stride 16: 352 channels. TensorFlow's padding moves cells half a patch beyond the patches."""
    backbone = random_preset(CPU.torch_device)
    assert isinstance(backbone, TimmBackbone)
    (token_map,) = backbone.tokens([picture(30, 40)])
    assert token_map.tokens.shape == (2, 3, 352)
    assert (backbone.dim, backbone._grid) == (352, (16, 15.5))
    # The last stage is what the head's convolution takes in.
    assert backbone._model.conv_head.in_channels == 352


# Real weights ---------------------------------------------------------------------------------------------------------


def test_the_published_file_fits_its_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    use_real_weights(monkeypatch)
    shapes = shapes_of(load_state(find_weights(EFFICIENTNET_LITE2, "weights")))
    assert {name: shape for name, shape in shapes.items() if "num_batches" not in name} == read("efficientnet_lite2")


@pytest.mark.parametrize(
    ("image", "word"),
    [
        pytest.param("000000000285", "brown bear", id="bear"),
        pytest.param("000000000776", "teddy", id="teddy bear"),
        pytest.param("000000001818", "zebra", id="zebra"),
        pytest.param("000000002149", "Granny Smith", id="apple"),
    ],
)
def test_real_weights_recognise_photographs(image: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, normalisation and padding are right if the classifier knows what is in a picture."""
    from timm.data import ImageNetInfo

    use_real_weights(monkeypatch)
    pixels = read_image(external_folder("MODUSEG_COCO150") / "images" / "val2017" / f"{image}.jpg")
    model = make_lite2()
    load_weights(model, find_weights(EFFICIENTNET_LITE2, "weights"))
    values = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255
    values = torch.nn.functional.interpolate(values, (260, 260), mode="bilinear", antialias=True)
    with torch.inference_mode():
        best = int(model.eval()((values - 0.5) / 0.5)[0].argmax())
    assert word in ImageNetInfo().index_to_description(best)
