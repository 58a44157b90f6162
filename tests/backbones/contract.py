"""What every backbone has to do; a backend's test class inherits it and supplies `backbone`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.backbones.base import Backbone
from moduseg.errors import DataError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """`[height, width, 3]` uint8 noise."""
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


class BackboneContract:
    """Inherit, and define the fixture `backbone(device)`."""

    @pytest.mark.parametrize("size", [(64, 64), (50, 71), (96, 33), (5, 3), (1, 1)])
    def test_grid_covers_the_image(self, backbone: Backbone, size: tuple[int, int], device: torch.device) -> None:
        (token_map,) = backbone.tokens([picture(*size)])
        stride = token_map.stride
        assert token_map.tokens.shape == (-(-size[0] // stride), -(-size[1] // stride), backbone.dim)
        assert token_map.image_size == token_map.input_size == size
        assert token_map.tokens.dtype == torch.float32
        assert token_map.tokens.device.type == device.type
        assert token_map.tokens.isfinite().all()

    def test_batch_equals_single(self, backbone: Backbone) -> None:
        images = [picture(50, 71, 1), picture(64, 64, 2), picture(50, 70, 3), picture(20, 20, 4), picture(64, 64, 5)]
        together = backbone.tokens(images)
        for image, token_map in zip(images, together, strict=True):
            (alone,) = backbone.tokens([image])
            assert alone.image_size == token_map.image_size == image.shape[:2]
            scale = max(1.0, float(alone.tokens.abs().max()))
            torch.testing.assert_close(token_map.tokens, alone.tokens, atol=1e-5 * scale, rtol=1e-5)
        assert not torch.allclose(together[1].tokens, together[4].tokens)

    def test_padding_is_black(self, backbone: Backbone) -> None:
        stride = backbone.tokens([picture(8, 8)])[0].stride
        image = picture(2 * stride - 3, 3 * stride - 1)
        padded = np.zeros((2 * stride, 3 * stride, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        ours, theirs = (m.tokens for m in backbone.tokens([image, padded]))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    def test_tokens_are_ordinary_tensors(self, backbone: Backbone) -> None:
        tokens = backbone.tokens([picture(32, 32)])[0].tokens
        assert not tokens.is_inference()
        assert not tokens.requires_grad

    def test_nothing_in_nothing_out(self, backbone: Backbone) -> None:
        assert backbone.tokens([]) == []

    def test_digest_names_the_weights(self, backbone: Backbone) -> None:
        assert backbone.digest
        assert backbone.digest == backbone.digest

    @pytest.mark.parametrize(
        "image",
        [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32),
         np.zeros((0, 8, 3), np.uint8)],
        ids=["grey", "alpha", "float", "empty"],
    )  # fmt: skip
    def test_refuses_other_arrays(self, backbone: Backbone, image: np.ndarray) -> None:
        with pytest.raises(DataError, match=r"expected \[H, W, 3\] uint8"):
            backbone.tokens([image])
