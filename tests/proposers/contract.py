"""What every proposer promises. A backend's test class inherits `ProposerContract` and says how to make one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.errors import ConfigError
from moduseg.proposers import Proposer, build
from moduseg.structures import Sample
from tests.support.devices import CPU


def sample(height: int, width: int, name: str = "folder/a", constant: bool = False) -> Sample:
    """A noisy image with a square and a bar on it, and its truth; `constant` has one colour and no object."""
    rng = np.random.default_rng([height, width])
    semantic = np.zeros((height, width), np.uint8)
    image = np.full((height, width, 3), 90, np.uint8)
    if not constant:
        semantic[height // 4 : height // 2 + 1, width // 4 : width // 2 + 1] = 1
        semantic[-max(1, height // 5) :, :] = 2
        image = np.array([[90, 100, 80], [220, 40, 30], [30, 60, 200]], np.uint8)[semantic]
        image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    labels = tuple(int(c) for c in np.unique(semantic) if c)
    return Sample(name, image, labels, semantic, semantic.astype(np.int32))


class ProposerContract:
    """Inherit, and define `config`."""

    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        """The configuration of a proposer that can handle `samples`; `folder` is empty and writable."""
        raise NotImplementedError

    def make(self, folder: Path, samples: Sequence[Sample]) -> Proposer:
        return build(self.config(folder, samples), CPU)

    @pytest.mark.parametrize("size", [(48, 64), (64, 40), (33, 33), (5, 3), (1, 1), (1, 40)])
    @pytest.mark.parametrize("constant", [False, True])
    def test_masks(self, tmp_path: Path, size: tuple[int, int], constant: bool) -> None:
        picture = sample(*size, constant=constant)
        proposals = self.make(tmp_path, [picture]).propose(picture)
        assert proposals.masks.dtype == torch.bool
        assert proposals.masks.device.type == "cpu"
        assert proposals.masks.shape[1:] == size
        assert proposals.predicted_iou.shape == proposals.stability_score.shape == (len(proposals),)
        assert proposals.predicted_iou.dtype == proposals.stability_score.dtype == torch.float32
        assert (proposals.areas > 0).all(), "a mask without a pixel"

    def test_finds_what_is_plain(self, tmp_path: Path) -> None:
        picture = sample(48, 64)
        masks = self.make(tmp_path, [picture]).propose(picture).masks.numpy()
        truth = picture.semantic == 1
        best = max((m & truth).sum() / (m | truth).sum() for m in masks)
        assert best > 0.8

    def test_deterministic(self, tmp_path: Path) -> None:
        picture = sample(48, 64)
        config = self.config(tmp_path, [picture])
        first, second = (build(config, CPU).propose(picture) for _ in range(2))
        assert torch.equal(first.masks, second.masks)
        assert torch.equal(first.predicted_iou, second.predicted_iou)

    def test_image_is_left_alone(self, tmp_path: Path) -> None:
        picture = sample(48, 64)
        before = picture.image.copy()
        self.make(tmp_path, [picture]).propose(picture)
        np.testing.assert_array_equal(picture.image, before)

    def test_batch_is_one_by_one(self, tmp_path: Path) -> None:
        pictures = [sample(48, 64, "a"), sample(30, 20, "sub/b")]
        proposer = self.make(tmp_path, pictures)
        for picture, batched in zip(pictures, proposer.propose_batch(pictures), strict=True):
            assert torch.equal(batched.masks, proposer.propose(picture).masks)

    def test_digest_is_stable(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, [sample(48, 64)])
        first = build(config, CPU)
        digest = first.digest
        first.propose(sample(48, 64))
        assert isinstance(digest, str)
        assert first.digest == digest == build(config, CPU).digest

    def test_unknown_argument(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, [sample(48, 64)])
        with pytest.raises(ConfigError, match=r"proposer\.wrong_key: unknown key"):
            build({**config, "wrong_key": 1}, CPU)
