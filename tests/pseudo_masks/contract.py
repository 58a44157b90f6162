"""What every pseudo-mask generator has to do; a generator's test class inherits it and supplies `generator`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.labels import make_label_map
from moduseg.structures import Proposals, Sample

NUM_CLASSES = 5
CLASSES = ("background", *(f"class {i}" for i in range(1, NUM_CLASSES + 1)))

NAMES = ["background", "red disc", "blue ring", "green star", "cyan cross", "magenta disc"]
"""Names that the miniature CLIP knows, for as many classes."""


def sample(size: tuple[int, int] = (24, 40), labels: tuple[int, ...] = (2, 4), name: str = "a") -> Sample:
    """A picture whose left quarter is class 2 and whose right quarter is class 4, as far as `labels` has them."""
    rng = np.random.default_rng([len(name), *size])
    image = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
    semantic = np.zeros(size, np.uint8)
    quarter = size[1] // 4
    for label, columns in ((2, slice(0, quarter)), (4, slice(size[1] - quarter, None))):
        if label in labels:
            semantic[:, columns] = label
            image[:, columns, label % 3] += 180
    return Sample(name, image, labels, semantic)


def halves(size: tuple[int, int]) -> Proposals:
    """The left and the right half."""
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[0, :, : size[1] // 2] = True
    masks[1, :, size[1] // 2 :] = True
    return Proposals(masks)


class GeneratorContract:
    """Inherit, and define the fixture `generator(device)`, fitted where it has to be, for the pictures of `sample`."""

    @pytest.mark.parametrize("labels", [(), (2,), (2, 4)])
    @pytest.mark.parametrize("size", [(24, 40), (19, 33)])
    def test_scores_of_the_present_classes(
        self, generator: PseudoMaskGenerator, labels: tuple[int, ...], size: tuple[int, int], device: torch.device
    ) -> None:
        item = sample(size, labels, f"{size[0]}-{len(labels)}")
        maps = generator.generate(item, labels, halves(size))
        assert maps.class_ids == labels
        assert maps.scores.shape == (len(labels), *size)
        assert maps.scores.device.type == device.type
        assert maps.scores.isfinite().all()
        assert ((maps.scores >= 0) & (maps.scores <= 1)).all()
        for extra in (maps.background, maps.ignore):
            assert extra is None or extra.shape == size

    def test_repeatable(self, generator: PseudoMaskGenerator) -> None:
        item = sample(name="24-2")
        first, second = (generator.generate(item, (2, 4), halves(item.size)).scores for _ in range(2))
        assert torch.equal(first, second)

    def test_labels_come_out_right(self, generator: PseudoMaskGenerator) -> None:
        item = sample(name="24-2")
        maps = generator.generate(item, (2, 4), halves(item.size))
        labels = make_label_map(maps, "given" if maps.background is not None else "constant", 0.5).cpu().numpy()
        assert item.semantic is not None
        assert (labels == item.semantic).mean() > 0.9

    def test_digest_is_text(self, generator: PseudoMaskGenerator) -> None:
        assert isinstance(generator.digest, str)
        assert generator.digest == generator.digest
