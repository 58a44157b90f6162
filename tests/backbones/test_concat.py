"""Backbones side by side: the same places, the right channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moduseg.backbones import build
from moduseg.backbones.base import Backbone
from moduseg.backbones.upsample import regrid
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.structures import TokenMap
from tests.backbones.contract import BackboneContract, picture
from tests.support.devices import CPU

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
VIT: dict[str, Any] = {"name": "timm", "model": "vit_tiny_patch16_224", "model_kwargs": KWARGS}
COARSE = {**VIT, "model_kwargs": {**KWARGS, "patch_size": 16}, "seed": 1}


class TestConcat(BackboneContract):
    @pytest.fixture
    def backbone(self, device: torch.device) -> Backbone:
        cfg = {"name": "concat", "parts": [VIT, COARSE], "context": 0.5}
        return build(cfg, Device(device))

    def test_padding_is_black(self, backbone: Backbone) -> None:
        """Parts pad to their own multiples, and interpolation may reach into it; the first part's hold."""
        image = picture(13, 22)
        token_map = backbone.tokens([image])[0]
        (alone,) = build(VIT, CPU).tokens([image])
        torch.testing.assert_close(token_map.tokens[..., :16].cpu(), alone.tokens, atol=1e-5, rtol=1e-5)


def test_parts_factors_and_context() -> None:
    image = picture(32, 48)
    first, second = (build(part, CPU).tokens([image])[0] for part in (VIT, COARSE))
    settings = {"factors": [1.0, 3.0], "normalize": True, "context": 0.25}
    backbone = build({"name": "concat", "parts": [VIT, COARSE]} | settings, CPU)
    (joined,) = backbone.tokens([image])
    assert backbone.dim == joined.tokens.shape[2] == 64
    assert (joined.stride, joined.tokens.shape[:2]) == (8, (4, 6))
    torch.testing.assert_close(joined.tokens[..., :16], F.normalize(first.tokens, dim=2))
    torch.testing.assert_close(joined.tokens[..., 16:32], 3 * F.normalize(regrid(second, first), dim=2))
    mean = joined.tokens[..., :32].mean((0, 1))
    torch.testing.assert_close(joined.tokens[..., 32:], 0.25 * mean.expand(4, 6, 32))
    assert backbone.digest == "random-0+random-1"


def test_one_part_is_that_part() -> None:
    image = picture(20, 30)
    joined, alone = (build(cfg, CPU).tokens([image])[0] for cfg in ({"name": "concat", "parts": [VIT]}, VIT))
    assert torch.equal(joined.tokens, alone.tokens)


@pytest.mark.parametrize("image", [(64, 96), (50, 71)])
@pytest.mark.parametrize(("stride", "side"), [(8, 1.0), (4, 0.5), (16, 2.0), (8, 1.6)])
def test_places_stay(image: tuple[int, int], stride: int, side: float, device: torch.device) -> None:
    """A map of its own centres' coordinates, in pixels of the image, gives the other grid its coordinates."""
    source = (round(image[0] * side), round(image[1] * side))
    grid = [-(-s // stride) for s in source]
    rows, columns = (
        (torch.arange(n, device=device) + 0.5) * stride * i / s for n, i, s in zip(grid, image, source, strict=True)
    )
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2)
    target_grid = [-(-s // 8) for s in image]
    target = TokenMap(torch.zeros(*target_grid, 1, device=device), 8, image, image)
    regridded = regrid(TokenMap(coordinates, stride, image, source), target)
    expected = torch.stack(
        torch.meshgrid(*((torch.arange(n, device=device) + 0.5) * 8 for n in target_grid), indexing="ij"), 2
    )
    low, high = coordinates.flatten(0, 1).amin(0), coordinates.flatten(0, 1).amax(0)
    torch.testing.assert_close(regridded, torch.minimum(torch.maximum(expected, low), high), atol=1e-3, rtol=1e-5)


def test_regrid_wants_one_image() -> None:
    maps = [TokenMap(torch.zeros(2, 2, 3), 8, size, (16, 16)) for size in ((16, 16), (32, 32))]
    with pytest.raises(ValueError, match=r"images of \(16, 16\) and \(32, 32\), expected one size"):
        regrid(*maps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": []}, "parts: got none"),
        ({"parts": [VIT], "factors": [1.0, 2.0]}, "expected 1 numbers from 0"),
        ({"parts": [VIT], "factors": [-1.0]}, "expected 1 numbers from 0"),
        ({"parts": [VIT], "context": -0.5}, "context: got -0.5, expected 0 or more"),
        ({"parts": [{"name": "nothing"}]}, "got 'nothing', expected one of"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "concat", **arguments}, CPU)
