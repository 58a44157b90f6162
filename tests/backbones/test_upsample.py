"""Patch maps back to pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moduseg.backbones import upsample as module
from moduseg.backbones.upsample import upsample
from moduseg.structures import TokenMap


def grid(image: tuple[int, int], stride: int, source: tuple[int, int] | None = None) -> TokenMap:
    source = source or image
    cells = [-(-side // stride) for side in source]
    return TokenMap(torch.zeros(*cells, 1), stride, image, source)


@pytest.mark.parametrize("size", [(16, 24), (13, 21), (3, 30), (1, 1)])
def test_equals_interpolating_the_padded_image(size: tuple[int, int], device: torch.device) -> None:
    token_map = grid(size, 8)
    cells = token_map.tokens.shape[:2]
    maps = torch.rand(3, *cells, device=device)
    padded = F.interpolate(maps[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(upsample(maps, token_map), padded[:, : size[0], : size[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("image", "source"), [((40, 60), (20, 30)), ((20, 30), (40, 60)), ((33, 50), (17, 25))])
def test_ramp_survives_resizing(image: tuple[int, int], source: tuple[int, int], device: torch.device) -> None:
    """A map that holds its centres' coordinates gives every pixel its own, in pixels of the input."""
    token_map = grid(image, 4, source)
    h, w = token_map.tokens.shape[:2]
    columns = ((torch.arange(w, device=device) + 0.5) * 4).expand(1, h, w)
    result = upsample(columns, token_map)[0]
    expected = (torch.arange(image[1], device=device) + 0.5) * source[1] / image[1]
    expected = expected.clamp(2, (w - 0.5) * 4)
    torch.testing.assert_close(result, expected.expand(image), atol=1e-4, rtol=1e-5)


def test_impulse_peaks_in_its_patch() -> None:
    token_map = grid((30, 45), 8)
    for i, j in ((0, 0), (1, 3), (3, 5)):
        maps = torch.zeros(1, 4, 6)
        maps[0, i, j] = 1
        y, x = divmod(int(upsample(maps, token_map)[0].argmax()), 45)
        assert (y // 8, x // 8) == (i, j)


@pytest.mark.parametrize("image", [(3, 90), (90, 3)])
def test_parts_of_a_strip_are_the_whole(image: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    token_map = grid(image, 4, (image[0] * 2, image[1] * 2))
    maps = torch.rand(2, *token_map.tokens.shape[:2])
    whole = upsample(maps, token_map)
    monkeypatch.setattr(module, "_PART", 500)
    torch.testing.assert_close(upsample(maps, token_map), whole, atol=1e-6, rtol=1e-6)


def test_no_maps(device: torch.device) -> None:
    assert upsample(torch.zeros(0, 2, 3, device=device), grid((16, 24), 8)).shape == (0, 16, 24)


def test_another_grid() -> None:
    with pytest.raises(ValueError, match=r"expected \[R, h, w\] on the grid \(2, 3\)"):
        upsample(torch.zeros(1, 3, 3), grid((16, 24), 8))
