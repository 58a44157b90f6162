"""Regions that a person asks for: of promptable models, of trees, of superpixels, and the box itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg.errors import ConfigError
from moduseg.proposers import build
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.drawn import choose_fitting, find_boxes, find_region, measure_fit, order_corners, prompt_model
from moduseg.proposers.hed import ContourDetector
from moduseg.proposers.mask_generation import Decoded, Promptable
from moduseg.proposers.mask_upsampling import Embedded
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU
from tests.proposers.test_contours import detect_plainly
from tests.support.tagged_world import scene


class Silent(Proposer):
    """It cannot be asked."""

    def propose(self, sample: Sample) -> Proposals:
        return Proposals(torch.zeros((0, *sample.size), dtype=torch.bool))


def draw_disc() -> tuple[np.ndarray, np.ndarray, PromptBox]:
    """A red disc on grey: the image, its mask, its box."""
    y, x = np.mgrid[:90, :120]
    disc = np.hypot(y - 40, x - 70) < 20
    image = np.full((90, 120, 3), 120, np.uint8)
    image[disc] = (200, 40, 40)
    return image, disc, (50, 20, 91, 61)


def measure_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def options_of(name: str) -> dict[str, Any]:
    if name == "sam":
        return {"name": "sam", "model": "miniature", "checkpoint": "miniature/sam.safetensors", "engine": "grid"}
    return {"name": name}


@pytest.mark.parametrize("name", ["superpixels", "sam", "contours"])
@pytest.mark.parametrize("is_a_point", [False, True])
def test_the_object_is_found(name: str, is_a_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContourDetector, "detect", detect_plainly)
    image, disc, box = draw_disc()
    asked = (70.0, 40.0, 70.0, 40.0) if is_a_point else box
    region = find_region(build(options_of(name), CPU), Sample("a", image), asked)
    assert (region.shape, region.dtype) == (disc.shape, np.dtype(bool))
    assert measure_iou(region, disc) > 0.8


def test_sam_is_asked_in_both_engines_alike() -> None:
    drawn = scene(3, 128)
    assert drawn.instances is not None
    rows, columns = np.nonzero(drawn.instances == 1)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    grid, packaged = (
        build({**options_of("sam"), "engine": engine}, CPU).find_region(Sample("a", drawn.image), box)
        for engine in ("grid", "packaged")
    )
    assert grid is not None
    assert packaged is not None
    assert np.array_equal(grid, packaged)
    assert measure_iou(grid, drawn.instances == 1) > 0.7


def test_a_box_around_nothing_is_the_region() -> None:
    image = np.full((60, 80, 3), 90, np.uint8)
    region = find_region(Silent(), Sample("a", image), (50, 40, 10, 20))
    assert find_boxes(region[None]).tolist() == [[10, 20, 50, 40]]
    assert region.sum() == 800


@pytest.mark.parametrize(
    ("box", "ordered"),
    [
        pytest.param((5, 6, 1, 2), (1, 2, 5, 6), id="corners in any order"),
        pytest.param((-3, 0, 4, 99), (0, 0, 4, 60), id="cut to the picture"),
        pytest.param((7, 8, 7, 8), (7, 8, 7, 8), id="a point"),
    ],
)
def test_corners_are_ordered(box: PromptBox, ordered: PromptBox) -> None:
    assert order_corners(box, (60, 80)) == ordered


@pytest.mark.parametrize("box", [(80, 0, 90, 10), (0, 60, 5, 70), (-9, -9, -1, -1)])
def test_a_box_outside_is_named(box: PromptBox) -> None:
    with pytest.raises(ConfigError, match="inside the picture of 80 x 60 pixels; draw inside it"):
        order_corners(box, (60, 80))


def test_the_best_fit_is_weighed_with_quality() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 9, 10], [40, 40, 50, 50]], dtype=float)
    assert measure_fit(boxes, (0, 0, 10, 10)).tolist() == pytest.approx([1, 0.9, 0])
    assert choose_fitting(boxes, np.array([0.5, 0.9, 1.0]), (0, 0, 10, 10)) == 1
    assert choose_fitting(boxes, np.array([0.9, 0.5, 1.0]), (0, 0, 10, 10)) == 0
    assert choose_fitting(boxes, np.ones(3), (20, 20, 30, 30)) is None


class Squares(Promptable):
    """Answers a point with a square around it, in a padded input of twice the image's size."""

    def __init__(self) -> None:
        self.points: list[list[float]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def embed(self, image: np.ndarray) -> Embedded:
        height, width = image.shape[:2]
        return Embedded(None, (height, width), (2 * height, 2 * width), (256, 256))

    def decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        self.points += points.tolist()
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        cells = points / 4
        distance = torch.maximum((x - cells[:, 0, None, None]).abs(), (y - cells[:, 1, None, None]).abs())
        return Decoded(5.0 - distance, torch.linspace(0.9, 0.8, len(points)))


def test_points_and_masks_keep_to_their_frames() -> None:
    """A square of 5 cells each way is one of 10 pixels of the image, which has 2 pixels a cell."""
    model = Squares()
    region = prompt_model(model, np.zeros((80, 120, 3), np.uint8), (60, 40, 60, 40))
    assert model.points == [[120, 80]]
    assert region is not None
    x0, y0, x1, y1 = find_boxes(region[None])[0]
    assert abs(np.array([x0, y0, x1, y1]) - [50, 30, 71, 51]).max() <= 1.5
    boxed = prompt_model(Squares(), np.zeros((80, 120, 3), np.uint8), (50, 30, 71, 51))
    assert boxed is not None
    assert abs(find_boxes(boxed[None])[0] - [50, 30, 71, 51]).max() <= 2
    assert prompt_model(Squares(), np.zeros((80, 120, 3), np.uint8), (0, 0, 119, 10)) is None


def test_a_region_of_superpixels_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in a smaller picture: one in the middle of that is in the middle of the photograph."""
    small = np.zeros((1, 192, 320), dtype=bool)
    small[:, 60:132, 100:220] = True
    found = Proposals(torch.from_numpy(small))
    monkeypatch.setattr("moduseg.proposers.drawn.SuperpixelProposer.propose", lambda *_: found)
    region = find_region(Silent(), Sample("a", np.zeros((300, 500, 3), np.uint8)), (156, 93, 344, 207))
    assert np.array_equal(region, region[:, ::-1])
    assert np.array_equal(region, region[::-1])
    assert region.sum() == pytest.approx(small.sum() * (500 / 320) ** 2, rel=0.02)
